"""load_decoder: orientation, dtypes, shards, memory, and the message of every refusal.

The checkpoints are written here, tensor by tensor under Hugging Face's names, with every axis of
another size; what each must become is spelled out, not taken from the loader's table.
"""

import gc
import json
import re
import struct
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from kvjax.models.checkpoints import weights
from kvjax.models.checkpoints.weights import load_decoder, tensor_specs
from kvjax.models.config import load_config

FIXTURES = sorted(
    path.parent for path in Path(__file__).parents[1].glob("fixtures/hf/*/config.json")
)
V, D, N, K, H, F, L = 600, 24, 6, 3, 10, 300, 2  # V and F exceed the rows transposed at once
BASE = {"vocab_size": V, "hidden_size": D, "intermediate_size": F, "num_hidden_layers": L}
BASE |= {"num_attention_heads": N, "num_key_value_heads": K, "head_dim": H}
CASES = {
    "llama": {"model_type": "llama"},
    "tied": {"model_type": "llama", "tie_word_embeddings": True},
    "biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "mistral": {"model_type": "mistral", "sliding_window": 8},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "attention_bias": True},
}
STORED = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F16": np.float16}


def tensors(case: str, dtype: type = np.float32, seed: int = 0) -> dict[str, np.ndarray]:
    """A random checkpoint of the case, in the layout of transformers: matrices are [out, in]."""
    shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    if case != "tied":
        shapes["lm_head.weight"] = (V, D)
    for layer in range(L):
        p = f"model.layers.{layer}"
        outputs = {"q": N * H, "k": K * H, "v": K * H}
        shapes |= {f"{p}.self_attn.{x}_proj.weight": (out, D) for x, out in outputs.items()}
        shapes |= {f"{p}.self_attn.o_proj.weight": (D, N * H), f"{p}.mlp.down_proj.weight": (D, F)}
        shapes |= {f"{p}.mlp.gate_proj.weight": (F, D), f"{p}.mlp.up_proj.weight": (F, D)}
        shapes |= {
            f"{p}.input_layernorm.weight": (D,),
            f"{p}.post_attention_layernorm.weight": (D,),
        }
        if case in ("biases", "qwen2", "qwen3"):
            shapes |= {f"{p}.self_attn.{x}_proj.bias": (out,) for x, out in outputs.items()}
        if case in ("biases", "qwen3"):
            shapes[f"{p}.self_attn.o_proj.bias"] = (D,)
        if case == "biases":
            shapes |= {f"{p}.mlp.gate_proj.bias": (F,), f"{p}.mlp.up_proj.bias": (F,)}
            shapes[f"{p}.mlp.down_proj.bias"] = (D,)
        if case == "qwen3":
            shapes |= {f"{p}.self_attn.q_norm.weight": (H,), f"{p}.self_attn.k_norm.weight": (H,)}
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def expected(hf: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Attribute path -> array, from the meaning of each: rows are outputs, heads come first."""
    moved = {"embed.table_VD": hf["model.embed_tokens.weight"]}
    moved["final_norm.scale_D"] = hf["model.norm.weight"]
    if "lm_head.weight" in hf:
        moved["head_DV"] = np.swapaxes(hf["lm_head.weight"], 0, 1)
    for layer in range(L):
        p, a = f"model.layers.{layer}", f"layers.{layer}"
        moved[f"{a}.attention_norm.scale_D"] = hf[f"{p}.input_layernorm.weight"]
        moved[f"{a}.mlp_norm.scale_D"] = hf[f"{p}.post_attention_layernorm.weight"]
        for x, axes in (("q", "DX"), ("k", "DY"), ("v", "DY"), ("o", "XD")):
            matrix = hf[f"{p}.self_attn.{x}_proj.weight"]
            moved[f"{a}.attention.{x}_{axes}"] = np.swapaxes(matrix, 0, 1)
            if x != "o" and f"{p}.self_attn.{x}_proj.bias" in hf:
                bias = hf[f"{p}.self_attn.{x}_proj.bias"]
                moved[f"{a}.attention.{x}_bias_{axes[1]}"] = bias
        for x, axes in (("gate", "DF"), ("up", "DF"), ("down", "FD")):
            moved[f"{a}.mlp.{x}_{axes}"] = np.swapaxes(hf[f"{p}.mlp.{x}_proj.weight"], 0, 1)
            if f"{p}.mlp.{x}_proj.bias" in hf:
                moved[f"{a}.mlp.{x}_bias_{axes[1]}"] = hf[f"{p}.mlp.{x}_proj.bias"]
        if f"{p}.self_attn.o_proj.bias" in hf:
            moved[f"{a}.attention.o_bias_D"] = hf[f"{p}.self_attn.o_proj.bias"]
        for x in ("q", "k"):
            if f"{p}.self_attn.{x}_norm.weight" in hf:
                norm = hf[f"{p}.self_attn.{x}_norm.weight"]
                moved[f"{a}.attention.{x}_norm.scale_H"] = norm
    return moved


def write(folder: Path, case: str, hf: dict[str, np.ndarray], shards: int = 1) -> Path:
    (folder / "config.json").write_text(json.dumps(BASE | CASES[case]))
    if shards == 1:
        save_file(hf, folder / "model.safetensors")
        return folder
    weight_map = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {key: hf[key] for key in list(hf)[shard::shards]}
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def leaves(decoder) -> dict[str, jax.Array]:
    """Attribute path -> array, of every leaf of the decoder whatever its kind."""
    flat = nnx.to_flat_state(nnx.state(decoder))
    return {".".join(str(part) for part in path): leaf.get_value() for path, leaf in flat}


def load(folder: Path, **options):
    return load_decoder(folder, progress=False, **options)


def refusal(folder: Path, **options) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        load(folder, **options)
    assert type(caught.value) is ValueError
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_every_tensor_lands_in_its_place(tmp_path, case, shards):
    hf = tensors(case)
    loaded, wanted = leaves(load(write(tmp_path, case, hf, shards))), expected(hf)
    assert loaded.keys() == wanted.keys()
    for name, array in wanted.items():
        assert isinstance(loaded[name], jax.Array)
        assert loaded[name].dtype == jnp.float32
        np.testing.assert_array_equal(loaded[name], array, err_msg=name, strict=True)


def test_projections_compute_what_transformers_computes(tmp_path):
    hf = tensors("qwen2")
    attention = load(write(tmp_path, "qwen2", hf)).layers[1].attention
    x_TD = np.random.default_rng(1).standard_normal((5, D)).astype(np.float32)
    p = "model.layers.1.self_attn"
    theirs = x_TD @ hf[f"{p}.q_proj.weight"].T + hf[f"{p}.q_proj.bias"]
    q_TX = x_TD @ attention.q_DX[...] + attention.q_bias_X[...]
    np.testing.assert_allclose(q_TX, theirs, atol=1e-4)
    theirs = np.asarray(q_TX) @ hf[f"{p}.o_proj.weight"].T
    out_TD = q_TX @ attention.o_XD[...]
    np.testing.assert_allclose(out_TD, theirs, atol=1e-3)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("stored", STORED)
def test_dtypes_on_disk_and_in_memory(tmp_path, stored, dtype):
    hf = tensors("qwen3", STORED[stored])
    loaded = leaves(load(write(tmp_path, "qwen3", hf), dtype=dtype))
    for name, array in expected(hf).items():
        assert loaded[name].dtype == dtype
        np.testing.assert_array_equal(loaded[name], array.astype(dtype), err_msg=name)


def test_buffers_and_a_head_that_tied_embeddings_do_not_need_are_ignored(tmp_path):
    hf = tensors("tied")
    spare = {"lm_head.weight": np.zeros((3, 3), np.int8)}
    spare["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(5, np.float64)
    decoder = load(write(tmp_path, "tied", hf | spare))
    assert decoder.head_DV is None
    assert leaves(decoder).keys() == expected(hf).keys()


def test_a_tied_head_that_alone_was_saved_is_the_embedding(tmp_path):
    hf = tensors("tied")
    saved = {name: array for name, array in hf.items() if name != "model.embed_tokens.weight"}
    saved["lm_head.weight"] = hf["model.embed_tokens.weight"]
    decoder = load(write(tmp_path, "tied", saved))
    np.testing.assert_array_equal(decoder.embed.table_VD[...], hf["model.embed_tokens.weight"])
    assert decoder.head_DV is None
    del saved["lm_head.weight"]
    assert "lacks tensor 'model.embed_tokens.weight'" in refusal(write(tmp_path, "tied", saved))


@pytest.mark.parametrize("case", CASES)
def test_specs_describe_file_and_decoder(tmp_path, case):
    hf = tensors(case)
    decoder = load(write(tmp_path, case, hf))
    specs = tensor_specs(load_config(tmp_path))
    assert {name: spec.file_shape for name, spec in specs.items()} == {
        name: array.shape for name, array in hf.items()
    }
    assert {spec.attribute: spec.shape for spec in specs.values()} == {
        name: array.shape for name, array in leaves(decoder).items()
    }
    sizes = {"V": V, "D": D, "X": N * H, "Y": K * H, "H": H, "F": F}
    assert all(spec.shape == tuple(sizes[axis] for axis in spec.axes) for spec in specs.values())


def host_copies_left(monkeypatch, folder: Path) -> int:
    """The most host arrays, of tensors that are done with, alive when another tensor is read."""
    read, lay_out = weights._read_tensor, weights._lay_out
    arrays, left = [], []

    def owned(array, spare):
        # It owns its memory, so that a view keeps it alive; off by one value, so that JAX, which
        # shares the memory of an aligned array on a CPU, makes its own copy.
        block = np.empty(array.size + spare, array.dtype)
        block[spare:] = array.ravel()
        arrays.append(weakref.ref(block))
        return block[spare:].reshape(array.shape)

    def counting_read(file, name):
        left.append(sum(array() is not None for array in arrays))
        return owned(read(file, name), 0)

    monkeypatch.setattr(weights, "_read_tensor", counting_read)
    monkeypatch.setattr(weights, "_lay_out", lambda *args: owned(lay_out(*args), 1))
    load(folder)
    assert len(arrays) == 2 * len(left) == 2 * len(tensor_specs(load_config(folder)))
    return max(left)


@pytest.mark.parametrize("stored", STORED)
def test_host_copies_die_before_the_next_tensor_is_read(tmp_path, monkeypatch, stored):
    hf = tensors("qwen3", STORED[stored])
    assert host_copies_left(monkeypatch, write(tmp_path, "qwen3", hf, 2)) == 0


@pytest.mark.parametrize("leak", ["raw", "laid out"])
def test_the_count_of_host_copies_notices_a_leak(tmp_path, monkeypatch, leak):
    kept, place, lay_out = [], jax.device_put, weights._lay_out

    def keep(array):
        kept.append(array[:1])
        return array

    if leak == "raw":
        monkeypatch.setattr(weights, "_lay_out", lambda raw, *args: lay_out(keep(raw), *args))
    else:
        monkeypatch.setattr(weights.jax, "device_put", lambda array: place(keep(array)))
    hf = tensors("llama")
    assert host_copies_left(monkeypatch, write(tmp_path, "llama", hf)) == len(hf) - 1


def test_no_random_weights_are_made(tmp_path, monkeypatch):
    folder, read, seen = write(tmp_path, "llama", tensors("llama")), weights._read_tensor, []
    gc.collect()
    before = sum(array.nbytes for array in jax.live_arrays())

    def looking(file, name):
        seen.append(sum(array.nbytes for array in jax.live_arrays()) - before)
        return read(file, name)

    monkeypatch.setattr(weights, "_read_tensor", looking)
    decoder = load(folder)
    assert seen[0] < 100
    assert seen[-1] > 0.5 * sum(array.nbytes for array in leaves(decoder).values())


def test_progress_bar_on_stderr(tmp_path, capsys):
    folder = write(tmp_path, "llama", tensors("llama"))
    load_decoder(folder, progress=False)
    assert capsys.readouterr() == ("", "")
    load_decoder(folder)
    out, err = capsys.readouterr()
    assert out == ""
    assert "weights" in err


NAME = "model.layers.1.mlp.up_proj.weight"


def test_missing_tensors(tmp_path):
    hf = tensors("llama")
    del hf[NAME]
    message = refusal(write(tmp_path, "llama", hf))
    assert message.startswith(f"{tmp_path / 'model.safetensors'} lacks tensor '{NAME}', expected")
    message = refusal(write(tmp_path, "biases", hf))
    assert "lacks tensor 'model.layers.0.self_attn.q_proj.bias' (and 14 more), expected" in message


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model.layers.2.mlp.up_proj.weight", np.zeros(2, np.float32), "not expected in a Llama"),
        (
            "model.layers.0.self_attn.q_proj.bias",
            np.zeros(2, np.float32),
            "not expected in a Llama",
        ),
        (NAME, np.zeros((D, F), np.float32), r"shape \(24, 300\), expected \(300, 24\)"),
        (NAME, np.zeros((F, D), np.int8), "dtype I8, expected one of BF16, F16, F32"),
        (NAME, np.zeros((F, D), np.float64), "dtype F64, expected one of BF16, F16, F32"),
        (NAME, np.zeros((F, D), ml_dtypes.float8_e4m3fn), "dtype F8_E4M3, expected one of"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path, monkeypatch, name, value, message, shards):
    monkeypatch.setattr(weights, "_read_tensor", lambda *_: pytest.fail("read before the checks"))
    refused = refusal(write(tmp_path, "llama", tensors("llama") | {name: value}, shards))
    assert re.search(message, refused)
    assert repr(name) in refused
    assert re.match(rf"{re.escape(str(tmp_path))}/model\S*\.safetensors", refused)


def test_values_beyond_float16(tmp_path):
    hf = tensors("llama", ml_dtypes.bfloat16)
    hf[NAME][7, 3] = 1e6
    message = refusal(write(tmp_path, "llama", hf), dtype=jnp.float16)
    assert repr(NAME) in message
    assert "65504" in message
    assert leaves(load(tmp_path))["layers.1.mlp.up_DF"][3, 7] == hf[NAME][7, 3]


@pytest.mark.parametrize("dtype", ["float64", "int8", "float31"])
def test_dtypes_that_are_not_offered(tmp_path, dtype):
    message = refusal(write(tmp_path, "llama", tensors("llama")), dtype=dtype)
    assert message == f"dtype must be float32, bfloat16 or float16, got {dtype!r}"


SHARD = "model-00002-of-00003.safetensors"


@pytest.mark.parametrize("name", ["model.safetensors", SHARD])
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: data[:-5], "not fully covered"),
        (lambda data: data[:20], "header"),
        (lambda data: b"", "header"),
        (lambda data: b"\xff" * 64, "header"),
        (lambda data: data + b"more", "not fully covered"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\n", "a git-lfs pointer, the"),
    ],
)
def test_damaged_files(tmp_path, name, damage, reason):
    path = write(tmp_path, "llama", tensors("llama"), 3 if name == SHARD else 1) / name
    path.write_bytes(damage(path.read_bytes()))
    message = refusal(tmp_path)
    assert message.startswith(f"{path} is not a complete safetensors file (")
    assert reason in message


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [1 << 40, 1 << 40]},
        {"shape": [D, F]},
        {"shape": [-1]},
        {"dtype": "F64"},
        {"dtype": "nope"},
        {"data_offsets": [0, 1 << 50]},
        {"data_offsets": [4, 8]},
    ],
    ids=str,
)
def test_headers_that_lie(tmp_path, change):
    path = write(tmp_path, "llama", tensors("llama")) / "model.safetensors"
    whole = path.read_bytes()
    (size,) = struct.unpack("<Q", whole[:8])
    header = json.loads(whole[8 : 8 + size])
    header[NAME] |= change
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + whole[8 + size :])
    message = refusal(tmp_path)
    assert message.startswith(str(path))
    assert "\n" not in message


def test_json_without_an_end(tmp_path):
    folder = write(tmp_path, "llama", tensors("llama"), 3)
    index, deep = folder / "model.safetensors.index.json", "[" * 200_000
    index.write_text(deep)
    assert refusal(folder) == f"{index} must be JSON with an object 'weight_map'"
    (folder / "config.json").write_text(deep)
    assert refusal(folder).startswith(f"{folder / 'config.json'}: not valid JSON (maximum recur")


def edit_index(folder: Path, change) -> Path:
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    change(content["weight_map"])
    index.write_text(json.dumps(content))
    return index


def test_index_and_shards_that_disagree(tmp_path):
    folder = write(tmp_path, "llama", tensors("llama"), 3)
    owner = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][NAME]
    index = edit_index(folder, lambda names: names.pop(NAME))
    assert (
        refusal(folder)
        == f"{folder / owner} holds tensor '{NAME}', which {index.name} does not name"
    )
    other = next(x for x in ("model-00001-of-00003.safetensors", SHARD) if x != owner)
    edit_index(folder, lambda names: names.update({NAME: other}))
    assert (
        refusal(folder)
        == f"{folder / other} lacks tensor '{NAME}', which {index.name} places there"
    )
    edit_index(folder, lambda names: names.update({NAME: "../elsewhere.safetensors"}))
    save_file({NAME: np.zeros((F, D), np.float32)}, tmp_path.parent / "elsewhere.safetensors")
    assert refusal(folder).startswith(
        f"{index} names the shard '../elsewhere.safetensors', which is"
    )
    edit_index(folder, lambda names: names.update({NAME: owner}))
    assert leaves(load(folder)).keys() == expected(tensors("llama")).keys()
    (folder / SHARD).unlink()
    assert refusal(folder) == f"{index} names the shard '{SHARD}', which is not in {folder}"


@pytest.mark.parametrize("text", ["{nope", "[]", "{}", '{"weight_map": 3}', "\x00"])
def test_damaged_index(tmp_path, text):
    folder = write(tmp_path, "llama", tensors("llama"), 3)
    index = folder / "model.safetensors.index.json"
    index.write_text(text)
    assert refusal(folder) == f"{index} must be JSON with an object 'weight_map'"


def test_folders_without_weights(tmp_path):
    folder = write(tmp_path, "llama", tensors("llama"))
    (folder / "model.safetensors").unlink()
    neither = f"{folder} must hold model.safetensors or model.safetensors.index.json"
    assert refusal(folder) == neither
    (folder / "pytorch_model.bin").touch()
    assert refusal(folder) == (
        f"{neither}; pytorch_model.bin is not read, convert it with transformers:"
        f" AutoModelForCausalLM.from_pretrained({str(folder)!r}).save_pretrained(FOLDER)"
    )
    assert str(tmp_path / "absent") in refusal(tmp_path / "absent")
    assert str(folder / "config.json") in refusal(folder / "config.json")


@pytest.mark.parametrize("folder", FIXTURES, ids=lambda folder: folder.name)
def test_fixtures_written_by_transformers_load(folder):
    hf = {}
    for path in folder.glob("*.safetensors"):
        hf |= load_file(path)
    decoder = load(folder)
    specs = tensor_specs(decoder.config)
    loaded = leaves(decoder)
    assert len(loaded) == len(specs) > 20
    for name, spec in specs.items():
        stored = np.sort(hf[name].astype(np.float32), axis=None)
        np.testing.assert_array_equal(np.sort(loaded[spec.attribute], axis=None), stored)
