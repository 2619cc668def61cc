"""A cache knows which model made it: no other one continues it without a word."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import kvjax
from kvjax import CompressionConfig, sharding
from kvjax.cache import origin

CONFIG = CompressionConfig.named("snapkv", 8)
FULL = CompressionConfig.named("full")
OTHERS = [{"layers": 3}, {"layers": 1}, {"kv_heads": 1}, {"head_dim": 4}, {"dtype": jnp.float16}]
CALL = {"max_new_tokens": 2, "eos_ids": ()}


@pytest.fixture(scope="module")
def other(model):
    """The same shapes with other weights, as after fine-tuning."""
    return jax.tree.map(lambda leaf: leaf * 1.01, model)


@pytest.fixture(scope="module")
def cache(model):
    return kvjax.compress_prompt(model, list(range(5, 21)), CONFIG)


def test_another_model_of_the_same_shape_is_refused(model, other, cache, tmp_path):
    message = r"^cache was made by another model \(fingerprint \w{12}\), expected one that this"
    for call in (
        lambda: kvjax.generate(other, [5, 6], cache=cache, **CALL),
        lambda: kvjax.stream(other, [5, 6], cache=cache, **CALL),
        lambda: kvjax.save_cache(tmp_path / "cache", cache, other),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert not list(tmp_path.iterdir())


def test_every_cache_that_is_handed_back_has_an_origin(model, other, cache, tmp_path):
    own = kvjax.cache.origin.fingerprint(model)
    first = kvjax.generate(model, [5, 6], cache=cache, return_cache=True, **CALL)
    loaded = kvjax.load_cache(kvjax.save_cache(tmp_path / "cache", cache, model), model)
    assert {c.origin for c in (cache, first.cache, loaded)} == {own}
    with pytest.raises(ValueError, match="another model"):
        kvjax.generate(other, [5, 6], cache=first.cache, **CALL)


def test_no_program_is_compiled_for_an_origin(model, other, cache):
    """Models of one shape share programs, and a cache of unknown origin runs the same one."""
    kvjax.generate(model, [5, 6], cache=cache, **CALL)
    theirs = kvjax.compress_prompt(other, list(range(5, 21)), CONFIG)
    before = kvjax.compilations()
    kvjax.generate(other, [5, 6], cache=theirs, **CALL)
    kvjax.generate(model, [5, 6], cache=theirs.replace(origin=None), **CALL)
    assert kvjax.compilations() == before


# --------------------------------------------------------------------------- sizes
def made_by_hand(layers=2, kv_heads=2, head_dim=16, dtype=jnp.float32):
    """From arrays alone, as for one's own model: its origin is unknown."""
    shape = (1, 16, kv_heads, head_dim)
    entries = [jnp.ones(shape, dtype)] * layers
    return kvjax.compress(entries, entries, [kvjax.Probe()] * layers, FULL)


@pytest.mark.parametrize("changes", OTHERS)
def test_other_sizes_are_refused(model, changes):
    config = model.config
    sizes = {"layers": config.num_layers, "kv_heads": config.num_kv_heads}
    sizes |= {"head_dim": config.head_dim, "dtype": jnp.float32}
    fits = made_by_hand(**sizes)
    assert fits.origin is None
    assert origin.owned(fits, model) is not None
    with pytest.raises(ValueError, match=r"^cache has \d layers of \d KV heads of .*, expected"):
        kvjax.generate(model, [5], cache=made_by_hand(**(sizes | changes)), **CALL)


# --------------------------------------------------------------------------- fingerprints
def test_weights_are_read_once(model):
    origin.fingerprint(model)
    before = origin._digest.cache_info()
    for _ in range(3):
        origin.fingerprint(model)
    after = origin._digest.cache_info()
    assert (after.hits, after.misses) == (before.hits + 3, before.misses)


def test_weights_that_change_in_place_are_another_model(model):
    trained = nnx.clone(model)
    before = origin.fingerprint(trained)
    assert before == origin.fingerprint(model)
    trained.embed.table_VD.set_value(trained.embed.table_VD[...] + 1)
    assert origin.fingerprint(trained) != before


def test_what_is_read_does_not_depend_on_devices(model):
    """Of a sharded weight, as on accelerators, nothing but the values leaves the devices."""
    placed = sharding.place(model, sharding.make_mesh(data=1, model=4))
    assert origin.fingerprint(placed) == origin.fingerprint(model)
    whole, split = model.embed.table_VD[...], placed.embed.table_VD[...]
    places = np.array([0, 5, whole.size - 1])
    fetched = origin._fetched(split, places)
    np.testing.assert_array_equal(fetched, np.asarray(whole).reshape(-1)[places])


# --------------------------------------------------------------------------- files
def test_a_missing_folder_is_named(model, cache, tmp_path):
    message = r"^path='.*', expected the name of a file in a folder that exists$"
    for path in (tmp_path / "missing" / "cache", tmp_path):
        with pytest.raises(ValueError, match=message):
            kvjax.save_cache(path, cache, model)
