"""Generating on a mesh: eight virtual devices, two along `data` and four along `model`."""

import dataclasses
from functools import partial, reduce
from operator import or_
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from synthetic import probe_of

import kvjax
from kvjax import METHODS, CompressionConfig, Recompress, probe_request, sharding
from kvjax.cache.packing import put_layer
from kvjax.cache.slot_moves import reshard_slots
from kvjax.cache.slots import empty_slots
from kvjax.cache.state import with_room
from kvjax.compile_for import collectives
from kvjax.generation import decode, prefill
from kvjax.generation.programs import (
    Program,
    decode_program,
    prefill_compress_program,
    start_answer_program,
)
from kvjax.inputs.prompts import pad
from kvjax.models.checkpoints import weights
from kvjax.models.checkpoints.orbax import load_orbax, save_orbax
from kvjax.models.checkpoints.weights import load_decoder, parameter_at, tensor_specs
from kvjax.models.config import ModelConfig
from kvjax.models.decoder import Decoder

FIXTURES = Path(__file__).parents[1] / "fixtures" / "hf"
HEADS, HEAD_DIM = 8, 16
BUDGET = 16


def make_model(kv_heads: int, heads: int = HEADS, layers: int = 1) -> Decoder:
    config = ModelConfig.from_hf(
        {
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": 96,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": HEAD_DIM,
            "max_position_embeddings": 2048,
        }
    )
    return Decoder(config, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(2, 4)


@pytest.fixture(scope="module", params=[4, 2], ids=["4 KV heads", "2 KV heads"])
def sharded(request, mesh):
    """A model with as many KV heads as chips along `model`, and with fewer."""
    return sharding.place(make_model(request.param, layers=2), mesh)


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(3, 90, size).tolist() for size in (64, 41, 52, 60)]


def answers(model, prompts, config, **settings):
    return kvjax.generate(model, prompts, config, max_new_tokens=8, eos_ids=(), **settings)


def assert_same(one, other):
    """No margin of these random models' greedy tokens is below 1e-5."""
    assert other.tokens == one.tokens
    np.testing.assert_array_equal(other.kept, one.kept)
    np.testing.assert_allclose(other.log_probs, one.log_probs, atol=1e-5)
    if one.cache is not None:
        np.testing.assert_array_equal(other.cache.kept_mask(64), one.cache.kept_mask(64))


# ---------------------------------------------------------------------------- the same answers
def method(name):
    return CompressionConfig.named(name, None if name == "full" else BUDGET)


@pytest.fixture(scope="module")
def prefilled(mesh, prompts):
    """A model's layers with what any method reads, on one device and on a mesh.

    It has fewer KV heads (2) than there are chips along `model` (4).
    """
    model = make_model(2, layers=2)
    tokens, lengths = pad(prompts)
    wanted = reduce(or_, (probe_request(method(name), tokens.shape[1]) for name in METHODS))
    run = Program(partial(prefill.prefill, request=wanted))
    models = model, sharding.place(model, mesh)
    return [run(model, tokens, lengths) for model in models]


def test_prompts_read_once_are_answered_on_a_mesh(mesh, prompts):
    model = make_model(2, layers=2)
    config = method("ada-snapkv")
    alone = kvjax.generate(model, prompts, config, max_new_tokens=4)
    read = kvjax.prefill_prompts(model, prompts, [config], mesh=mesh)
    assert len(read.arrays.keys[0].sharding.device_set) == 8
    placed = sharding.place(model, mesh)
    answered = kvjax.generate(placed, read, config, max_new_tokens=4)
    assert answered.tokens == alone.tokens
    np.testing.assert_array_equal(answered.kept, alone.kept)


# One of each way to divide a budget and of each kind of scores; the others are slow.
QUICK = ("full", "ada-snapkv", "prefixkv", "kv-compress", "joint-kvzip", "expected-attention")


