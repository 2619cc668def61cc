"""KVzip's scores of a small random model: a float64 forward pass over prompt and repetition."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import kvjax
from kvjax import CompressionConfig, ConfigError
from kvjax.compression.compress import probe_request
from kvjax.compression.kvzip import reconstruction_scores
from kvjax.generation import prefill
from kvjax.generation.request import INSTRUCTIONS, instructed
from kvjax.model_interface import ProbeRequest, Repeat
from kvjax.models.config import ModelConfig
from kvjax.models.decoder import Decoder

N, K, H, LAYERS, VOCAB = 4, 2, 8, 2, 40
G = N // K
LEAD = 8
FIRST, OTHERS = (5, 6, 7), (8, 9, 10, 11, 12)  # instructions


def small_model(*windows: int | None, sharpness: float = 3.0) -> Decoder:
    """Random, with queries `sharpness` times as long as they come."""
    config = ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=VOCAB,
        hidden_size=24,
        intermediate_size=32,
        num_layers=LAYERS,
        num_heads=N,
        num_kv_heads=K,
        head_dim=H,
        sliding_windows=windows,
    )
    model = Decoder(config, rngs=nnx.Rngs(0))
    for layer in model.layers:
        layer.attention.q_DX[...] *= sharpness
    return model


@pytest.fixture(scope="module")
def model():
    return small_model()


def prompts(width: int, lengths, seed: int = 0) -> np.ndarray:
    """Random tokens, the padding included."""
    tokens = np.random.default_rng(seed).integers(13, VOCAB, (len(lengths), width))
    return tokens.astype(np.int32)


@jax.jit
def prefilled(model, tokens, lengths):
    read = prefill.prefill(model, tokens, lengths, ProbeRequest())
    return read.keys, read.values


@partial(jax.jit, static_argnames="repeat")
def repeated(model, tokens, lengths, keys, values, repeat):
    return jnp.stack(reconstruction_scores(model, tokens, lengths, keys, values, repeat))


def scores_of(model, tokens, lengths, repeat) -> np.ndarray:
    """`[L, B, K, T]`."""
    lengths = jnp.asarray(lengths)
    return np.asarray(repeated(model, tokens, lengths, *prefilled(model, tokens, lengths), repeat))


# --------------------------------------------------------------------------- float64
def normed(x_TD, norm, eps: float) -> np.ndarray:
    scale_D = np.asarray(norm.scale_D[...], np.float64)
    return x_TD / np.sqrt((x_TD**2).mean(-1, keepdims=True) + eps) * scale_D


def rotated(x_TXH) -> np.ndarray:
    half = H // 2
    angles_TC = np.arange(len(x_TXH))[:, None] * 10000.0 ** (-np.arange(half) / half)
    turn_TC = np.exp(1j * angles_TC)[:, None]
    turned = (x_TXH[..., :half] + 1j * x_TXH[..., half:]) * turn_TC
    return np.concatenate([turned.real, turned.imag], axis=-1)


def softmax(s: np.ndarray) -> np.ndarray:
    exps = np.exp(s - s.max(-1, keepdims=True))
    return exps / exps.sum(-1, keepdims=True)


def forward(model, tokens) -> list[tuple[np.ndarray, np.ndarray]]:
    """Queries `[T, N, H]` and keys `[T, K, H]` of every layer, of one sequence without a cache."""

    def weight(matrix):
        return np.asarray(matrix[...], np.float64)

    x_TD, found = weight(model.embed.table_VD)[tokens], []
    back_TT = np.subtract.outer(np.arange(len(tokens)), np.arange(len(tokens)))
    for layer, window in zip(model.layers, model.config.sliding_windows, strict=True):
        attention, mlp, eps = layer.attention, layer.mlp, model.config.rms_norm_eps
        y_TD = normed(x_TD, layer.attention_norm, eps)
        names = (attention.q_DX, attention.k_DY, attention.v_DY)
        q_TNH, k_TKH, v_TKH = ((y_TD @ weight(w)).reshape(len(tokens), -1, H) for w in names)
        q_TNH, k_TKH = rotated(q_TNH), rotated(k_TKH)
        found.append((q_TNH, k_TKH))
        seen_TT = (back_TT >= 0) & (back_TT < (window or len(tokens)))
        out = []
        for head in range(N):
            s_TT = q_TNH[:, head] @ k_TKH[:, head // G].T / np.sqrt(H)
            out.append(softmax(np.where(seen_TT, s_TT, -np.inf)) @ v_TKH[:, head // G])
        x_TD = x_TD + np.concatenate(out, axis=-1) @ weight(attention.o_XD)
        y_TD = normed(x_TD, layer.mlp_norm, eps)
        gate_TF = y_TD @ weight(mlp.gate_DF)
        hidden_TF = gate_TF / (1 + np.exp(-gate_TF)) * (y_TD @ weight(mlp.up_DF))
        x_TD = x_TD + hidden_TF @ weight(mlp.down_FD)
    return found


def oracle(model, prompt, repeat: Repeat) -> np.ndarray:
    """`[L, K, n]` of one prompt: [prompt] [instruction] [lead] [chunk], once for every chunk.

    Each new query's softmax is over the sinks, the chunk and what was repeated up to it, as far as
    the layer's window reaches; an entry of the chunk, be it a sink, gets the most that any of
    them, of any head of the group, gives to it.
    """
    n, sinks = len(prompt), repeat.sinks
    scores_LKT = np.zeros((LAYERS, K, n))
    for first in range(0, n, repeat.chunk):
        chunk = range(first, min(first + repeat.chunk, n))
        text = [*repeat.instructions[first > 0], *prompt[max(0, first - LEAD) : first]]
        text += [*prompt[first : first + repeat.chunk]]
        for layer, (q_TNH, k_TKH) in enumerate(forward(model, [*prompt, *text])):
            window = model.config.sliding_windows[layer] or n + len(text)
            for said, head in np.ndindex(len(text), N):
                asked = {*range(min(sinks, n)), *chunk, *range(n, n + said + 1)}
                keys = [key for key in sorted(asked) if n + said - key < window]
                p_S = softmax(k_TKH[keys, head // G] @ q_TNH[n + said, head] / np.sqrt(H))
                for key, p in zip(keys, p_S, strict=True):
                    if key in chunk:
                        best = scores_LKT[layer, head // G, key]
                        scores_LKT[layer, head // G, key] = max(best, p)
    return scores_LKT


def check(model, tokens, lengths, repeat):
    scores = scores_of(model, tokens, lengths, repeat)
    assert (scores.shape, scores.dtype) == ((LAYERS, len(lengths), K, tokens.shape[1]), np.float32)
    for row, n in enumerate(lengths):
        expected = oracle(model, tokens[row, :n].tolist(), repeat)
        np.testing.assert_allclose(scores[:, row, :, :n], expected, rtol=1e-4, atol=1e-6)
        assert not scores[:, row, :, n:].any()
        assert (scores[0, row, :, : min(n, repeat.sinks)] > 0).all()


# Ends in the middle of the third chunk, with the second, within the first, and within the sinks.
LENGTHS = (45, 34, 9, 3)


@pytest.mark.parametrize(
    "repeat",
    [
        Repeat(17, (FIRST, OTHERS), 4),
        Repeat(17, ((), ()), 0),
        Repeat(5, ((), OTHERS), 7),  # the sinks reach into the second chunk
        Repeat(2048, (FIRST, OTHERS), 4),
    ],
    ids=["chunks", "bare", "short chunks", "whole"],
)
def test_scores_match_float64(model, repeat):
    check(model, prompts(48, LENGTHS), LENGTHS, repeat)


def test_sliding_windows_match_float64():
    """A layer sees of its chunk what its window reaches; of the first chunks nothing at all."""
    check(small_model(None, 24), prompts(48, LENGTHS), LENGTHS, Repeat(17, (FIRST, OTHERS), 4))
    scores = scores_of(small_model(None, 24), prompts(48, (45,)), (45,), Repeat(17, ((), ()), 4))
    assert scores[0].all(where=np.arange(48) < 45)
    assert (scores[1, 0] > 0).any(0).nonzero()[0].tolist() == list(range(22, 45))


def test_a_repetition_of_several_blocks_matches_float64(model):
    lengths = (160, 131, 120)  # with the instruction 163, 134 and 123 tokens, in two parts of 96
    check(model, prompts(160, lengths), lengths, Repeat(160, (FIRST, OTHERS), 4))


def test_even_attention_by_hand():
    # All logits are 0, so the first query of a chunk gives most: 1 to (sinks + chunk + itself).
    model = small_model(sharpness=0.0)
    scores = scores_of(model, prompts(12, (10, 5)), (10, 5), Repeat(4, (FIRST, OTHERS), 2))
    first = [1 / (2 + 2 + 1)] * 4
    ten = [*first, *[1 / (2 + 4 + 1)] * 4, *[1 / (2 + 2 + 1)] * 2, 0, 0]
    five = [*first, 1 / (2 + 1 + 1), *[0] * 7]
    for row, expected in enumerate((ten, five)):
        np.testing.assert_allclose(scores[:, row], np.tile(expected, (2, 2, 1)), rtol=1e-5)


# --------------------------------------------------------------------------- rows and padding
REPEAT = Repeat(17, (FIRST, OTHERS), 4)


def test_a_row_alone_is_the_row_in_a_ragged_batch(model):
    tokens = prompts(48, LENGTHS)
    scores = scores_of(model, tokens, LENGTHS, REPEAT)
    for row, n in enumerate(LENGTHS[:2]):
        alone = scores_of(model, tokens[row : row + 1], [n], REPEAT)
        np.testing.assert_allclose(alone[:, 0], scores[:, row], rtol=1e-5, atol=1e-7)
    cut = scores_of(model, tokens[1:2, :34], [34], REPEAT)  # in a bucket without padding
    np.testing.assert_allclose(cut[:, 0], scores[:, 1, :, :34], rtol=1e-5, atol=1e-7)


def test_padding_changes_nothing(model):
    """NaN in its keys and values, and other tokens."""
    tokens, lengths = prompts(48, LENGTHS), jnp.array(LENGTHS)
    padding = np.arange(48) >= np.array(LENGTHS)[:, None]
    keys, values = prefilled(model, tokens, lengths)
    clean = repeated(model, tokens, lengths, keys, values, REPEAT)
    keys, values = (
        tuple(jnp.where(padding[..., None, None], jnp.nan, x) for x in arrays)
        for arrays in (keys, values)
    )
    other = np.where(padding, 1, tokens)
    dirty = np.asarray(repeated(model, other, lengths, keys, values, REPEAT))
    np.testing.assert_array_equal(dirty, clean)
    assert np.isfinite(dirty).all()
    assert ((dirty >= 0) & (dirty <= 1)).all()


# --------------------------------------------------------------------------- what is said
def test_an_instruction_reaches_its_own_chunks_alone(model):
    tokens, n = prompts(48, (45,)), 45
    scores = scores_of(model, tokens, [n], REPEAT)[:, 0]

    def changed(scores_LKT):
        """Which of the three chunks' scores are others."""
        differs_T = np.abs(scores_LKT - scores).max((0, 1)) > 1e-5
        return [differs_T[:17].any(), differs_T[17:34].any(), differs_T[34:45].any()]

    first = dataclasses.replace(REPEAT, instructions=((3,), OTHERS))
    others = dataclasses.replace(REPEAT, instructions=(FIRST, (3,)))
    assert changed(scores_of(model, tokens, [n], first)[:, 0]) == [True, False, False]
    assert changed(scores_of(model, tokens, [n], others)[:, 0]) == [False, True, True]


