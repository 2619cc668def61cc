"""Serving with KV-Compress's own rule: what entries receive is added up among many requests."""

import threading

import numpy as np
import pytest
import served

import kvjax
from kvjax import CompressionConfig, Recompress
from kvjax.serve import Engine
from kvjax.serve.programs import no_compilation

NEW, EVERY = 30, 8
RULE = Recompress(every=EVERY, budget=20, window=4, sinks=0, scorer="squared-sum", layers="global")
PLAIN = CompressionConfig.named("kv-compress", 16)
ASK = {"max_new_tokens": NEW, "ignore_eos": True}
# Two rows fit that are promised all that they can come to hold.
SMALL = {"cache_bytes": 26_500, "rows": 3, "buckets": (64,), "max_new_tokens": NEW}


@pytest.mark.parametrize(
    "config",
    [PLAIN, pytest.param(CompressionConfig.named("kv-compress", 16, quantize="int8"),
                         marks=pytest.mark.slow)],
    ids=["plain", "int8"],
)  # fmt: skip
def test_at_once_as_alone_and_as_generate(model, prompts, config, monkeypatch):
    """Three evictions of each answer; rows come, go, and are swapped out in between.

    Slow: int8 compiles all programs once more.
    """
    rows = [*prompts, prompts[2][:33]]
    with Engine(model, None, config, recompress=RULE, **SMALL) as engine:
        device, loop = engine._loop._device, engine._loop
        with no_compilation():
            answers = engine.generate(rows, **ASK)
            alone = [engine.generate(row, **ASK)[0] for row in rows]
        assert answers == alone  # bit for bit
        assert engine.stats().evictions >= 3 * 8
        assert loop.call(device.held) == engine.stats().held_pages == 0
        assert swapped_in_the_middle(engine, rows, monkeypatch) == answers
    call = {"max_new_tokens": NEW, "eos_ids": (), "recompress": RULE}
    reference = kvjax.generate(model, rows, config, **call)
    assert [answer.tokens for answer in answers] == reference.tokens
    for answer, log_probs in zip(answers, reference.log_probs, strict=True):
        np.testing.assert_allclose(answer.log_probs, log_probs, atol=2e-5)


def swapped_in_the_middle(engine, rows, monkeypatch):
    """Answers of rows that went to the host's memory, sums and all, and came back."""
    loop, found = engine._loop, {}
    served.slow_down(engine, monkeypatch)

    def swap_all():
        jobs = list(loop._scheduler.running.values())
        # Past an eviction, and with tokens in the tail.
        if len(jobs) < 2 or not all(job.told > EVERY and job.tail for job in jobs):
            return False
        for job in jobs[::-1]:
            loop.swap_out(job)
        return True

    asked = threading.Thread(target=lambda: found.update(answers=engine.generate(rows, **ASK)))
    asked.start()
    while not loop.call(swap_all):
        assert asked.is_alive()
    asked.join()
    assert engine.stats().swaps >= 2
    return found["answers"]


def test_under_pressure_rows_keep_less_and_all_are_answered(model, prompts, monkeypatch):
    """Three rows where two fit: as many are answered at once, all of them to their end."""
    rows, running = [*prompts, prompts[2][:33], prompts[0][:50]], []
    with Engine(model, None, PLAIN, recompress=RULE, pressure="evict", **SMALL) as engine:
        device, loop = engine._loop._device, engine._loop
        decode = device.decode

        def look():
            """What is free is what the scheduler says, before every dispatch."""
            assert device.held() == device.shape.pages - loop._scheduler.free
            running.append(len(loop._scheduler.running))
            return decode()

        monkeypatch.setattr(device, "decode", look)
        with no_compilation():
            alone = engine.generate(rows[0], **ASK)
            assert engine.stats().forced_evictions == 0
            answers = engine.generate(rows, **ASK)
        assert [len(answer.tokens) for answer in answers] == [NEW] * 5
        assert {answer.finish_reason for answer in answers} == {"length"}
        assert max(running) == 3
        stats = engine.stats()
        assert stats.evictions >= stats.forced_evictions > 0
        assert loop.call(device.held) == stats.held_pages == 0
        assert engine.generate(rows[0], **ASK) == alone
    with pytest.raises(ValueError, match="pressure='evict', expected recompress with scorer="):
        Engine(model, None, PLAIN, pressure="evict", **SMALL)
