"""Contexts of a server: a limit of bytes, and what is left when one cannot be read."""

import asyncio

import pytest
import served

from kvjax.serve.contexts import InUse, Kept, leaving

TEXT = " ".join(f"w{number}" for number in range(20, 50))


@pytest.fixture(scope="module")
def engine():
    with served.engine(cache_bytes=2**18) as made:
        yield made


@pytest.fixture
def limited(engine, monkeypatch):
    """Contexts of the text may have room for two of them."""
    name = engine.add_context(TEXT, method="full")
    size = engine.contexts()[0].bytes
    engine.drop_context(name)
    monkeypatch.setattr(engine._loop, "_context_bytes", 2 * size)
    yield engine
    for context in engine.contexts():
        engine.drop_context(context.id)


def test_pages_of_a_context_that_cannot_be_read_come_back(engine, monkeypatch):
    before = engine.stats().free_pages

    def fail(*_):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(engine._loop._device, "keep", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            engine.add_context(TEXT, method="full")
    assert engine.stats().free_pages == before
    assert engine.stats().shared_pages == 0
    engine.drop_context(engine.add_context(TEXT, method="full"))
    assert engine.stats().free_pages == before


def test_the_context_that_was_asked_longest_ago_leaves(limited):
    dropped = limited.stats().contexts_dropped
    first, second = (limited.add_context(TEXT, method="full") for _ in range(2))
    assert [context.id for context in limited.contexts()] == [first, second]
    limited.generate("so why", context=first, max_new_tokens=2)
    third = limited.add_context(TEXT, method="full")
    held = limited.contexts()
    assert [context.id for context in held] == [first, third]
    assert held[0].used <= held[1].used
    assert sum(context.bytes for context in held) <= limited._loop._context_bytes
    assert limited.stats().contexts_dropped == dropped + 1
    with pytest.raises(ValueError, match=f"context='{second}', expected one of"):
        limited.submit("so", context=second)


def test_a_context_in_use_stays(limited, monkeypatch):
    app = served.app(limited)
    names = [limited.add_context(TEXT, method="full") for _ in range(2)]
    served.slow_down(limited, monkeypatch)
    asked = {"max_new_tokens": 40, "ignore_eos": True}

    async def both():
        steps = [limited.submit("so why", context=name, **asked) for name in names]
        for each in steps:
            await anext(each)
        body = {"text": TEXT, "method": "full"}
        refused = await served.exchange(app, "POST", "/v1/contexts", body)
        for each in steps:
            await each.aclose()
        return refused

    refused = asyncio.run(both())
    assert refused.status == 409
    assert "those leave that are being asked" in refused.sentence
    assert {context.id for context in limited.contexts()} == set(names)


def test_one_that_can_never_fit_is_refused(limited, monkeypatch):
    monkeypatch.setattr(limited._loop, "_context_bytes", 100)
    told = served.call(served.app(limited), "POST", "/v1/contexts", {"text": TEXT})
    assert (told.status, "expected at most 100 (context_bytes)" in told.sentence) == (400, True)


def test_who_leaves():
    sizes = {"a": 2, "b": 3, "c": 1}
    kept = {name: Kept(None, "full", (), 1, pages, 1) for name, pages in sizes.items()}
    nobody = dict.fromkeys("abc", 0)
    assert leaving(kept, 9, 10, None, nobody.__getitem__) == []
    assert leaving(kept, 2, 10, 80, nobody.__getitem__) == []
    assert leaving(kept, 2, 10, 79, nobody.__getitem__) == ["a"]
    assert leaving(kept, 2, 10, 79, (nobody | {"a": 1}).__getitem__) == ["b"]
    assert leaving(kept, 7, 10, 79, nobody.__getitem__) == ["a", "b", "c"]
    with pytest.raises(InUse, match="needs 21 bytes more"):
        leaving(kept, 7, 10, 79, (nobody | {"b": 1}).__getitem__)