def test_the_config_says_what_is_repeated():
    config = CompressionConfig.named("kvzip", 8, repeat=(FIRST, OTHERS), repeat_chunk=17)
    assert probe_request(config, 48) == ProbeRequest(repeat=REPEAT)
    assert probe_request(config, 8) == ProbeRequest()  # nothing is evicted
    bare = CompressionConfig.named("ada-kvzip", 8, sinks=0)
    assert probe_request(bare, 48).repeat == Repeat(2048, ((), ()), 0)
    assert (
        probe_request(CompressionConfig.named("snapkv", 8, repeat=((1,), (2,))), 48).repeat is None
    )
    with pytest.raises(ConfigError, match="repeat_chunk=15, expected an integer of at least 16"):
        CompressionConfig.named("kvzip", 8, repeat_chunk=15)


class Letters:
    """A tokenizer of letters."""

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [1] * add_special_tokens + [13 + ord(one) % 27 for one in text]}

    def decode(self, tokens, **_):
        return "".join(chr(97 + token % 26) for token in tokens)


def test_instructions_as_tokens():
    config, tokenizer = CompressionConfig.named("kvzip", 8), Letters()
    spelled = [[13 + ord(one) % 27 for one in text] for text in INSTRUCTIONS]
    assert instructed(config, tokenizer, VOCAB).repeat == tuple(map(tuple, spelled))
    # Neither what the model has no embedding for nor what the tokenizer does not know.
    tokenizer.unk_token_id = unknown = spelled[0][2]  # R
    expected = tuple(tuple(i for i in ids if i < 30 and i != unknown) for ids in spelled)
    assert instructed(config, tokenizer, 30).repeat == expected
    assert 0 < len(expected[0]) < len(spelled[0])
    told = dataclasses.replace(config, repeat=((), (3,)))
    for same in (told, CompressionConfig.named("snapkv", 8)):
        assert instructed(same, tokenizer, VOCAB) == same
    assert instructed(config, None, VOCAB) == config


