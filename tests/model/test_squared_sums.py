"""KV-Compress's eviction while decoding, beside a decoder in float64 that adds and sorts.

The oracle is Rehg 2024 (arXiv 2410.00161), sections 3.2 and 3.3, with pages of one slot.
"""

import dataclasses

import numpy as np
import pytest
from life import likely, stored
from oracle import Oracle, Row

import kvjax
from kvjax import CompressionConfig, Recompress

NEW, EVERY, WINDOW, BUDGET = 30, 8, 4, 20
KVC = CompressionConfig.named("kv-compress", 16)
RULE = Recompress(
    every=EVERY, budget=BUDGET, window=WINDOW, sinks=0, scorer="squared-sum", layers="global"
)
CALL = {"max_new_tokens": NEW, "eos_ids": (), "return_cache": True, "recompress": RULE}
QUESTION = [5, 9, 31, 7, 22]


class Summing(Row):
    """A row of the oracle with the sums of its entries `[L, K, n]`."""

    def begin(self, prompt: list[int], window: int, held: np.ndarray):
        """Read a prompt; its last queries' squares, pooled by 7, are what its entries begin with.

        `held` `[L, K, n]` says what compression keeps.
        """
        self.feed(prompt)
        raw = self.squares[:, :, -window:].sum(2)
        padded = np.pad(raw, ((0, 0), (0, 0), (3, 3)))
        pooled = np.max([padded[..., i : i + raw.shape[-1]] for i in range(7)], axis=0)
        self.sums = self._by_group(pooled)
        self.prompt, self.held = len(prompt), held

    def _by_group(self, of_heads):
        layers, kv_heads, _ = self.held.shape
        return of_heads.reshape(layers, kv_heads, -1, of_heads.shape[-1]).sum(2)

    def add(self, tokens: list[int]) -> np.ndarray:
        """Feed tokens, each of which adds its squares to whatever it sees."""
        found = self.feed(tokens)
        new = np.zeros((*self.sums.shape[:2], len(tokens)))
        self.sums = np.concatenate([self.sums, new], axis=-1)
        self.sums += self._by_group(self.squares.sum(2))
        return found

    def evict(self, rule: Recompress):
        """Keep the last tokens, the sinks and, of what competes with each other, the largest.

        These are all layers and heads, or each head alone.
        """
        layers, kv_heads, seen = self.held.shape
        place = np.arange(seen)
        always = self.held & ((place >= seen - rule.window) | (place < rule.sinks))
        together = layers * kv_heads if rule.layers == "global" else 1
        shape = -1, together * seen
        held = zip(*(x.reshape(shape) for x in (self.held, always, self.sums)), strict=True)
        kept = [_largest(*each, rule.budget * together) for each in held]
        self.held = np.reshape(kept, self.held.shape)


def _largest(held, always, sums, budget: int) -> np.ndarray:
    open_ = np.flatnonzero(held & ~always)
    best = open_[np.argsort(-sums[open_], kind="stable")]
    kept = always.copy()
    kept[best[: budget - always.sum()]] = True
    return kept


def agree(cache, number: int, row: Summing):
    """A cache holds what a row does, with its sums."""
    for index in range(row.held.shape[0]):
        found = stored(cache, number, index)
        place = np.lexsort((found.positions, found.heads))
        heads, positions = np.nonzero(row.held[index])
        np.testing.assert_array_equal(found.heads[place], heads)
        np.testing.assert_array_equal(found.positions[place], positions)
        sums = sums_of(cache, number, index)[place]
        np.testing.assert_allclose(sums, row.sums[index][row.held[index]], atol=1e-5, rtol=1e-4)


