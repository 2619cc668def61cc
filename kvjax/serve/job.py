"""A request on its way through the server, and what its client gets."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvjax.generation.detokenize import RunningText
from kvjax.generation.request import CONTEXT
from kvjax.generation.sampling import Sampling
from kvjax.serve.menu import Choice
from kvjax.serve.rows import Drawn
from kvjax.serve.scheduler import Ticket


@dataclass(frozen=True)
class Usage:
    """Tokens of a request: its prompt, with its context's, and its answer."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Step:
    """What a request has since its last step.

    Attributes:
      tokens: drawn, an end-of-sequence token included.
      log_probs: of each of them under the model itself.
      text: that later tokens cannot change; None without a tokenizer.
      top: the likeliest tokens at each place, and their log-probabilities, as many as were asked
        for.
      finish_reason: in the last step "stop" (an end-of-sequence token, or a stop string) or
        "length"; None before.
      usage: in the last step.
    """

    tokens: list[int]
    log_probs: list[float]
    text: str | None
    top: list[dict[int, float]]
    finish_reason: str | None = None
    usage: Usage | None = None


@dataclass(frozen=True)
class Answer:
    """All steps of a request together; fields as of `Step`."""

    tokens: list[int]
    log_probs: list[float]
    text: str | None
    top: list[dict[int, float]]
    finish_reason: str
    usage: Usage


@dataclass(eq=False, kw_only=True)
class Job(Ticket):
    """A request that was checked: what is asked, where its steps go, how far it is.

    Attributes:
      number: of the request, from 0 in the order in which they came.
      method: name of it.
      tokens: of the prompt, or of the question where there is a context.
      before: tokens of the context.
      choice: how the prompt is read; None where there is a context.
      limit: tokens of the answer at most.
      sampling, seed, ends: how tokens are drawn, and whether end-of-sequence tokens end the answer.
      context: id of it, or None.
      more: tokens of every head that come to lie in pages beside what is kept of the prompt.
      logprobs: likeliest tokens that the client wants at each place.
      push: takes each step, and an exception where the server fails.
      drawn: tokens that are drawn or on their way, as far as nothing ends the answer before.
      told: tokens that the client has.
      done: whether the client has all.
      saved: the row's state while it is swapped out.
    """

    number: int
    method: str
    tokens: list[int]
    before: int
    choice: Choice | None
    limit: int
    sampling: Sampling
    seed: int
    ends: bool
    context: str | None
    more: int
    logprobs: int
    push: Callable[[Step | BaseException], None]
    text: RunningText
    drawn: int = 0
    told: int = 0
    done: bool = False
    saved: Any = field(default=None, repr=False)

    @property
    def prompt_tokens(self) -> int:
        """Tokens before the answer."""
        return self.before + len(self.tokens)

    @property
    def left(self) -> int:
        """Tokens that are still to be drawn, as far as nothing ends the answer before."""
        return self.limit - self.drawn

    def take(self, drawn: Drawn, row: int, eos: Sequence[int]) -> None:
        """Hand what a dispatch drew in a row to the client, with a reason if the answer ends."""
        tokens, log_probs = drawn.tokens[row], drawn.log_probs[row]
        count = int((tokens >= 0).sum())
        if not count:
            return
        piece = self.text.add(tokens[:count].tolist())
        if self.text.stopped:
            count = self.text.taken - self.told
        self.told += count
        reason = None
        if self.text.stopped or (self.ends and count and tokens[count - 1] in eos):
            reason = "stop"
        elif self.told >= self.limit:
            reason = "length"
        usage = None
        if reason is not None:
            self.done, usage = True, Usage(self.prompt_tokens, self.told)
            piece += self.text.flush()
        step = Step(
            tokens=tokens[:count].tolist(),
            log_probs=log_probs[:count].tolist(),
            text=None if self.text.tokenizer is None else piece,
            top=self._top(drawn, row, count),
            finish_reason=reason,
            usage=usage,
        )
        self.push(step)

    def _top(self, drawn: Drawn, row: int, count: int) -> list[dict[int, float]]:
        likeliest = drawn.top_tokens[row, :count, : self.logprobs].tolist()
        values = drawn.top_log_probs[row, :count, : self.logprobs].tolist()
        pairs = zip(likeliest, values, strict=True)
        return [dict(zip(*each, strict=True)) for each in pairs] if self.logprobs else []

    def fail(self, error: BaseException) -> None:
        """Tell the client that there will be no answer."""
        if not self.done:
            self.done = True
            self.push(error)


def running_text(tokenizer: Any, stop: Sequence[str], prompt: Sequence[int]) -> RunningText:
    """The text of an answer to a prompt."""
    return RunningText(tokenizer, stop, list(prompt[-CONTEXT:]))


def together(steps: Sequence[Step]) -> Answer:
    """All steps of a request as one."""
    last = steps[-1]
    assert last.finish_reason is not None  # it is the last
    assert last.usage is not None
    told = [step.text for step in steps if step.text is not None]
    return Answer(
        tokens=[token for step in steps for token in step.tokens],
        log_probs=[value for step in steps for value in step.log_probs],
        text="".join(told) if last.text is not None else None,
        top=[place for step in steps for place in step.top],
        finish_reason=last.finish_reason,
        usage=last.usage,
    )