@pytest.mark.parametrize(
    "name",
    [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in METHODS],
)
def test_every_method_keeps_the_same_on_a_mesh(name, prefilled):
    """Scores, allocation and packing alone: a small program a method."""

    @Program
    def kept(read):
        cache = prefill.compress_prefilled(read, (None, None), jax.random.key(0), method(name))
        return sharding.replicated((cache.kept_mask(64), cache.counts))

    (one, counts), (other, on_mesh) = (jax.tree.map(np.asarray, kept(x)) for x in prefilled)
    np.testing.assert_array_equal(other, one)
    np.testing.assert_array_equal(on_mesh, counts)
    np.testing.assert_array_equal(one.sum(-1), counts)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full", "ada-snapkv", "prefixkv", "joint-kvzip"])
def test_a_mesh_answers_as_one_device(name, mesh, prompts):
    """The same entries and tokens, with fewer KV heads (2) than chips along `model` (4).

    Slow: a whole answer on eight devices, for each method.
    """
    model = make_model(2, layers=2)
    one = answers(model, prompts, method(name), return_cache=True)
    assert_same(one, answers(model, prompts, method(name), mesh=mesh, return_cache=True))


@pytest.mark.slow
@pytest.mark.parametrize(("heads", "kv_heads"), [(12, 6), (3, 1)])
def test_heads_that_do_not_divide_the_mesh(heads, kv_heads, mesh, prompts):
    """Slow: a model and two answers for each division."""
    model = make_model(kv_heads, heads)
    config = CompressionConfig.named("ada-snapkv", BUDGET)
    assert_same(answers(model, prompts, config), answers(model, prompts, config, mesh=mesh))


def test_int8_entries_and_a_batch_that_does_not_divide(mesh, prompts):
    """Slow: whole answers on a mesh."""
    model = make_model(4)
    config = dataclasses.replace(CompressionConfig.named("snapkv", BUDGET), quantize="int8")
    one = answers(model, prompts[:3], config)
    assert_same(one, answers(model, prompts[:3], config, mesh=mesh))


@pytest.mark.slow
def test_groups_of_rows(mesh, prompts, monkeypatch):
    """Slow: whole answers on a mesh."""
    monkeypatch.setattr(prefill, "PREFILL_TOKENS", 64)
    model = make_model(4)
    config = CompressionConfig.named("snapkv", BUDGET)
    assert_same(answers(model, prompts, config), answers(model, prompts, config, mesh=mesh))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "changes"),
    [("ada-snapkv", {}), ("kv-compress", {"scorer": "squared-sum", "layers": "global"})],
)
def test_compressing_while_decoding(method, changes, mesh, prompts):
    """Slow: the loop around the decode loop, on a mesh."""
    model = make_model(2)
    rule = {"recompress": Recompress(every=3, budget=BUDGET + 4, **changes)}
    config = CompressionConfig.named(method, BUDGET)
    assert_same(
        answers(model, prompts, config, **rule), answers(model, prompts, config, mesh=mesh, **rule)
    )


@pytest.mark.slow
def test_a_stream_and_a_saved_cache(mesh, prompts, tmp_path):
    """What a mesh saved is asked on one device and, again, on the mesh.

    Slow: the stages of a stream apart, on a mesh.
    """
    model = make_model(4)
    sharded = sharding.place(model, mesh)
    config = CompressionConfig.named("ada-snapkv", BUDGET)
    cache = kvjax.compress_prompt(sharded, prompts[0], config)
    kvjax.save_cache(tmp_path / "cache", cache, sharded)
    call = {"max_new_tokens": 8, "eos_ids": ()}
    loaded = kvjax.load_cache(tmp_path / "cache", model)
    expected = kvjax.generate(model, prompts[1:3], cache=loaded, **call)
    steps = list(kvjax.stream(sharded, prompts[1:3], cache=loaded, **call))
    rows = [[t for step in steps for t in step.tokens[row]] for row in (0, 1)]
    assert rows == expected.tokens