def sums_of(cache, row: int, index: int) -> np.ndarray:
    """The sums of a layer's entries, in the order of `life.stored`."""
    pool, tail = cache.slots, cache.tail
    number = np.arange(int(pool.lengths[row, index]))
    slots = np.asarray(pool.table[row, index])[number // pool.page] * pool.page
    slots = slots + number % pool.page
    slots = slots[np.asarray(pool.owners[row])[slots] >= 0]
    filled = np.flatnonzero(np.asarray(tail.positions[row]) >= 0)
    of_tail = np.asarray(tail.sums[index][row])[:, filled].reshape(-1)
    return np.concatenate([np.asarray(pool.sums[row])[slots], of_tail])


def follow(row: Summing, tokens: list[int], rule: Recompress = RULE) -> np.ndarray:
    """Decode as the rule says: `[O - 1, V]` log-probs after each token but the last."""
    found = []
    for count, token in enumerate(tokens[:-1], 1):
        found.append(row.add([token])[0])
        if count % EVERY == 0 and count < len(tokens) - 1:
            row.evict(rule)
    row.evict(rule)
    row.add(tokens[-1:])
    return np.array(found)


def begun(model, prompts, config, window=8) -> list[Summing]:
    """Rows of the oracle that hold what a prompt's compression keeps."""
    cache, rows = kvjax.compress_prompt(model, prompts, config), []
    for number, prompt in enumerate(prompts):
        row = Summing(Oracle(model))
        held = np.asarray(cache.kept_mask(len(prompt))[number])
        row.begin(prompt, window, held)
        rows.append(row)
    return rows


@pytest.mark.parametrize(
    ("config", "rule"),
    [
        (KVC, RULE),
        (KVC, dataclasses.replace(RULE, sinks=2)),
        (
            CompressionConfig.named("snapkv", 16, window=8),
            dataclasses.replace(RULE, layers="uniform", heads="uniform"),
        ),
    ],
    ids=["everywhere", "sinks", "each head"],
)
def test_answers_follow_the_oracle_over_several_evictions(model, prompts, config, rule):
    rows = begun(model, prompts, config)
    out = kvjax.generate(model, prompts, config, **CALL | {"recompress": rule})
    sizes = np.asarray(out.cache.slots.lengths)
    for number, (row, tokens) in enumerate(zip(rows, out.tokens, strict=True)):
        likely(out.log_probs[number][1:], tokens[1:], follow(row, tokens, rule))
        agree(out.cache, number, row)
    # Layers have come to differ under one threshold alone.
    assert any(len(set(row)) > 1 for row in sizes) == (rule.layers == "global")


def test_entries_inherit_no_sums_of_those_they_replace(model, prompts):
    """Under a rule that adds nothing an answer's entries have none; and the sums are not lost."""
    rule = Recompress(every=EVERY, budget=BUDGET, window=WINDOW)
    config = CompressionConfig.named("kv-compress", 16, sums=True)
    out = kvjax.generate(model, prompts, config, **CALL | {"recompress": rule})
    pool = out.cache.slots
    for number, prompt in enumerate(prompts):
        of_answer = (pool.owners[number] >= 0) & (pool.positions[number] >= len(prompt))
        assert of_answer.sum() > 20
        assert not pool.sums[number][of_answer].any()
        assert pool.sums[number].any()  # the prompt's


def test_a_document_is_asked_saved_and_asked_again(model, prompts, tmp_path):
    """Two turns of a batch, with a file in between: a question's tokens add as an answer's do."""
    config = CompressionConfig.named("kv-compress", 16, sums=True)
    rows = begun(model, prompts, config)
    questions = [QUESTION, QUESTION[:2], QUESTION[1:]]
    document = kvjax.compress_prompt(model, prompts, config)
    bare = document.replace(slots=document.slots.replace(sums=None))
    with pytest.raises(ValueError, match="adds to sums that the cache does not have, expected one"):
        kvjax.generate(model, questions, cache=bare, **CALL)
    first = kvjax.generate(model, questions, cache=document, **CALL)
    path = kvjax.save_cache(tmp_path / "asked.cache", first.cache, model)
    kept = kvjax.load_cache(path, model)
    second = kvjax.generate(model, questions, cache=kept, **CALL)
    for number, row in enumerate(rows):
        for out in (first, second):
            row.add(questions[number])
            tokens = out.tokens[number]
            likely(out.log_probs[number][1:], tokens[1:], follow(row, tokens))
            agree(out.cache, number, row)
