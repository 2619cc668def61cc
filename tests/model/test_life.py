"""A cache's life in random order, against an oracle that holds everything and masks what is gone.

Documents are compressed, asked, continued, compressed again while an answer is decoded, saved,
loaded, and asked by several rows at once; any cache of any time may be taken up again.
"""

import os
import shutil
import tempfile
from pathlib import Path
from typing import ClassVar

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    multiple,
    rule,
    run_state_machine_as_test,
)
from life import Life, agree, born, budgeted, digest, evicted, gone_for_good, likely
from oracle import Oracle, Row

import kvjax
from kvjax import CompressionConfig, ConfigError, Recompress
from kvjax.generation.request import FULL, Options, Request
from kvjax.generation.stream import stages
from kvjax.models.checkpoints.weights import load_decoder

FIXTURES = Path(__file__).parents[1] / "fixtures" / "hf"
LONG = 48  # a bucket: the longer of two prompts has more than 32 tokens
NEW, EVERY = 9, 4  # an answer is compressed twice, and once more when its cache is handed back
LAST = 240  # of 256 positions; a cache with more is asked no further
BUDGET = 12
named = CompressionConfig.named
# Random scores divide budgets anyhow, and a seed changes them without a compilation.
ROW = {"scorer": "random", "window": 2}
CONFIGS = {
    "padded": named("ada-snapkv", BUDGET, layout="padded", **ROW),
    "packed": named("kv-compress", BUDGET, layout="packed", **ROW),
    "int8": named("joint-snapkv", BUDGET, quantize="int8", **ROW),
    "padded ratio": named("prefixkv", 0.5, layout="padded"),
    "packed ratio": named("prefixkv", 0.5, layout="packed"),
    "ratio of heads": named("kv-compress", 0.5, keep_ratio=True, **ROW),
}
BY_BUDGET = Recompress(every=EVERY, budget=2 * BUDGET)
BY_KEYS = Recompress(every=EVERY, budget=2 * BUDGET, scorer="key-diff", heads="uniform")
BY_RATIO = Recompress(every=EVERY)

seeds = st.integers(0, 2**16)
shorts = st.integers(2, LONG)
widths = st.tuples(st.integers(1, 5), st.integers(1, 5))
ends = st.integers(0, 2 * NEW)  # the answer's token that ends a row, if it has so many


Birth = tuple[str, int]  # of CONFIGS, and how many documents