@pytest.mark.slow
def test_a_tokenizer_makes_the_instructions(model):
    """Slow: two answers with a repetition are compiled."""
    config = CompressionConfig.named("ada-kvzip", 12)
    tokenizer, prompt = Letters(), prompts(48, (45,))[0].tolist()
    ids = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in INSTRUCTIONS)
    spelled = dataclasses.replace(config, repeat=tuple(map(tuple, ids)))
    masks = [
        np.asarray(
            kvjax.generate(
                model, prompt, one, tokenizer=given, max_new_tokens=1, return_cache=True
            ).cache.kept_mask(48)
        )
        for one, given in ((config, tokenizer), (spelled, tokenizer), (config, None))
    ]
    assert (masks[1] != masks[2]).any()
    np.testing.assert_array_equal(masks[0], masks[1])


@pytest.mark.parametrize("method", ["ada-kvzip", "kvzip"])
def test_prefill_keeps_what_the_repetition_attends_to(model, method):
    """The probe holds these scores, and the cache the best of them."""
    config = CompressionConfig.named(
        method, 10, repeat=(FIRST, OTHERS), repeat_chunk=17, layout="padded", floor=0.0
    )
    tokens, lengths = prompts(48, LENGTHS), jnp.array(LENGTHS)
    call = jax.jit(prefill.prefill, static_argnums=3)
    read = call(model, tokens, lengths, probe_request(config, 48))
    logits, probes = read.logits, read.probes
    scores = scores_of(model, tokens, LENGTHS, REPEAT)
    found = np.stack([probe.reconstruction for probe in probes])
    np.testing.assert_allclose(found, scores, rtol=1e-5, atol=1e-7)

    compressed = jax.jit(prefill.prefill_compress, static_argnums=4)
    first, cache = compressed(model, tokens, lengths, jax.random.key(0), config)
    np.testing.assert_allclose(first, logits, rtol=1e-5, atol=1e-5)
    kept = np.asarray(cache.kept_mask(48))
    n, row = LENGTHS[0], 0
    best = np.zeros((LAYERS, K, 48), bool)
    best[..., [0, 1, 2, 3, n - 1]] = True
    scored = np.where(best, -1, scores[:, row])
    groups = scored.reshape(LAYERS if method == "ada-kvzip" else 1, -1)
    for flat, to in zip(groups, best.reshape(groups.shape), strict=True):
        to[np.argsort(-flat)[: len(flat) // 48 * 5]] = True
    np.testing.assert_array_equal(kept[row], best)