# ---------------------------------------------------------------------------- where things lie
@pytest.mark.parametrize("method", [pytest.param("snapkv", marks=pytest.mark.slow), "prefixkv"])
def test_questions_share_a_document(method, mesh, prompts):
    """Padded and packed entries, rows over `data`: the document lies once on each of its parts."""
    model = make_model(2)
    config = CompressionConfig.named(method, BUDGET)
    document, questions = prompts[:1], [[5, 9, 11], [17, 4], [8], [20, 33, 6, 7]]
    one = kvjax.compress_prompt(model, document, config)
    one = answers(model, questions, config, cache=one)
    placed = sharding.place(model, mesh)
    other = kvjax.compress_prompt(placed, document, config)
    other = answers(placed, questions, config, cache=other, return_cache=True)
    assert other.tokens == one.tokens
    np.testing.assert_allclose(other.log_probs, one.log_probs, atol=1e-5)
    assert other.cache.shared == 4


def test_the_mesh_is_fitted_to_the_heads(mesh):
    def sizes(heads, kv_heads):
        return tuple(sharding.fitted(mesh, heads, kv_heads).shape.values())

    assert sizes(32, 8) == (2, 4, 1, 1)
    assert sizes(8, 2) == (2, 2, 2, 1)
    assert sizes(8, 1) == (2, 1, 4, 1)
    assert sizes(12, 6) == (2, 2, 1, 2)
    assert sizes(3, 1) == (2, 1, 1, 4)
    again = sharding.fitted(sharding.fitted(mesh, 8, 2), 32, 8)
    assert again == sharding.fitted(mesh, 32, 8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sharding.make_mesh(0, 4), "data=0, expected at least 1"),
        (lambda: sharding.make_mesh(4, 4), "need 16 devices, expected at most 8"),
        (
            lambda: sharding.fitted(jax.make_mesh((2,), ("rows",)), 8, 2),
            "mesh has axes .'rows',., expected 'data' and 'model'",
        ),
        (lambda: sharding.parameter_axes("layers.0.scale"), "expected a name that ends in axis"),
    ],
)
def test_wrong_calls_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def skewed_cache(placed):
    """Ada-KV where head 0 of four owns 60 % of every layer's 64 entries."""
    batch, tokens, kv_heads = 2, 64, 4
    config = dataclasses.replace(
        CompressionConfig.named("h2o", 16, floor=0.0), heads="ada", recent=1, layout="packed"
    )
    probe = probe_of(0, batch, tokens, HEADS, kv_heads, HEAD_DIM, 1)
    sums = np.random.default_rng(0).random((batch, HEADS, tokens)).astype(np.float32) / 10
    for head, entries in enumerate((37, 8, 8, 7)):  # beside the last one, which is always kept
        sums[:, 2 * head : 2 * head + 2, :entries] += 10
    probe = probe.replace(column_sums=sums)
    rng = np.random.default_rng(1)
    keys, values = (
        [rng.normal(size=(batch, tokens, kv_heads, HEAD_DIM)).astype(np.float32)] * 2
        for _ in range(2)
    )
    with sharding.using(placed):
        prompt = sharding.put_on_mesh((keys, values, [probe] * 2), placed)
        return jax.jit(lambda *x: kvjax.compress(*x, config))(*prompt)