class Machine(RuleBasedStateMachine):
    """Lives of two rows, or of one document that two rows ask about."""

    checkpoint: ClassVar[str] = "llama2-gqa"
    births: ClassVar[tuple[Birth, ...]] = (("packed", 2), ("int8", 2), ("padded ratio", 1))
    apart: ClassVar[bool] = False  # whether an answer without a cache is a program of its own
    evictions: ClassVar[tuple[Recompress, ...]] = (BY_BUDGET,)
    lives = Bundle("lives")
    ended: ClassVar[int] = 0

    def __init__(self):
        super().__init__()
        self.model, self.oracle = loaded(self.checkpoint)
        self.folder = Path(tempfile.mkdtemp())

    def teardown(self):
        shutil.rmtree(self.folder)
        # A process holds so many programs and no more: to load the next one ends it.
        Machine.ended += 1
        if Machine.ended % 25 == 0:
            jax.clear_caches()

    # ------------------------------------------------------------------------ births
    def compressed(self, name: str, count: int, seed: int, short: int) -> Life:
        config, prompts = CONFIGS[name], texts(seed, lengths(seed, short, count))
        cache = kvjax.compress_prompt(self.model, prompts, config, seed=seed)
        rows = tuple(born(self.oracle, prompt, cache, row)[0] for row, prompt in enumerate(prompts))
        budgeted(rows, [base(config, prompt) for prompt in prompts])
        rows = rows if count == 2 else (rows[0], rows[0].copy())
        return self.kept(cache, rows)

    @initialize(target=lives, birth=st.integers(0, 99), seed=seeds, short=shorts)
    def first(self, birth, seed, short):
        return self.compressed(*self.births[birth % len(self.births)], seed, short)

    @rule(target=lives, birth=st.integers(0, 99), seed=seeds, short=shorts)
    def compress(self, birth, seed, short):
        return self.compressed(*self.births[birth % len(self.births)], seed, short)

    # ------------------------------------------------------------------------ what follows
    def asked(self, life: Life, seed: int, sizes: tuple[int, int], end: int):
        """Questions, and a token that ends a row, as the oracle foresees the answer."""
        questions, row = texts(seed, sizes), life.rows[0].copy()
        token = int(row.feed(questions[0])[-1].argmax())
        for _ in range(min(end, NEW - 1)):
            token = int(row.feed([token])[-1].argmax())
        return questions, (token if end < NEW else 79,)

    @rule(target=lives, life=lives, seed=seeds, sizes=widths, end=ends, whole=st.booleans())
    def ask(self, life, seed, sizes, end, whole):
        """A question whose answer the cache is to hold, or not."""
        if full(life):
            return multiple()
        questions, eos = self.asked(life, seed, sizes, end)
        rules = {"max_new_tokens": NEW, "eos_ids": eos, "return_cache": whole or not self.apart}
        out = kvjax.generate(self.model, questions, cache=life.cache, **rules)
        np.testing.assert_array_equal(out.kept, of_prompt(life))
        assert out.cache_bytes == life.cache.nbytes
        rows = copies(life)
        for row, seen in enumerate(rows):
            tokens = out.tokens[row]
            found = seen.feed([*questions[row], *tokens])[sizes[row] - 1 : -1]
            likely(out.log_probs[row], tokens, found)
            assert len(tokens) == NEW or tokens[-1] == eos[0]
        assert digest(life.cache) == life.digest
        return self.kept(out.cache, rows) if whole else multiple()

    @rule(target=lives, life=lives, seed=seeds, sizes=widths, end=ends, which=st.integers(0, 99))
    def ask_and_compress(self, life, seed, sizes, end, which):
        """A question whose answer is compressed on the way, streamed and in one program."""
        if full(life):
            return multiple()
        by, rows = self.evictions[which % len(self.evictions)], copies(life)
        questions, eos = self.asked(life, seed, sizes, end)
        rules = {"max_new_tokens": NEW, "eos_ids": eos, "return_cache": True, "recompress": by}
        heads = self.model.config.num_layers * self.model.config.num_kv_heads
        if int(life.cache.counts.sum((1, 2)).max()) > heads * by.budget:  # an answer by ratio
            with pytest.raises(ConfigError, match="expected at least the"):
                kvjax.generate(self.model, questions, cache=life.cache, **rules)
            return multiple()
        drawn, expected = self.followed(life, rows, questions, eos, by)
        out = kvjax.generate(self.model, questions, cache=life.cache, **rules)
        np.testing.assert_array_equal(out.kept, of_prompt(life))
        assert out.cache_bytes == out.cache.nbytes
        assert out.tokens == drawn
        evicted(out.cache, rows, by.recent, by.sinks)
        for row, seen in enumerate(rows):
            likely(out.log_probs[row], drawn[row], expected[row])
            seen.feed(drawn[row][-1:])
        assert digest(life.cache) == life.digest
        return self.kept(out.cache, rows)

    def followed(self, life, rows, questions, eos, by):
        """The tokens of a stream, and the oracle's log-probs before each.

        What is evicted between two steps is read from the cache of the second. The rows have then
        seen all but the last token.
        """
        options = Options(max_new_tokens=NEW, eos_ids=eos, cache=life.cache, recompress=by)
        request = Request.make(self.model, questions, FULL, options)
        found = [[seen.feed(mine)[-1:]] for seen, mine in zip(rows, questions, strict=True)]
        start = [seen.seen for seen in rows]
        for step, (_, state) in enumerate(stages(self.model, request, NEW)):
            # A step runs what the one before has drawn, and from the third on it evicts before.
            if step == 0 and life.cache.keep_ratio:
                gone_for_good(state.cache, rows)
            elif step < 2:
                agree(state.cache, rows)
            else:
                evicted(state.cache, rows, by.recent, by.sinks)
            answers, after = np.asarray(state.answer.tokens), state.cache.next_positions
            for row, seen in enumerate(rows):
                fed = answers[row, seen.seen - start[row] : int(after[row]) - start[row]]
                if len(fed):
                    found[row].append(seen.feed(fed.tolist()))
        drawn = [answer[answer >= 0].tolist() for answer in answers]
        return drawn, [np.concatenate(parts) for parts in found]

    @rule(target=lives, life=lives)
    def save_and_load(self, life):
        path = kvjax.save_cache(self.folder / "cache", life.cache, self.model)
        cache = kvjax.load_cache(path, self.model)
        assert jax.tree.structure(cache) == jax.tree.structure(life.cache)
        assert digest(cache) == life.digest
        return Life(cache, life.digest, life.rows)

    def kept(self, cache, rows) -> Life:
        """A life that goes on, if cache and oracle agree."""
        agree(cache, rows)
        tail, prompts = cache.tail, [row.prompt for row in rows]
        assert cache.prompt_lengths.tolist() == prompts[: cache.batch]
        assert cache.next_positions.tolist() == [row.seen for row in rows][: cache.batch]
        filled = np.asarray(tail.positions) >= 0
        assert (np.diff(filled.astype(int), axis=1) <= 0).all()  # no holes
        assert int(tail.cursor) == filled.sum(1).max()
        return Life(cache, digest(cache), rows)


