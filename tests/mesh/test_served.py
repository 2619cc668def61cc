"""Serving on eight virtual devices: pages split over the model's axis, the same tokens."""

import contextlib
from pathlib import Path

import numpy as np
import pytest

import kvjax
from kvjax import CompressionConfig, Recompress
from kvjax.models.checkpoints.weights import load_decoder
from kvjax.serve import Engine
from kvjax.serve.programs import no_compilation
from kvjax.sharding import make_mesh, place

FIXTURES = Path(__file__).parents[1] / "fixtures" / "hf"
ADA = CompressionConfig.named("ada-snapkv", 16)
EVERYWHERE = Recompress(every=8, budget=20, scorer="squared-sum", layers="global")


@pytest.mark.parametrize(
    "rule",
    [
        None,
        pytest.param(Recompress(every=8, budget=20), marks=pytest.mark.slow),
        pytest.param(EVERYWHERE, marks=pytest.mark.slow),
    ],
    ids=["kept", "evicted", "everywhere"],
)
def test_the_tokens_are_those_of_one_device(rule):
    """Slow: to evict on a mesh compiles for a minute, and what is compiled first has to be all."""
    model = load_decoder(FIXTURES / "llama2-gqa", progress=False)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 80, size).tolist() for size in (64, 41, 52)]
    call = {"max_new_tokens": 24, "eos_ids": (), "recompress": rule}
    reference = kvjax.generate(model, prompts, ADA, **call)
    with Engine(
        place(model, make_mesh(model=8)), None, ADA, cache_bytes=100_000, rows=2, buckets=(64,),
        max_new_tokens=24, tail_slots=8, recompress=rule, warm_up=rule is not None,
    ) as engine:  # fmt: skip
        slots, parts = engine._loop.call(lambda: parts_of(engine._loop._device))
        assert parts == {slots // 8}  # from the beginning: no device has room for all of it
        with contextlib.nullcontext() if rule is None else no_compilation():
            answers = engine.generate(prompts, ignore_eos=True)
        slots, parts = engine._loop.call(lambda: parts_of(engine._loop._device))
        assert parts == {slots // 8}
        assert engine._loop.call(engine._loop._device.held) == 0
    assert [answer.tokens for answer in answers] == reference.tokens


@pytest.mark.slow
def test_contexts_and_swaps_on_a_mesh(tmp_path):
    """What is compiled before the first request is all. Slow: twelve programs for eight devices."""
    model = load_decoder(FIXTURES / "llama2-gqa", progress=False)
    rng = np.random.default_rng(1)
    document, *questions = (rng.integers(3, 80, size).tolist() for size in (64, 9, 14))
    cache = kvjax.compress_prompt(model, document, ADA)
    with Engine(
        place(model, make_mesh(model=8)), None, ADA, cache_bytes=100_000, rows=2, buckets=(64,),
        question_buckets=(16,), max_new_tokens=24, tail_slots=8,
    ) as engine:  # fmt: skip
        with no_compilation():
            context = engine.add_context(document)
            asked = engine.generate(questions, context=context, ignore_eos=True)
            engine._loop.call(lambda: engine._loop.stats(True))
            answers = swapped(engine, lambda: engine.generate(document, ignore_eos=True))
            path = engine.save_context(context, tmp_path / "saved")
            engine.drop_context(context)
            context = engine.load_context(path)
            again = engine.generate(questions, context=context, ignore_eos=True)
            engine.drop_context(context)
        assert again == asked  # bit for bit
        assert engine._loop.call(engine._loop._device.held) == 0
    for question, answer in zip(questions, asked, strict=True):
        reference = kvjax.generate(model, question, cache=cache, max_new_tokens=24, eos_ids=())
        assert answer.tokens == reference.tokens[0]
    reference = kvjax.generate(model, document, ADA, max_new_tokens=24, eos_ids=())
    assert answers[0].tokens == reference.tokens[0]


def swapped(engine, ask):
    """What is answered while every row that has drawn 8 tokens goes out and comes back, once."""
    loop, left = engine._loop, set()
    admit = loop._admit

    def out_first():  # in the loop's thread, at the beginning of a round
        for job in [job for job in loop._scheduler.running.values() if job.told >= 8]:
            if job.number not in left:
                left.add(job.number)
                loop.swap_out(job)
        return admit()

    loop._admit = out_first
    found = ask()
    assert left
    return found


def parts_of(device) -> tuple[int, set[int]]:
    """Slots of the pool, and of each device's part; in the thread that gives pools away."""
    entries = device.state.pages.slots.entries
    return entries.shape[1], {shard.data.shape[1] for shard in entries.addressable_shards}


def test_rows_are_not_split_over_a_mesh():
    model = load_decoder(FIXTURES / "llama2-gqa", progress=False)
    with pytest.raises(ValueError, match="the model's mesh has data=2, expected 1"):
        Engine(place(model, make_mesh(data=2, model=2)), None, ADA, cache_bytes=100_000)
