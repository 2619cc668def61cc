"""What many requests get at once is what each gets alone, and what `generate` gives.

Slow, all of it: every method is a program or two more. `make equal` runs the same cases with every
named method and longer prompts.
"""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path

import equality
import jax
import pytest
from equality import agreeing, alone, asked_of, at_once, generated

import kvjax
from kvjax import METHODS, CompressionConfig, Recompress
from kvjax.models.checkpoints.weights import load_decoder
from kvjax.serve import Engine
from kvjax.sharding import make_mesh, place

pytestmark = pytest.mark.slow

EVERY = "EQUALITY" in os.environ
FIXTURES = Path(__file__).parents[1] / "fixtures"
SMALL, NEW, TAIL = 16, 24, 16
RULE = Recompress(every=8, budget=20)


@dataclass(frozen=True)
class Case:
    """What is served, and how.

    Attributes:
      few: methods in `make test-all`.
      many: methods in `make equal`; all of them by default.
      checkpoint: a folder of fixtures.
      lengths: of prompts.
      longer: of prompts in `make equal`, beside these.
      recompress: how answers are compressed.
      quantize: as of `CompressionConfig`.
      swapped: whether rows are taken out and brought back.
      devices: that the model is split over.
    """

    few: tuple[str, ...] = ()
    many: tuple[str, ...] = tuple(METHODS)
    checkpoint: str = "hf/llama2-gqa"
    lengths: tuple[int, ...] = (1, 2, 63, 64)
    longer: tuple[int, ...] = ()
    recompress: Recompress | None = None
    quantize: str | None = None
    swapped: bool = False
    devices: int = 1

    @property
    def compared(self) -> int:
        """Tokens of an answer that are to be those of `generate`.

        In int8 it is those before a tail first moves into pages: `generate` keeps answers whole.
        """
        return TAIL + 1 if self.quantize and self.recompress is None else NEW

    @property
    def hair(self) -> float:
        """How much two programs may differ in a log-probability that decides.

        In int8 a value that lies between two whole numbers may become either.
        """
        return 1e-3 if self.quantize else 1e-5


LONG = ("full", "ada-snapkv", "kv-compress", "key-diff")
SOME = ("ada-pyramid", "prefixkv", "joint-kvzip", "h2o")
COMPRESSING = tuple(name for name in METHODS if name != "full")
CASES = {
    "kept": Case(few=("kv-compress", "prefixkv"), longer=(65,)),
    "long": Case(many=LONG, lengths=(65, 700), longer=(4096,)),
    "evicted": Case(few=("critical-ada-snapkv",), many=COMPRESSING, recompress=RULE, swapped=True),
    "int8": Case(few=("joint-kvzip",), many=COMPRESSING, quantize="int8", swapped=True),
    "int8 evicted": Case(many=SOME, quantize="int8", recompress=RULE),
    "dynamic": Case(few=("ada-snapkv",), many=SOME, checkpoint="rope/dynamic"),
    "longrope": Case(many=SOME, checkpoint="rope/longrope", swapped=True),
    "all windows": Case(many=SOME, checkpoint="hf/mistral", recompress=RULE),
    "some windows": Case(many=SOME, checkpoint="hf/qwen2"),
    "eight devices": Case(many=LONG, devices=8, swapped=True),
}
SHOWN = [name for name, case in CASES.items() if case.few or EVERY]


def config(name: str, case: Case) -> CompressionConfig:
    """A method as servers run it; a fraction where it keeps a share of a prompt."""
    share = "prefix" in name or "kvzip" in name
    settings = {} if case.quantize is None else {"quantize": case.quantize}
    found = CompressionConfig.named(name, 0.25 if share else SMALL, **settings)
    return dataclasses.replace(found, keep_ratio=False)


def loaded(case: Case, context: int = 256):
    model = load_decoder(FIXTURES / case.checkpoint, progress=False)
    model.config = dataclasses.replace(model.config, max_context=context)
    return model


