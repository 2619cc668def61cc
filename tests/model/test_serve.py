"""Serving: what many requests get at once is what each gets alone, and what `generate` gives."""

import asyncio
import threading

import jax
import numpy as np
import pytest
import served

import kvjax
from kvjax import CompressionConfig, Recompress, Sampling
from kvjax.serve import Engine
from kvjax.serve.loop import _Command
from kvjax.serve.programs import no_compilation

NEW, SMALL = 44, 16
METHODS = {
    "ada-snapkv": CompressionConfig.named("ada-snapkv", SMALL),
    "joint-snapkv": CompressionConfig.named("joint-snapkv", SMALL),
    "kvzip": CompressionConfig.named("kvzip", 0.4),
    "full": CompressionConfig.named("full"),
}
WARM = Sampling(temperature=0.8, top_k=20, top_p=0.9)


@pytest.fixture(scope="module")
def engine(model):
    """Three rows, a pool that three whole prompts do not fit in, four methods, and contexts."""
    with Engine(
        model, None, METHODS, cache_bytes=105_000, rows=3, buckets=(64,), question_buckets=(16,),
        max_new_tokens=NEW, tail_slots=16, top_logprobs=2,
    ) as engine:  # fmt: skip
        yield engine


def many(prompts):
    """More prompts than there are rows, of all lengths."""
    return [*prompts, prompts[0][:1], prompts[1][:17], prompts[2][:33]]


def close_to(answers, reference):
    assert [answer.tokens for answer in answers] == reference.tokens
    for answer, log_probs in zip(answers, reference.log_probs, strict=True):
        np.testing.assert_allclose(answer.log_probs, log_probs, atol=2e-5)


def held(engine):
    """Pages that somebody holds: as the scheduler has promised them, and as the device counts."""
    stats = engine.stats()
    return stats.held_pages, engine._loop.call(engine._loop._device.held)


@pytest.mark.parametrize("method", METHODS)
def test_at_once_as_alone_and_as_generate(model, engine, prompts, method):
    rows = many(prompts)
    ask = {"method": method, "max_new_tokens": NEW, "ignore_eos": True}
    with no_compilation():
        answers = engine.generate(rows, **ask)
        alone = [engine.generate(row, **ask)[0] for row in rows]
    assert answers == alone  # bit for bit
    close_to(answers, kvjax.generate(model, rows, METHODS[method], max_new_tokens=NEW, eos_ids=()))
    assert held(engine) == (0, 0)


def test_a_draw_depends_on_its_own_seed_alone(model, engine, prompts):
    seeds = list(range(6))
    with no_compilation():
        answers = engine.generate(many(prompts), sampling=WARM, seed=seeds, max_new_tokens=9)
    alone = engine.generate(prompts[1], sampling=WARM, seed=1, max_new_tokens=9)
    assert answers[1] == alone[0]
    reference = kvjax.generate(
        model, many(prompts), METHODS["ada-snapkv"], sampling=WARM, seed=seeds, max_new_tokens=9
    )
    close_to(answers, reference)
    assert len({tuple(answer.tokens) for answer in answers}) == 6


def test_tokens_that_were_there_are_made_less_likely(model, engine, prompts):
    """Beside rows without a penalty; of a context the question alone counts, as in `generate`."""
    rules = Sampling(repetition_penalty=1.7)
    ask = {"max_new_tokens": 20, "ignore_eos": True}
    plain = engine.generate(prompts, **ask)

    async def mixed():
        steps = [
            engine.submit(prompt, sampling=rules if index else None, **ask)
            for index, prompt in enumerate(prompts)
        ]
        return await asyncio.gather(*[tokens_of(one) for one in steps])

    async def tokens_of(steps):
        return [token async for step in steps for token in step.tokens]

    with no_compilation():
        first, *others = asyncio.run(mixed())
    reference = kvjax.generate(
        model, prompts, METHODS["ada-snapkv"], sampling=rules, max_new_tokens=20, eos_ids=()
    )
    assert first == plain[0].tokens
    assert others == reference.tokens[1:]
    assert others != [answer.tokens for answer in plain[1:]]
    context = engine.add_context(prompts[0], method="full")
    cache = kvjax.compress_prompt(model, prompts[0], METHODS["full"])
    answers = engine.generate(prompts[1][:9], context=context, sampling=rules, **ask)
    engine.drop_context(context)
    close_to(
        answers,
        kvjax.generate(
            model, prompts[1][:9], cache=cache, sampling=rules, max_new_tokens=20, eos_ids=()
        ),
    )


