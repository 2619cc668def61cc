"""Contexts of a server: a limit of bytes, files, and what is left when one cannot be read."""

import asyncio
import contextlib
import dataclasses

import pytest
import served

import kvjax
from kvjax.models.checkpoints.weights import load_decoder
from kvjax.serve import Engine
from kvjax.serve.contexts import InUse, Kept, leaving
from kvjax.serve.programs import no_compilation
from kvjax.serve.shelf import Shelf

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


# ---------------------------------------------------------------------------- on disk
def answers_of(engine, context):
    asked = {"context": context, "max_new_tokens": 12, "ignore_eos": True}
    return engine.generate(["so why", "w20 w30 why"], **asked)


@pytest.mark.parametrize("method", ["full", "key-diff"])
def test_a_context_saved_is_the_context_itself(engine, tmp_path, method):
    name = engine.add_context(TEXT, method=method)
    before, path = answers_of(engine, name), tmp_path / "saved"
    assert engine.save_context(name, path) == path
    again = engine.load_context(path)
    assert answers_of(engine, again) == before  # bit for bit
    told = {context.id: context for context in engine.contexts()}
    assert (told[again].method, told[again].tokens) == (method, told[name].tokens)
    for each in (name, again):
        engine.drop_context(each)
    cache = kvjax.load_cache(path, engine.model)
    for question, answer in zip(["so why", "w20 w30 why"], before, strict=True):
        out = kvjax.generate(
            engine.model, question, cache=cache, max_new_tokens=12, eos_ids=(),
            tokenizer=engine.tokenizer,
        )  # fmt: skip
        assert out.tokens[0] == answer.tokens


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_a_saved_cache_becomes_a_context(engine, tmp_path, layout):
    config = kvjax.CompressionConfig.named("key-diff", budget=24)
    config = dataclasses.replace(config, layout=layout)
    cache = kvjax.compress_prompt(engine.model, TEXT, config, tokenizer=engine.tokenizer)
    path = kvjax.save_cache(tmp_path / "saved", cache, engine.model, config)
    loaded, made = engine.load_context(path), engine.add_context(TEXT, method="key-diff")
    ours, theirs = answers_of(engine, loaded), answers_of(engine, made)
    assert [one.tokens for one in ours] == [one.tokens for one in theirs]
    for each in (loaded, made):
        engine.drop_context(each)
    asked = kvjax.generate(
        engine.model, "so", cache=cache, max_new_tokens=3, tokenizer=engine.tokenizer,
        return_cache=True,
    )  # fmt: skip
    kvjax.save_cache(path, asked.cache, engine.model)
    with pytest.raises(ValueError, match="tokens in its tail, expected one of compress_prompt"):
        engine.load_context(path)
    assert engine.stats().shared_pages == 0


def test_contexts_come_back_when_they_are_asked(engine, tmp_path, monkeypatch):
    """After they were dropped for others, and in another server over the same folder."""

    def served_from(folder):
        shelf = Shelf(engine.model, engine._menu, engine._loop, folder)
        monkeypatch.setattr(engine, "_shelf", shelf)
        return shelf

    served_from(tmp_path)
    name = engine.add_context(TEXT, method="key-diff")
    before = answers_of(engine, name)
    engine._loop.call(lambda: engine._loop.drop_context(name))  # as the limit does
    assert [(one.id, one.pages, one.saved) for one in engine.contexts()] == [(name, 0, True)]
    assert answers_of(engine, name) == before
    engine._loop.call(lambda: engine._loop.drop_context(name))

    path = tmp_path / f"{name}.kvjax"
    (tmp_path / f"{name}.kvjax.part").write_bytes(b"half")
    (tmp_path / "context-0123456789abcdef.kvjax").write_bytes(b"no cache")
    (tmp_path / "notes.txt").write_text("not ours")
    shelf = served_from(tmp_path)
    assert len(shelf.refused) == 1
    assert "0123456789abcdef.kvjax is damaged" in shelf.refused[0]
    assert not (tmp_path / f"{name}.kvjax.part").exists()
    assert answers_of(engine, name) == before
    engine._loop.call(lambda: engine._loop.drop_context(name))

    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    app = served.app(engine)
    told = served.call(app, "POST", "/v1/completions", {"prompt": "so", "context": name})
    assert told.status == 404
    assert "checksum differs" in told.sentence
    assert str(tmp_path) not in told.sentence
    for id in ("../x", "context-0123456789abcdef", f"{name}.kvjax", f"../{tmp_path.name}/{name}"):
        told = served.call(app, "POST", "/v1/completions", {"prompt": "so", "context": id})
        assert told.status == 404
    assert served.call(app, "DELETE", f"/v1/contexts/{name}").json["deleted"]
    assert not path.exists()
    assert (tmp_path / "notes.txt").exists()
    assert engine.stats().shared_pages == 0