def opened(model, configs, case: Case, buckets, pages_of: int, **settings) -> Engine:
    """An engine in which as many prompts of the longest bucket fit as `pages_of` says."""
    shape = model.config
    entry = 2 * shape.head_dim * 4 + 5
    whole = shape.num_layers * shape.num_kv_heads * (buckets[-1] + NEW + TAIL) * entry
    return Engine(
        model, None, configs, cache_bytes=(pages_of + 1) * whole, rows=4, buckets=buckets,
        max_new_tokens=NEW, tail_slots=None if case.recompress else TAIL, top_logprobs=2,
        recompress=case.recompress, warm_up=False, **settings,
    )  # fmt: skip


@pytest.mark.parametrize("name", SHOWN)
def test_at_once_as_alone_and_as_generate(name, monkeypatch, capsys):
    """Slow: three programs for each method."""
    case = CASES[name]
    names = case.many if EVERY else case.few
    lengths = (*case.lengths, *case.longer) if EVERY else case.lengths
    model = loaded(case, 4096 + 256)
    configs = {method: config(method, case) for method in names}
    buckets = tuple(size for size in (64, 128, 1024, 4096) if size < 2 * max(lengths))
    requests = asked_of(names, lengths, NEW)
    served = place(model, make_mesh(model=case.devices)) if case.devices > 1 else model
    with opened(served, configs, case, buckets, pages_of=2) as engine:
        apart = alone(engine, requests)
        if case.swapped:
            equality.swap_often(engine, monkeypatch)
        answers = at_once(engine, requests)
        stats = engine.stats()
        assert engine._loop.call(engine._loop._device.held) == 0
    assert answers == apart  # bit for bit
    assert stats.swaps > len(requests) // 2 or not case.swapped
    assert stats.evictions > len(requests) or case.recompress is None
    reference = generated(model, requests, configs, recompress=case.recompress)
    rows = zip(answers, reference, strict=True)
    same = [agreeing(answer, *row, case.compared, case.hair) for answer, row in rows]
    most = case.compared * len(same)
    if EVERY:
        with capsys.disabled():
            print(
                f"\n{name}: {len(names)} methods, prompts of {', '.join(map(str, lengths))} tokens,"
                f" {len(requests)} requests, {sum(same)} of {most} tokens compared,"
                f" {stats.swaps} swaps, {stats.evictions} evictions"
            )
    assert sum(same) > 0.95 * most
    jax.clear_caches()  # each case has programs of its own


@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.skipif(not EVERY, reason="takes minutes: `make equal`")
def test_contexts(quantize, monkeypatch):
    """Slow: each method keeps a context, and all their questions are asked at once."""
    case = Case(quantize=quantize)
    names = SOME if quantize else tuple(METHODS)
    model, configs = loaded(case), {method: config(method, case) for method in names}
    document = asked_of(["any"], [64], NEW)[0].tokens
    questions = asked_of(["any"], (1, 2, 15, 16), NEW)
    with opened(model, configs, case, (64,), len(names), question_buckets=(16,)) as engine:
        contexts = {method: engine.add_context(document, method=method) for method in names}
        requests = [
            dataclasses.replace(asked, method=None, context=context)
            for asked in questions
            for context in contexts.values()
        ]
        apart = alone(engine, requests)
        equality.swap_often(engine, monkeypatch)
        answers = at_once(engine, requests)
        for context in contexts.values():
            engine.drop_context(context)
        assert engine._loop.call(engine._loop._device.held) == 0
    assert answers == apart
    both = list(zip(requests, answers, strict=True))
    for method, context in contexts.items():
        cache = kvjax.compress_prompt(model, document, configs[method])
        mine = [(asked, answer) for asked, answer in both if asked.context == context]
        out = kvjax.generate(
            model, [asked.tokens for asked, _ in mine], cache=cache, max_new_tokens=NEW, eos_ids=()
        )
        for (_, answer), tokens, log_probs in zip(mine, out.tokens, out.log_probs, strict=True):
            agreeing(answer, tokens, log_probs, 1 if quantize else NEW, case.hair)
