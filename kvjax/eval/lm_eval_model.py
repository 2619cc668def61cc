"""Run any task of lm-evaluation-harness under compression (`pip install kvjax[eval]`).

    python -m kvjax.eval.lm_eval_model --model_args pretrained=DIR,method=ada-snapkv,budget=25% \\
        --tasks arc_easy

is `lm_eval --model kvjax` with this file registered: all of lm_eval's flags. In Python:
`lm_eval.simple_evaluate(model=Harness(DIR, "ada-snapkv", "25%"), tasks=[...])`.

What is compressed:
- likelihood of a continuation: the context but for its last token, which is the first to run
  against the compressed cache, so that even answers of one token are read from what was kept;
- an answer: the whole context, as in `kvjax.generate` (its first token comes from the prefill);
- likelihood of a text: every `max_length // 2` tokens of it after the same number before them,
  compressed; the first ones have nothing before them to compress.
"""

import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from tqdm import tqdm

import kvjax
from kvjax import tiny
from kvjax.config import CompressionConfig, parse_budget
from kvjax.eval.pod import workers
from kvjax.generation.sampling import Sampling
from kvjax.inputs.chat import rendered
from kvjax.inputs.prompts import bucket, encoded
from kvjax.likelihood import Document, Scored, batches

FULL = CompressionConfig.named("full")
# Keys of a task's `generation_kwargs` that have an effect here; others are refused.
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_KNOWN = ("until", "max_gen_toks", "max_new_tokens", "do_sample", *_SAMPLING)