def test_nothing_is_compiled_for_a_context_that_comes_back(engine, tmp_path, monkeypatch):
    """Of a length that nothing was compiled for before."""
    shelf = Shelf(engine.model, engine._menu, engine._loop, tmp_path)
    monkeypatch.setattr(engine, "_shelf", shelf)
    engine.drop_context(engine.add_context(TEXT, method="full"))
    for text in (TEXT, " ".join(TEXT.split()[:21])):
        with contextlib.nullcontext() if text == TEXT else no_compilation():
            name = engine.add_context(text, method="full")
            before = answers_of(engine, name)
            engine._loop.call(lambda: engine._loop.drop_context(name))  # noqa: B023
            assert answers_of(engine, name) == before
            engine.drop_context(name)


def test_a_context_whose_place_was_taken_while_it_is_written(engine, tmp_path, monkeypatch):
    """It lies on disk all the same, and comes back; nothing is left where it cannot be written."""
    shelf = Shelf(engine.model, engine._menu, engine._loop, tmp_path)
    monkeypatch.setattr(engine, "_shelf", shelf)
    write = shelf._write

    def late(path, slots, kept):
        (name,) = engine._loop.contexts
        engine._loop.call(lambda: engine._loop.drop_context(name))
        return write(path, slots, kept)

    monkeypatch.setattr(shelf, "_write", late)
    name = engine.add_context(TEXT, method="full")
    assert [(one.id, one.pages) for one in engine.contexts()] == [(name, 0)]
    assert len(answers_of(engine, name)) == 2
    engine.drop_context(name)
    tmp_path.rmdir()
    for writes in (write, late):
        monkeypatch.setattr(shelf, "_write", writes)
        with pytest.raises(ValueError, match="a file in a folder that exists"):
            engine.add_context(TEXT, method="full")
        assert (engine.contexts(), engine.stats().shared_pages) == ((), 0)


def test_entries_of_8_bits_are_saved_with_their_scales(tmp_path):
    config = kvjax.CompressionConfig.named("key-diff", budget=24)
    methods = {"key-diff": dataclasses.replace(config, quantize="int8")}
    model = load_decoder(served.WEIGHTS, progress=False)
    settings = {"cache_bytes": 2**18, "rows": 2, "buckets": (64,), "max_new_tokens": 16}
    with Engine(
        model, served.words(None), methods, **settings, question_buckets=(32,), warm_up=False
    ) as made:
        name = made.add_context(TEXT)
        again = made.load_context(made.save_context(name, tmp_path / "saved"))
        assert answers_of(made, again) == answers_of(made, name)
    with pytest.raises(ValueError, match=r"beside question_buckets=\(\)"):
        Engine(model, None, methods, **settings, contexts_dir=tmp_path, warm_up=False)


def test_a_folder_that_cannot_be_had_is_one_sentence(engine, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"contexts_dir='.*file' cannot be used"):
        Shelf(engine.model, engine._menu, engine._loop, tmp_path / "file")


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