def test_a_request_may_keep_less(model, engine, prompts):
    with no_compilation():
        answers = engine.generate(prompts, budget=8, max_new_tokens=20, ignore_eos=True)
    config = CompressionConfig.named("ada-snapkv", 8)
    close_to(answers, kvjax.generate(model, prompts, config, max_new_tokens=20, eos_ids=()))


def test_the_end_of_an_answer(model, prompts, engine):
    reference = kvjax.generate(model, prompts, METHODS["ada-snapkv"], max_new_tokens=NEW)
    answers = engine.generate(prompts)
    close_to(answers, reference)
    for answer, prompt in zip(answers, prompts, strict=True):
        ended = answer.tokens[-1] in model.config.eos_token_ids
        assert answer.finish_reason == ("stop" if ended else "length")
        assert answer.usage.prompt_tokens == len(prompt)
        assert answer.usage.completion_tokens == len(answer.tokens)
    likeliest = engine.generate(prompts, logprobs=2, max_new_tokens=5)
    for answer in likeliest:
        for token, log_prob, top in zip(answer.tokens, answer.log_probs, answer.top, strict=True):
            assert next(iter(top)) == token  # greedy
            assert top[token] == log_prob == max(top.values())


def test_a_shared_context_is_compressed_once(model, engine, prompts, tmp_path):
    questions = [prompts[1][:3], prompts[1][:16], prompts[2][:9], prompts[2][:1]]
    with no_compilation():
        context = engine.add_context(prompts[0], method="joint-snapkv")
        before = held(engine)
        assert engine.contexts()[0].tokens == 64
        answers = engine.generate(questions, context=context, max_new_tokens=30, ignore_eos=True)
        alone = engine.generate(questions[1], context=context, max_new_tokens=30, ignore_eos=True)
        assert held(engine) == before
        path = engine.save_context(context, tmp_path / "saved")
        engine.drop_context(context)
        loaded = engine.load_context(path)
        again = engine.generate(questions[1], context=loaded, max_new_tokens=30, ignore_eos=True)
        engine.drop_context(loaded)
    assert held(engine) == (0, 0)
    assert answers[1] == alone[0] == again[0]
    cache = kvjax.compress_prompt(model, prompts[0], METHODS["joint-snapkv"])
    for question, answer in zip(questions, answers, strict=True):
        reference = kvjax.generate(model, question, cache=cache, max_new_tokens=30, eos_ids=())
        close_to([answer], reference)
    with pytest.raises(ValueError, match="expected one of"):
        engine.generate(questions, context=context)


@pytest.mark.parametrize("about", ["full", "context"])
def test_swapped_out_and_back(engine, prompts, about, monkeypatch):
    """Rows go to the host's memory in the middle of their answers, and go on where they were."""
    ask = {"method": "full", "max_new_tokens": NEW, "ignore_eos": True}
    if about == "context":
        prompts = [prompt[:16] for prompt in prompts]
        ask |= {"method": None, "context": engine.add_context(prompts[0] * 4)}
    alone = [engine.generate(row, **ask)[0] for row in prompts]
    swaps, loop, found = engine.stats().swaps, engine._loop, {}
    served.slow_down(engine, monkeypatch)

    def swap_all():
        jobs = list(loop._scheduler.running.values())
        if len(jobs) < 2 or min(job.tail for job in jobs) == 0:
            return False
        for job in jobs[::-1]:
            loop.swap_out(job)
        return True

    with no_compilation():
        asked = threading.Thread(
            target=lambda: found.update(answers=engine.generate(prompts, **ask))
        )
        asked.start()
        while not loop.call(swap_all):
            assert asked.is_alive()
        asked.join()
    assert found["answers"] == alone
    assert engine.stats().swaps >= swaps + 2
    if about == "context":
        engine.drop_context(ask["context"])
    assert held(engine) == (0, 0)