def test_a_skewed_allocation_leaves_devices_even(mesh):
    expected = skewed_cache(None)
    cache = skewed_cache(sharding.fitted(mesh, HEADS, 4))
    np.testing.assert_array_equal(cache.slots.counts, expected.slots.counts)
    np.testing.assert_array_equal(cache.slots.counts[0, 0, 0], 38)
    shards = cache.slots.owners.addressable_shards
    assert {shard.data.shape for shard in shards} == {(1, 2 * 64 // 4)}
    # Each layer's 64 entries are 16 a device, and in the same order as on one device.
    assert all((np.asarray(shard.data) >= 0).all() for shard in shards)
    for name in ("entries", "owners", "positions"):
        one, other = (getattr(reshard_slots(c.slots, 1), name) for c in (expected, cache))
        np.testing.assert_array_equal(other, one)
    first_layer = [np.asarray(shard.data)[0, :16] for shard in shards]
    assert sum((owners == 0).sum() for owners in first_layer) == 2 * 38
    assert {(owners == 0).sum() for owners in first_layer} <= {9, 10}


def test_counts_say_what_the_split_pool_stores(mesh):
    """Also of entries that have no slot, as in one device's pool: the pool is 10 slots short."""
    rng = np.random.default_rng(0)
    keep = rng.random((2, 2, 4, 32)) < np.array([0.4, 0.2]).reshape(1, 2, 1, 1)
    slots = (int(keep.sum((0, 2, 3)).max()) - 10) // 4 * 4
    keys, values = (rng.normal(size=(2, 2, 32, 4, 4)).astype(np.float32) for _ in (0, 1))

    def fill(keys, values, keep):
        pool = empty_slots(keys[0], 2, slots, None, page=4, parts=sharding.parts())
        for layer in (0, 1):
            pool = put_layer(pool, layer, keys[layer], values[layer], keep[layer], 100)
        return pool

    def filled(placed):
        with sharding.using(placed):
            arrays = map(jnp.asarray, (keys, values, keep))
            return jax.jit(fill)(*sharding.put_on_mesh(tuple(arrays), placed))

    alone, split = filled(None), filled(sharding.fitted(mesh, 8, 4))
    assert (alone.parts, split.parts) == (1, 4)
    expected = keep.sum(-1).swapaxes(0, 1)
    assert (np.asarray(alone.counts) == expected).all((1, 2)).tolist() == [False, True]
    for pool in (alone, split):
        np.testing.assert_array_equal((pool.owners >= 0).sum(1), pool.counts.sum((1, 2)))
    np.testing.assert_array_equal(alone.counts[0, 1] < expected[0, 1], [0, 0, 0, 1])
    np.testing.assert_array_equal(split.counts[1], alone.counts[1])
    # Of several devices there are slots for up to a multiple of them.
    assert 0 <= int((split.counts - alone.counts)[0].sum()) < 4


# ---------------------------------------------------------------------------- collectives
def decode_step(sharded, layout):
    """A compiled decode loop of 4 rows with 128 entries a head, and the cache that it reads."""
    config = dataclasses.replace(CompressionConfig.named("snapkv", 128), layout=layout)
    prompt = jnp.ones((4, 256), jnp.int32), jnp.full((4,), 250)
    key, rules = jax.random.key(0), decode.greedy_rules()
    logits, cache = prefill_compress_program(sharded, *prompt, key, config=config)
    answer = start_answer_program(logits, *prompt, key, rules, room=8)
    cache = with_room(cache, 64)
    arguments = sharded, cache.without_tail(), cache.tail, answer, rules
    return decode_program.lower(*arguments, steps=7).compile(), cache


def test_a_decode_step_moves_no_keys_and_values(sharded):
    compiled, cache = decode_step(sharded, "packed")
    step = collectives(compiled.as_text(), "decode")
    rows, kv_heads, layers = 4 // 2, sharded.config.num_kv_heads, sharded.config.num_layers
    tail = rows * kv_heads // min(kv_heads, 4) * 64 * HEAD_DIM * 4  # one layer's keys of a device
    pool = cache.slots.entries.addressable_shards[0].data.nbytes
    assert step
    assert max(size for _, size in step) < min(tail, pool) / 4
    # Beside plain head sharding: a query to all devices, what they found back, once a layer.
    plain = collectives(decode_step(sharded, "padded")[0].as_text(), "decode")
    extra = list(step)
    for one in plain:
        extra.remove(one)
    query = ("all-gather", rows * HEADS * HEAD_DIM * 4)
    found = ("all-to-all", rows * HEADS * (HEAD_DIM + 1) * 4)
    assert sorted(extra) == [query] * layers + [found] * layers


def test_packing_moves_only_what_is_kept(sharded):
    config = CompressionConfig.named("ada-snapkv", 8)
    prompt = jnp.ones((4, 256), jnp.int32), jnp.full((4,), 250)
    key = jax.random.key(0)
    compiled = prefill_compress_program.lower(sharded, *prompt, key, config=config).compile()
    keys = 4 // 2 * 256 * HEAD_DIM * 4  # of one KV head
    moved = [size for kind, size in collectives(compiled.as_text()) if kind != "all-reduce"]
    assert max(moved) < keys / 2


# ---------------------------------------------------------------------------- weights
def weights_of(model):
    return {
        spec.attribute: np.asarray(parameter_at(model, spec.attribute)[...])
        for spec in tensor_specs(model.config).values()
    }


@pytest.mark.parametrize("name", ["llama-bias", "qwen25-sharded"])
def test_loading_reads_each_part_once(name, mesh, monkeypatch):
    expected = load_decoder(FIXTURES / name, progress=False)
    read: dict[str, list] = {}
    whole = weights._read_part

    def counted(file, name, index):
        part = whole(file, name, index)
        read.setdefault(name, []).append(part.size)
        return part

    def never(file, name):
        raise AssertionError(f"{name} was read whole")

    monkeypatch.setattr(weights, "_read_part", counted)
    monkeypatch.setattr(weights, "_read_tensor", never)
    model, _ = kvjax.load(FIXTURES / name, progress=False, mesh=mesh)
    for attribute, value in weights_of(expected).items():
        np.testing.assert_array_equal(weights_of(model)[attribute], value)
    hosts = np.zeros(4)  # of two devices each, neighbours along `model`
    for tensor, spec in tensor_specs(model.config).items():
        array = parameter_at(model, spec.attribute)[...]
        size = array.addressable_shards[0].data.size
        parts = {str(shard.index) for shard in array.addressable_shards}
        assert read[tensor] == [size] * len(parts)
        where = array.sharding.devices_indices_map(array.shape)
        for host, pair in enumerate(mesh.devices.reshape(4, 2)):
            hosts[host] += size * len({str(where[device]) for device in pair})
    total = sum(value.size for value in weights_of(expected).values())
    assert (hosts < 0.6 * total).all()  # half, norms and small leftovers


def test_a_checkpoint_restores_on_another_mesh(tmp_path, mesh):
    model = load_decoder(FIXTURES / "qwen3", dtype=jnp.bfloat16, progress=False, mesh=mesh)
    save_orbax(model, tmp_path / "saved")
    for other in (sharding.make_mesh(4, 2), None):
        restored = load_orbax(tmp_path / "saved", other)
        assert restored.config == model.config
        for attribute, value in weights_of(model).items():
            assert restored.embed.table_VD[...].dtype == jnp.bfloat16
            np.testing.assert_array_equal(weights_of(restored)[attribute], value)
        placed = sharding.mesh_of(restored)
        assert placed == (other and sharding.fitted(other, 4, 2))
    assert kvjax.load(tmp_path / "saved", mesh=mesh)[0].embed.table_VD[...].dtype == jnp.float32


def test_a_checkpoint_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"kvjax.json cannot be read, expected what save_orbax"):
        load_orbax(tmp_path)
    model = load_decoder(FIXTURES / "llama", progress=False)
    save_orbax(model, tmp_path)
    with pytest.raises(ValueError, match="holds weights already, expected none"):
        save_orbax(model, tmp_path)
    (tmp_path / "weights").rename(tmp_path / "other")
    with pytest.raises(ValueError, match="holds no whole Orbax checkpoint"):
        load_orbax(tmp_path)