class EveryBirth(Machine):
    """The same with every layout and kind of budget."""

    births = tuple((name, count) for name in CONFIGS for count in (1, 2))
    evictions = BY_BUDGET, BY_KEYS
    apart = True
    lives = Machine.lives

    @rule(target=lives, seed=seeds, short=shorts)
    def answer_by_ratio(self, seed, short):
        """PrefixKV's ratio kept by evicting; the first eviction is that of the whole answer."""
        prompts = texts(seed, lengths(seed, short, 2))
        config, new = CONFIGS["packed ratio"], 1 + EVERY
        rules = {"max_new_tokens": new, "eos_ids": (79,), "recompress": BY_RATIO}
        out = kvjax.generate(self.model, prompts, config, **rules, return_cache=True)
        compressed = kvjax.compress_prompt(self.model, prompts, config)
        rows = []
        for row, prompt in enumerate(prompts):
            seen, after = born(self.oracle, prompt, compressed, row)
            # Until the tail is compressed the prompt's entries are seen whole.
            seen.ratio, kept, tokens = None, seen.ratio, out.tokens[row]
            found = [after[None], seen.feed(tokens[:-1])] if len(tokens) > 1 else [after[None]]
            likely(out.log_probs[row], tokens, np.concatenate(found))
            seen.ratio = kept
            seen.settle()
            seen.feed(tokens[-1:])
            rows.append(seen)
        return self.kept(out.cache, tuple(rows))


class EveryWindow(EveryBirth):
    """The same of a model with sliding windows."""

    checkpoint = "qwen2"


def lengths(seed: int, short: int, count: int) -> list[int]:
    """A length of the longest bucket, and before or after it any other."""
    long = 33 + seed % (LONG - 32)
    return [long] if count == 1 else [long, short] if seed % 2 else [short, long]


def texts(seed: int, sizes) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 79, size).tolist() for size in sizes]


def base(config: CompressionConfig, prompt: list[int]) -> int:
    """Entries of each head, on average."""
    if isinstance(config.budget, int):
        return min(config.budget, len(prompt))
    return min(len(prompt), max(2, int(len(prompt) * config.budget)))


def of_prompt(life: Life) -> list:
    return [row.held[:, :, : row.prompt].sum(-1).tolist() for row in life.rows]


def copies(life: Life) -> tuple[Row, ...]:
    return tuple(row.copy() for row in life.rows)


def full(life: Life) -> bool:
    return max(row.seen for row in life.rows) + 5 + NEW > LAST


_loaded: dict[str, tuple] = {}


def loaded(checkpoint: str) -> tuple:
    """A model and its oracle, read once."""
    if checkpoint not in _loaded:
        model = load_decoder(FIXTURES / checkpoint, progress=False)
        _loaded[checkpoint] = model, Oracle(model)
    return _loaded[checkpoint]


RULES = {
    "deadline": None,
    "derandomize": True,
    "suppress_health_check": list(HealthCheck),
}

TestLife = Machine.TestCase  # slow: half a minute, as a life takes many programs
TestLife.settings = settings(max_examples=4, stateful_step_count=8, **RULES)


@pytest.mark.slow
@pytest.mark.parametrize(("machine", "share"), [(EveryBirth, 0.8), (EveryWindow, 0.2)])
def test_many_lives(machine, share):
    """`make lives`.

    Slow: many minutes, a hundred programs for all that a cache can look like.
    """
    if "LIVES" not in os.environ:
        pytest.skip("takes many minutes: `make lives`")
    lives = int(share * int(os.environ["LIVES"]))
    rules = settings(max_examples=lives, stateful_step_count=8, **RULES)
    run_state_machine_as_test(machine, settings=rules)