def test_a_client_that_goes_away_frees_its_pages(engine, prompts, monkeypatch):
    device, loop = engine._loop._device, engine._loop
    dispatches, before = [], []
    served.slow_down(engine, monkeypatch)
    decode, give_up = device.decode, loop.give_up
    monkeypatch.setattr(device, "decode", lambda: (dispatches.append(0), decode())[1])
    monkeypatch.setattr(loop, "give_up", lambda job: (before.append(len(dispatches)), give_up(job)))

    async def leave():
        steps = engine.submit(prompts[0], ignore_eos=True, method="full")
        await anext(steps)
        await steps.aclose()
        while loop.call(lambda: bool(loop._scheduler.running)):
            pass
        assert len(dispatches) <= before[0] + 2
        task = asyncio.create_task(anext(engine.submit(prompts[1], ignore_eos=True)))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        text = [step async for step in engine.submit(prompts[2], max_new_tokens=20)]
        assert [step.finish_reason is None for step in text[:-1]] == [True] * (len(text) - 1)
        assert sum(len(step.tokens) for step in text) == text[-1].usage.completion_tokens

    aborted = engine.stats().aborted
    asyncio.run(leave())
    assert engine.stats().aborted == aborted + 2
    assert held(engine) == (0, 0)


def test_stats_say_who_holds_which_pages(engine, prompts, monkeypatch):
    served.slow_down(engine, monkeypatch)
    loop = engine._loop

    def look():
        stats = loop.stats(True)
        return stats if stats.running > 1 else None

    found: list = []
    asked = threading.Thread(target=lambda: found.extend(engine.generate(prompts)))
    asked.start()
    while (stats := loop.call(look)) is None:
        assert asked.is_alive()
    asked.join()
    pages = [page for holder in stats.holders for layer in holder.pages for page in layer]
    assert len(set(pages)) == len(pages) <= stats.held_pages
    assert stats.free_pages + stats.held_pages + stats.shared_pages == stats.pages


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"method": "nothing"}, "method='nothing', expected one of ada-snapkv"),
        ({"budget": 17}, "budget=17 is 17 entries a head of 64 tokens, expected at most the 16"),
        ({"method": "full", "budget": 8}, "budget=8 with method 'full', expected None"),
        ({"max_new_tokens": NEW + 1}, "max_new_tokens=45, expected an integer from 1 to 44"),
        ({"logprobs": 3}, "logprobs=3, expected an integer from 0 to 2"),
        ({"stop": "x"}, "stop=.* needs a tokenizer, got tokenizer=None"),
        ({"stop": [""]}, r"stop=\[''\], expected strings that are not empty"),
        ({"seed": 2**32}, "seed=4294967296, expected an integer from 0 to 4294967295"),
        ({"seed": -1}, "seed=-1, expected an integer from 0"),
        ({"context": "c"}, "context='c', expected one of"),
    ],
)
def test_a_wrong_request_is_one_sentence(engine, prompts, options, told):
    with pytest.raises(ValueError, match=told):
        engine.submit(prompts[0], **options)


def test_what_can_never_fit_is_refused(model, engine, prompts):
    with pytest.raises(ValueError, match="prompt of 65 tokens, expected at most 64"):
        engine.submit([*prompts[0], 1])
    small = {"rows": 1, "buckets": (64,), "tail_slots": 16, "warm_up": False}
    tight = Engine(model, None, "full", cache_bytes=30_000, max_new_tokens=NEW, **small)
    with tight, pytest.raises(ValueError, match="may come to hold 28 pages, expected at most"):
        tight.submit(prompts[0])
    with pytest.raises(ValueError, match="cache_bytes=1000, expected at least"):
        Engine(model, None, "full", cache_bytes=1000, **small)


def test_tokens_do_not_wait_for_anothers_prompt(engine, prompts, monkeypatch):
    """Whatever was drawn has been handed out before a prompt is read."""
    device, loop, waiting = engine._loop._device, engine._loop, []
    prefill = device.prefill

    def looked(job):
        waiting.append(len(loop._pending))
        return prefill(job)

    monkeypatch.setattr(device, "prefill", looked)
    engine.generate(many(prompts), ignore_eos=True)
    assert waiting == [0] * 6


def test_tokens_do_not_wait_for_a_context(engine, prompts, monkeypatch):
    device, loop, waiting = engine._loop._device, engine._loop, []
    served.slow_down(engine, monkeypatch)
    keep = device.keep
    monkeypatch.setattr(
        device, "keep", lambda *text: (waiting.append(len(loop._pending)), keep(*text))[1]
    )
    asked = threading.Thread(target=lambda: engine.generate(prompts, ignore_eos=True))
    asked.start()
    served.until(lambda: engine.stats().running)
    engine.drop_context(engine.add_context(prompts[0]))
    asked.join()
    assert waiting == [0]


def test_a_question_needs_no_pages_that_it_shares(engine, prompts):
    contexts = [engine.add_context(prompts[0], method="full") for _ in range(3)]
    shared = engine.contexts()[0].pages
    own = engine._menu.forked_pages(engine._menu.growth(NEW) + 16)
    assert own <= engine.stats().free_pages < own + shared
    assert engine.generate([prompts[1][:16]], context=contexts[0])[0].tokens
    for context in contexts:
        engine.drop_context(context)