@register_model("kvjax")
class Harness(TemplateLM):
    """A checkpoint and what is kept of its cache, as lm-evaluation-harness wants a model.

    Args:
      pretrained: a Hugging Face directory, or "tiny" for the bundled model.
      method: a name of `kvjax.METHODS`.
      budget: entries kept per KV head: a number, or "25%" of the context; none for "full".
      batch_size: contexts at once.
      max_length: most tokens of a context and what follows it; longer contexts lose their
        beginning. The model's own by default.
      max_context: the model's own limit of a context and what follows, in place of what it was
        trained for.
      max_gen_toks: most tokens of an answer, where the task does not say.
      dtype: float32, bfloat16 or float16.
      split: devices that the model is split over; one by default.
      seed: of sampling and of the `random` scorer.
      device, max_batch_size: what lm_eval passes to every model; without effect.

    Raises:
      ValueError: a setting outside its range; no tokenizer.
    """

    def __init__(
        self,
        pretrained: str,
        method: str = "full",
        budget: str | int | None = None,
        *,
        batch_size: int | str = 8,
        max_length: int | None = None,
        max_context: int | None = None,
        max_gen_toks: int = 256,
        dtype: str = "float32",
        split: int | None = None,
        seed: int = 0,
        device: Any = None,
        max_batch_size: Any = None,
        revision: str | None = None,
    ):
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"batch_size={batch_size!r}, expected an integer of at least 1")
        given = None if budget is None else parse_budget(str(budget))
        self.config = CompressionConfig.named(method, given)
        self.batch_size, self.max_gen_toks, self.seed = int(batch_size), int(max_gen_toks), seed
        directory = tiny.WEIGHTS if pretrained == "tiny" else pretrained
        mesh = workers(split).mesh
        limit = None if max_context is None else int(max_context)
        self.model, self.tokenizer = kvjax.load(
            directory, revision=revision, dtype=dtype, progress=False, mesh=mesh, max_context=limit
        )
        if self.tokenizer is None:
            raise ValueError(f"pretrained={pretrained!r} has no tokenizer, expected one")
        own = self.model.config.context
        self.max_length = own if max_length is None else int(max_length)
        if not 4 <= self.max_length <= own:
            raise ValueError(f"max_length={max_length}, expected 4 to the model's {own}")
        self._name = str(pretrained)

    # ------------------------------------------------------------------------ tokens
    @property
    def eot_token_id(self) -> int:
        """What ends a text."""
        ends = self.model.config.eos_token_ids
        found = self.tokenizer.eos_token_id
        return (ends[0] if ends else 0) if found is None else found

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context."""
        found = self.tokenizer.bos_token_id
        return self.eot_token_id if found is None else found

    @property
    def tokenizer_name(self) -> str:
        """For lm_eval's cache of requests."""
        return self._name.replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Token ids; special tokens unless the text begins with BOS already."""
        return encoded(string, self.tokenizer, special=add_special_tokens is not False)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The turns as the checkpoint's template writes them."""
        return rendered(
            chat_history,
            self.tokenizer,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    # ------------------------------------------------------------------------ likelihood
    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **ignored: Any,
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether greedy decoding would give it.

        A continuation of no tokens is certain: 0.0 and True.
        """
        documents, rests = [], []
        for _, context, continuation in requests:
            if continuation:
                rests.append(continuation[-(self.max_length - 1) :])
                tokens = (context + rests[-1])[-self.max_length :]
                documents.append((tokens, max(1, len(tokens) - len(rests[-1]) - 1)))
        scored = zip(rests, self._scored(documents, disable_tqdm), strict=True)
        found = []
        for key, _, continuation in requests:
            answer = (0.0, True)
            if continuation:
                rest, one = next(scored)
                first = len(one.nll) - len(rest)
                answer = (-sum(one.nll[first:]), one.top1[first:] == rest)
            found.append(answer)
            self.cache_hook.add_partial("loglikelihood", key, answer)
        return found

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each text, half a window after another."""
        documents, owners, wanted = [], [], []
        half = self.max_length // 2
        for index, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            for start in range(0, len(tokens), half):
                before = tokens[start - half : start] or [self.prefix_token_id]
                targets = tokens[start : start + half]
                documents.append((before + targets, len(before)))
                owners.append(index)
                wanted.append(len(targets))
        totals = [0.0] * len(requests)
        scored = self._scored(documents, disable_tqdm)
        for index, count, one in zip(owners, wanted, scored, strict=True):
            totals[index] -= sum(one.nll[len(one.nll) - count :])
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _scored(self, documents: Sequence[Document], quiet: bool) -> list[Scored]:
        """What follows each prefix, in the order given."""
        results: dict[int, Scored] = {}
        bar = tqdm(total=len(documents), desc="likelihood", unit="text", disable=quiet)
        # A prefix of one token has nothing to evict.
        for short in (True, False):
            mine = [i for i, (_, prefix) in enumerate(documents) if (prefix == 1) == short]
            config = FULL if short else self.config
            for batch, pad_to in batches([documents[i] for i in mine], self.batch_size):
                chosen = [mine[place] for place in batch]
                tokens, prefixes = zip(*(documents[i] for i in chosen), strict=True)
                found = kvjax.score(
                    self.model, tokens, prefixes, config, seed=self.seed, pad_to=pad_to
                )
                results |= zip(chosen, found, strict=True)
                bar.update(len(set(batch)))
        bar.close()
        return [results[index] for index in range(len(documents))]

    # ------------------------------------------------------------------------ answers
    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        """Answers, cut before the first of the strings that end them."""
        answers: dict[int, str] = {}
        bar = tqdm(total=len(requests), desc="answers", unit="answer", disable=disable_tqdm)
        for rules, places in _alike([request.args[1] for request in requests]).items():
            stop, new_tokens, sampling = rules
            new_tokens = self.max_gen_toks if new_tokens is None else new_tokens
            room = self.max_length - new_tokens
            if room < 1:
                raise ValueError(
                    f"max_gen_toks={new_tokens}, expected less than max_length={self.max_length}"
                )
            prompts = {i: self.tok_encode(requests[i].args[0])[-room:] for i in places}
            for batch in _by_bucket(prompts, self.batch_size):
                filled = batch + batch[-1:] * (self.batch_size - len(batch))
                out = kvjax.generate(
                    self.model, [prompts[i] for i in filled], self.config,
                    max_new_tokens=new_tokens, tokenizer=self.tokenizer, sampling=sampling,
                    seed=self.seed, stop=stop,
                )  # fmt: skip
                answers |= zip(batch, out.text or (), strict=False)
                bar.update(len(batch))
        bar.close()
        for index, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", request.args, answers[index])
        return [answers[index] for index in range(len(requests))]


def _alike(given: Iterable[dict[str, Any]]) -> dict[tuple, list[int]]:
    """Places of the requests that share (stop strings, most tokens, sampling)."""
    groups: dict[tuple, list[int]] = defaultdict(list)
    for place, settings in enumerate(given):
        unknown = sorted(settings.keys() - set(_KNOWN))
        if unknown:
            raise ValueError(
                f"generation_kwargs has {unknown[0]!r}, expected some of {', '.join(_KNOWN)}"
            )
        until = settings.get("until") or ()
        stop = (until,) if isinstance(until, str) else tuple(until)
        chosen = {name: settings[name] for name in _SAMPLING if settings.get(name) is not None}
        if not settings.get("do_sample", chosen.get("temperature", 0) > 0):
            chosen["temperature"] = 0.0
        most = settings.get("max_gen_toks", settings.get("max_new_tokens"))
        groups[tuple(filter(None, stop)), most, Sampling(**chosen)].append(place)
    return groups


def _by_bucket(prompts: dict[int, list[int]], size: int) -> Iterator[list[int]]:
    """At most `size` prompts of one padded length at once."""
    groups: dict[int, list[int]] = defaultdict(list)
    for place, tokens in prompts.items():
        groups[bucket(len(tokens))].append(place)
    for group in groups.values():
        for start in range(0, len(group), size):
            yield group[start : start + size]


def main() -> Any:
    """`lm_eval`, which knows the model "kvjax" here."""
    from lm_eval.__main__ import cli_evaluate

    if "--model" not in sys.argv:
        place = 2 if sys.argv[1:2] == ["run"] else 1
        sys.argv[place:place] = ["--model", "kvjax"]
    return cli_evaluate()


if __name__ == "__main__":
    # Run as a script this file is `__main__`; its own module registers the model.
    from kvjax.eval import lm_eval_model

    lm_eval_model.main()
