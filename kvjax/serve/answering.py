"""From a request that was read to its answer: the engine's steps as OpenAI's objects."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from concurrent.futures import Executor
from contextlib import ExitStack, aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from kvjax.config import CompressionConfig
from kvjax.inputs.chat import check_template
from kvjax.serve.answers import DONE, Form, encoded, error, event, token_texts, usage
from kvjax.serve.contexts import InUse
from kvjax.serve.engine import Engine
from kvjax.serve.guard import Limits, Refused
from kvjax.serve.job import Step, Usage
from kvjax.serve.metrics import Metrics
from kvjax.serve.protocol import Chat, Completion, shortened
from kvjax.serve.watched import Streamed, watched


@dataclass(frozen=True)
class Served:
    """An engine and what it is served with.

    Attributes:
      engine: answers.
      tokenizer: the engine's own.
      name: of the model, as clients give it.
      methods: the engine's methods by name, the first one the default.
      limits: what clients may do.
      metrics: counts what they do.
      created: when the server began, in seconds since 1970.
      reader: the one thread that turns prompts into tokens, which takes long for long ones.
      contexts: the one thread that waits for contexts to be read.
    """

    engine: Engine
    tokenizer: Any
    name: str
    methods: Mapping[str, CompressionConfig]
    limits: Limits
    metrics: Metrics
    created: int
    reader: Executor
    contexts: Executor

    def check(self, asked: Completion | Chat) -> None:
        """Raise Refused for what is wrong, or too much, before the engine is asked."""
        if asked.model not in (None, self.name):
            raise Refused(404, f"model={shortened(asked.model)}, expected {self.name!r}")
        if isinstance(asked, Chat):
            try:
                check_template(self.tokenizer, "messages")
            except ValueError as wrong:
                raise Refused(400, str(wrong)) from None
        self.check_room(len(_calls(asked)))

    def check_room(self, count: int) -> None:
        """Raise Refused where so many more answers are more than are taken at once."""
        most, there = self.limits.requests, self.metrics.open
        if there + count > most:
            raise Refused(
                429, f"{there} answers are awaited, and {most} the limit: try again later"
            )


# What the engine calls otherwise than clients do.
_NAMES = {"budget": "max_cache_tokens", "max_new_tokens": "max_tokens"}


def as_asked(wrong: ValueError, names: Mapping[str, str] = _NAMES) -> Refused:
    """The engine's complaint, with the argument's name as the client gave it."""
    if isinstance(wrong, InUse):
        return Refused(409, str(wrong))
    name, equals, rest = str(wrong).partition("=")
    told = names.get(name, name) + equals + rest
    told = told.replace("+ max_new_tokens=", "+ max_tokens=")
    return Refused(404 if name == "context" else 400, told)


async def answer(served: Served, asked: Completion | Chat, request: Request) -> Response:
    """Answer a completion or a chat, whole or as a stream.

    Raises:
      Refused: what cannot be answered, or not now.
      TimeoutError: the time is up.
      Gone: the client has gone away.
    """
    served.check(asked)
    until = asyncio.get_running_loop().time() + served.limits.seconds
    form = Form(isinstance(asked, Chat), served.name, served.tokenizer)
    path, prompts = request.url.path, _calls(asked)

    def ended(outcome: str) -> None:
        served.metrics.ended(path, outcome)

    with ExitStack() as stack:
        stack.enter_context(served.metrics.opened(len(prompts)))
        if not asked.stream:
            work = _whole(served, asked, prompts, form)
            whole, outcome = await watched(work, request.receive, until)
            ended(outcome)
            return Response(encoded(whole), media_type="application/json")
        events = _events(served, asked, prompts[0], form, ended)
        first = await watched(anext(events), request.receive, until)  # type: ignore[arg-type]
        return Streamed(
            first, events, until, ended, lambda said: event(error(said, 500)), stack.pop_all()
        )


def _calls(asked: Completion | Chat) -> list[dict[str, Any]]:
    """The engine's arguments for each prompt, whose seeds differ: equal prompts are samples."""
    shared = {
        "method": asked.method,
        "budget": asked.max_cache_tokens,
        "max_new_tokens": asked.limit,
        "sampling": asked.sampling(),
        "stop": asked.stop,
        "logprobs": asked.likeliest,
        "context": asked.context,
    }
    seed = asked.drawn_seed()
    if isinstance(asked, Chat):
        return [{"messages": asked.messages, "seed": seed} | shared]
    return [
        {"prompt": prompt, "seed": (seed + index) % 2**31} | shared
        for index, prompt in enumerate(asked.prompt)
    ]