def test_a_client_whose_event_loop_closes_ends_no_other(engine, prompts, monkeypatch):
    """Even where it closes between a look at it and the push."""

    async def leave_at_once():
        steps = engine.submit(prompts[0], ignore_eos=True)
        await anext(steps)
        return steps  # not closed: the server goes on pushing

    runner = asyncio.new_event_loop()
    steps = runner.run_until_complete(leave_at_once())
    runner.close()
    with monkeypatch.context() as seen:
        seen.setattr(runner, "is_closed", lambda: False)
        assert engine.generate(prompts[1], max_new_tokens=NEW)[0].finish_reason is not None
    del steps


def test_nobody_waits_for_a_loop_that_has_ended(model, prompts):
    engine = Engine(model, None, "full", cache_bytes=200_000, rows=3, buckets=(64,),
                    max_new_tokens=NEW, tail_slots=16, top_logprobs=2, warm_up=False)  # fmt: skip
    loop, held, asked, failed = engine._loop, threading.Event(), threading.Event(), []

    def ask():
        try:
            engine.stats()
        except Exception as error:
            failed.append(error)

    def fail():
        raise OSError("no such device")

    busy = threading.Thread(target=lambda: loop.call(lambda: (asked.set(), held.wait())))
    busy.start()
    asked.wait()  # the loop's thread is in it: what comes now is obeyed together
    with loop._changed:
        loop._commands.append(_Command(fail))
    asker = threading.Thread(target=ask)
    asker.start()
    while len(loop._commands) < 2:
        pass
    held.set()
    asker.join(60)
    assert [type(error) for error in failed] == [OSError]
    busy.join()
    engine.close()


def test_queries_that_a_rule_remembers_count_as_memory(model):
    """The pool and the tails, all that they hold, take no more than was given."""
    with Engine(
        model, None, METHODS["ada-snapkv"], cache_bytes=400_000, rows=8, buckets=(64,),
        max_new_tokens=NEW, recompress=Recompress(every=32, budget=64), warm_up=False,
    ) as engine:  # fmt: skip
        state = engine._loop.call(lambda: engine._loop._device.state)
        pools = state.pages.slots.entries, state.pages.slots.owners, state.pages.slots.positions
        tails = state.tail.keys, state.tail.values, state.tail.queries
        assert state.tail.queries
        size = sum(x.nbytes for x in jax.tree.leaves((pools, tails)))
        assert 380_000 < size <= 400_000


def test_drained_and_closed(model, prompts):
    engine = Engine(model, None, "full", cache_bytes=200_000, rows=3, buckets=(64,),
                    max_new_tokens=NEW, tail_slots=16, top_logprobs=2, warm_up=False)  # fmt: skip

    async def run():
        steps = engine.submit(prompts[0])
        first = await anext(steps)
        await engine.drain()
        rest = [step async for step in steps]
        with pytest.raises(RuntimeError, match="closed, or about to be"):
            await anext(engine.submit(prompts[1]))
        return [first, *rest]

    assert asyncio.run(run())[-1].finish_reason is not None
    engine.close()
    with pytest.raises(RuntimeError, match="the engine is closed"):
        engine.stats()


@pytest.mark.parametrize(
    "method", ["ada-snapkv", pytest.param("joint-snapkv", marks=pytest.mark.slow)]
)
def test_answers_that_are_compressed_while_they_are_drawn(model, prompts, method):
    """Evicted in place, row by row: as `generate(recompress=)` does it, alone and in company.

    Slow: a second method compiles both ways of answering once more.
    """
    rule, config = Recompress(every=8, budget=20), METHODS[method]
    rows, ask = many(prompts), {"max_new_tokens": NEW, "ignore_eos": True}
    with Engine(
        model, None, config, cache_bytes=60_000, rows=3, buckets=(64,), max_new_tokens=NEW,
        recompress=rule,
    ) as engine:  # fmt: skip
        with no_compilation():
            answers = engine.generate(rows, **ask)
            alone = engine.generate(rows[2], **ask)
        assert answers[2] == alone[0]
        assert engine.stats().evictions > 20
        assert held(engine) == (0, 0)
    call = {"max_new_tokens": NEW, "eos_ids": (), "recompress": rule}
    close_to(answers, kvjax.generate(model, rows, config, **call))