# ---------------------------------------------------------------------------- whole answers
async def _whole(
    served: Served, asked: Completion | Chat, calls: list[dict[str, Any]], form: Form
) -> tuple[dict[str, Any], str]:
    """The answers to all prompts in one object, and why the first one ended."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(_one(served, call)) for call in calls]
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None
    choices, counts = [], []
    for index, task in enumerate(tasks):
        steps = task.result()
        tokens = [token for step in steps for token in step.tokens]
        log_probs = [value for step in steps for value in step.log_probs]
        top = [likeliest for step in steps for likeliest in step.top]
        logprobs = form.logprobs(tokens, log_probs, top) if asked.wants_logprobs else None
        text = _echo(served, asked, index) + "".join(step.text or "" for step in steps)
        choices.append(form.choice(index, text, steps[-1].finish_reason, logprobs))
        counts += [step.usage for step in steps if step.usage is not None]
    return form.whole(choices, counted(*counts)), choices[0]["finish_reason"]


async def _one(served: Served, call: dict[str, Any]) -> list[Step]:
    """All steps of one answer."""
    async with aclosing(_steps(served, call)) as steps:
        return [step async for step in steps]


async def _steps(served: Served, call: dict[str, Any]) -> AsyncGenerator[Step]:
    """The steps of one answer, their times noted.

    Raises:
      Refused: the engine does not take the call.
    """
    submit, begun = partial(served.engine.submit, **call), time.perf_counter()
    try:
        steps = await asyncio.get_running_loop().run_in_executor(served.reader, submit)
        async with aclosing(served.metrics.timed(steps, begun)) as timed:
            async for step in timed:
                yield step
    except ValueError as wrong:  # with the first step: a context that was given up meanwhile
        names = _NAMES | ({"logprobs": "top_logprobs"} if "messages" in call else {})
        raise as_asked(wrong, names) from None


def _echo(served: Served, asked: Completion | Chat, index: int) -> str:
    """The prompt's text where the answer is to begin with it."""
    if isinstance(asked, Chat) or not asked.echo:
        return ""
    prompt = asked.prompt[index]
    return prompt if isinstance(prompt, str) else served.tokenizer.decode(prompt)


# ---------------------------------------------------------------------------- streams
async def _events(
    served: Served,
    asked: Completion | Chat,
    call: dict[str, Any],
    form: Form,
    ended: Callable[[str], None],
) -> AsyncGenerator[bytes]:
    """A stream's events: chunks, the count of tokens if that was asked for, and the end."""
    # As in OpenAI's streams, chunks say nothing of usage where the last one does.
    extra: dict[str, Any] = {"usage": None} if asked.counts_at_the_end else {}
    before: list[int] = []
    offset = 0
    async with aclosing(_steps(served, call)) as steps:
        async for step in steps:
            logprobs = None
            if asked.wants_logprobs:
                logprobs = form.logprobs(step.tokens, step.log_probs, step.top, before, offset)
                offset += sum(map(len, token_texts(step.tokens, served.tokenizer, before)))
            text = ("" if before else _echo(served, asked, 0)) + (step.text or "")
            chunk = form.chunk(text, step.finish_reason, logprobs, first=not before)
            yield event(chunk | extra)
            before = [*before, *step.tokens][-1:]
            if step.usage is None or step.finish_reason is None:
                continue
            ended(step.finish_reason)
            if asked.counts_at_the_end:
                yield event(form.count(counted(step.usage)))
    yield DONE


def counted(*each: Usage) -> dict[str, int]:
    """Tokens of prompts and of their answers."""
    read = sum(one.prompt_tokens for one in each)
    return usage(read, sum(one.completion_tokens for one in each))
