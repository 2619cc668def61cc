"""GGUF files: weights, config, conversion, and the message of every refusal.

What a type of block means is spelled out in float64, not taken from the package that reads it.
"""

import json
import re
import struct
import sys
from pathlib import Path

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf_cases import (
    CASES,
    HF,
    SIZES,
    TOKENS,
    VOCABULARY,
    D,
    H,
    N,
    V,
    stored,
    tensors,
    write,
)
from safetensors.numpy import load_file, save_file

import kvjax
from kvjax.inputs.gguf_tokenizer import tokenizer_parts
from kvjax.models.checkpoints.gguf import (
    convert_gguf,
    load_gguf,
    load_gguf_config,
    load_gguf_tokenizer,
)
from kvjax.models.checkpoints.gguf_config import hf_config, llama3_scaling
from kvjax.models.checkpoints.gguf_file import TYPES, Tensor, TensorFile, is_gguf, read_gguf
from kvjax.models.checkpoints.weights import parameter_at, tensor_specs
from kvjax.models.config import ModelConfig
from kvjax.models.layers import rope_frequencies
from kvjax.models.rope_scaling import RopeScaling
from kvjax.sharding import make_mesh


def leaves(model) -> dict[str, np.ndarray]:
    specs = tensor_specs(model.config).values()
    return {one.attribute: np.asarray(parameter_at(model, one.attribute)[...]) for one in specs}


def refusal(path: Path, call=kvjax.load, **options) -> str:
    with pytest.raises(ValueError, match=re.escape(str(path.parent))) as caught:
        call(path, progress=False, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---------------------------------------------------------------------------- weights
@pytest.mark.parametrize("case", CASES)
def test_a_file_loads_like_the_same_weights_in_a_directory(tmp_path, case):
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(HF | CASES[case][2]))
    save_file(tensors(case), folder / "model.safetensors")
    theirs = kvjax.load(folder, progress=False)[0]
    ours, tokenizer = kvjax.load(write(tmp_path / "tiny.gguf", case), progress=False)
    assert ours.config == theirs.config
    assert len(tokenizer) == len(TOKENS)
    wanted = leaves(theirs)
    for name, array in leaves(ours).items():
        np.testing.assert_array_equal(array, wanted[name], err_msg=name)


def test_logits_equal_those_of_the_directory_that_convert_writes(tmp_path, run):
    source = write(tmp_path / "tiny.gguf")
    assert run("convert", source, tmp_path / "out")[:2] == (0, f"{tmp_path / 'out'}\n")
    ours, tokenizer = kvjax.load(source, progress=False)
    theirs, other = kvjax.load(tmp_path / "out", progress=False)
    assert ours.config == theirs.config
    tokens = jnp.asarray([tokenizer("hello world 12")["input_ids"]])
    np.testing.assert_array_equal(ours(tokens), theirs(tokens))
    assert other("hello world 12")["input_ids"] == tokens[0].tolist()
    assert other.chat_template == VOCABULARY["tokenizer.chat_template"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "tiny.gguf"]
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    saved = load_file(tmp_path / "out" / "model.safetensors")
    for name, array in tensors("llama").items():
        np.testing.assert_array_equal(saved[name], array)


@pytest.mark.parametrize("case", CASES)
def test_what_convert_writes_is_the_same_model(tmp_path, case):
    source = write(tmp_path / "tiny.gguf", case)
    out = convert_gguf(source, tmp_path / "out", dtype="bfloat16", progress=False)
    ours = load_gguf(source, dtype=jnp.bfloat16, progress=False)
    theirs = kvjax.load(out, dtype=jnp.bfloat16, progress=False)[0]
    assert ours.config == theirs.config
    wanted = leaves(theirs)
    for name, array in leaves(ours).items():
        np.testing.assert_array_equal(array, wanted[name], err_msg=name)


def test_convert_leaves_nothing_half_written(tmp_path):
    arrays = stored("llama")
    arrays["blk.1.ffn_up.weight"][3, 5] = 1e6
    source = write(tmp_path / "tiny.gguf", arrays=arrays)
    with pytest.raises(ValueError, match=r"tiny\.gguf: tensor '.*1\.mlp\.up.*' .*float16's 65504"):
        convert_gguf(source, tmp_path / "out", dtype="float16", progress=False)
    assert "65504" in refusal(source, dtype=jnp.float16)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ValueError, match="is not empty"):
        convert_gguf(source, tmp_path / "full", progress=False)


def test_convert_to_orbax_takes_the_tokenizer_along(tmp_path, run):
    source = write(tmp_path / "tiny.gguf", "qwen2")
    flags = ["convert", "--to", "orbax", source, tmp_path / "out", "--dtype", "float32"]
    assert run(*flags)[0] == 0
    model, tokenizer = kvjax.load(tmp_path / "out", progress=False)
    for name, array in leaves(load_gguf(source, progress=False)).items():
        np.testing.assert_array_equal(leaves(model)[name], array)
    assert tokenizer("hello")["input_ids"] == [TOKENS.index("hello")]


def test_commands_take_a_file_where_they_take_a_directory(tmp_path, run):
    source = write(tmp_path / "tiny.gguf")
    flags = ["--method", "snapkv", "--budget", "8", "--max-new-tokens", "4"]
    code, out, err = run("generate", "--model", source, "--prompt", "hello world " * 4, *flags)
    assert (code, bool(out)) == (0, True), err
    code, _, err = run("generate", "--model", tmp_path / "no.gguf", "--prompt", "a")
    assert (code, err.count("\n")) == (2, 1)
    assert "no.gguf cannot be read (No such file or directory)" in err


@pytest.mark.parametrize("case", ["llama", "qwen3"])
def test_a_mesh_holds_the_parts_of_the_same_weights(tmp_path, case):
    source = write(tmp_path / "tiny.gguf", case)
    whole = leaves(load_gguf(source, progress=False))
    model = load_gguf(source, progress=False, mesh=make_mesh(data=1, model=2))
    for name, array in leaves(model).items():
        np.testing.assert_array_equal(array, whole[name], err_msg=name)
    q_DX = model.layers[0].attention.q_DX[...]
    assert {shard.data.shape for shard in q_DX.addressable_shards} == {(D, N * H // 2)}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_dtypes_in_memory(tmp_path, dtype):
    arrays = stored("llama")
    arrays = {name: one.astype(np.float16) if one.ndim > 1 else one for name, one in arrays.items()}
    model = load_gguf(write(tmp_path / "tiny.gguf", arrays=arrays), dtype=dtype, progress=False)
    found = leaves(model)
    assert {array.dtype for array in found.values()} == {np.dtype(dtype)}
    expected = arrays["blk.0.ffn_up.weight"].astype(dtype).T
    np.testing.assert_array_equal(found["layers.0.mlp.up_DF"], expected)


def test_a_model_in_parts(tmp_path):
    write(tmp_path / "tiny.gguf", split_max_tensors=8)
    parts = sorted(tmp_path.glob("tiny-*.gguf"))
    assert parts[0].name == f"tiny-00001-of-{len(parts):05}.gguf"
    assert len(parts) > 2
    whole = leaves(load_gguf(write(tmp_path / "whole.gguf"), progress=False))
    for name, array in leaves(load_gguf(parts[0], progress=False)).items():
        np.testing.assert_array_equal(array, whole[name])
    assert f"is not the first of {len(parts)} parts, expected {parts[0].name}" in refusal(parts[1])
    (tmp_path / "other.gguf").write_bytes(parts[0].read_bytes())
    assert "expected the first under its name" in refusal(tmp_path / "other.gguf")
    other = write(tmp_path / "odd.gguf", change={"split.count": [1, 2]})
    assert "is one of array([1, 2]" in refusal(other)
    content = parts[1].read_bytes()
    parts[1].write_bytes(parts[2].read_bytes())
    assert f"{parts[1]}: split.no must be 1, got 2" == refusal(parts[0])
    parts[1].write_bytes(content[:-1000])
    assert f"{parts[1]} is not a complete GGUF file (it has " in refusal(parts[0])
    parts[1].unlink()
    assert refusal(parts[0]).startswith(f"{parts[1]} cannot be read (No such file")


# ---------------------------------------------------------------------------- blocks
def half(rng, count: int) -> tuple[bytes, np.ndarray]:
    """Scales: bytes of fp16, and what they say."""
    values = rng.normal(0, 0.05, count).astype("<f2")
    return values.tobytes(), values.astype(np.float64)


def q4_0(rng):
    """x = d (q - 8); byte i has value i in its low half and value i + 16 in its high one."""
    raw, (d,) = half(rng, 1)
    q = rng.integers(0, 256, 16, np.uint8)
    return raw + q.tobytes(), d * (np.concatenate([q & 15, q >> 4]).astype(np.float64) - 8)


def q4_1(rng):
    """x = d q + m."""
    raw, (d, m) = half(rng, 2)
    q = rng.integers(0, 256, 16, np.uint8)
    return raw + q.tobytes(), d * np.concatenate([q & 15, q >> 4]) + m


def q8_0(rng):
    """x = d q."""
    raw, (d,) = half(rng, 1)
    q = rng.integers(-128, 128, 32, np.int8)
    return raw + q.tobytes(), d * q


def q4_k(rng):
    """x = d s q - dmin m, with scales s and mins m of 6 bits for each of 8 groups of 32 values.

    Bytes 0 .. 3 have the scales of groups 0 .. 3 in 6 bits, bytes 4 .. 7 their mins; the rest has
    groups 4 .. 7: 4 bits of the scale and of the min in bytes 8 .. 11, and the upper 2 bits of each
    in the upper bits of the bytes before. 32 bytes have a group in their low halves, the next in
    their high ones.
    """
    raw, (d, dmin) = half(rng, 2)
    s, m = rng.integers(0, 64, 8), rng.integers(0, 64, 8)
    packed = [int(s[i] | s[i + 4] >> 4 << 6) for i in range(4)]
    packed += [int(m[i] | m[i + 4] >> 4 << 6) for i in range(4)]
    packed += [int(s[i] & 15 | (m[i] & 15) << 4) for i in range(4, 8)]
    q = rng.integers(0, 16, (8, 32))
    halves = (q[::2] | q[1::2] << 4).astype(np.uint8)
    values = d * s[:, None] * q - dmin * m[:, None]
    return raw + bytes(packed) + halves.tobytes(), values.ravel()


def q6_k(rng):
    """x = d s (q - 32), with a signed byte s for each of 16 groups of 16 values.

    Of each half of 128 values: bytes l and l + 32 of the low bits have 4 bits of the values l and
    l + 32, and in their high halves of l + 64 and l + 96; byte l of the high bits has the upper 2
    bits of all four, l from 0 to 31.
    """
    raw, (d,) = half(rng, 1)
    s, q = rng.integers(-128, 128, 16), rng.integers(0, 64, (2, 4, 32))
    low = [np.concatenate([one[0] & 15 | (one[2] & 15) << 4, one[1] & 15 | (one[3] & 15) << 4])
           for one in q]  # fmt: skip
    high = [sum(one[i] >> 4 << 2 * i for i in range(4)) for one in q]
    packed = [np.concatenate(part).astype(np.uint8).tobytes() for part in (low, high)]
    values = d * np.repeat(s, 16) * (q.ravel() - 32)
    return b"".join(packed) + s.astype(np.int8).tobytes() + raw, values


@pytest.mark.parametrize(
    "block", [q4_0, q4_1, q8_0, q4_k, q6_k], ids=lambda block: block.__name__.upper()
)
def test_blocks_are_dequantised_as_written(tmp_path, block):
    name, rng = block.__name__.upper(), np.random.default_rng(1)
    made = [block(rng) for _ in range(40 * 2)]
    rows = np.stack([one for _, one in made]).reshape(40, -1)
    raw = np.frombuffer(b"".join(one for one, _ in made), np.uint8)
    path = tmp_path / "blocks"
    path.write_bytes(b"\0" * 32 + raw.tobytes())
    tensor = Tensor(path, rows.shape, name, 32, len(raw))
    order = rng.permutation(40)
    with TensorFile(path, {"a": tensor}, {}) as file:
        found = file.get_tensor("a")
        assert (found.shape, found.ndim, len(found)) == (rows.shape, 2, 40)
        np.testing.assert_allclose(found[:], rows, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(found[3:9, 5:40], rows[3:9, 5:40], rtol=1e-6, atol=1e-6)
    with TensorFile(path, {"a": tensor}, {"a": order}) as file:
        found = file.get_slice("a")
        np.testing.assert_allclose(found[2:7], rows[order][2:7], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", [Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0, Type.BF16])
def test_quantised_files_come_close(tmp_path, kind):
    arrays = stored("llama")
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in SIZES.items():
        writer.add_uint32(f"llama.{name}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    for name, array in arrays.items():
        quantised = gguf.quantize(array, kind) if array.ndim > 1 else array
        writer.add_tensor(name, quantised, raw_dtype=kind if array.ndim > 1 else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model, tokenizer = kvjax.load(path, progress=False)
    assert tokenizer is None
    assert (model.config.bos_token_id, model.config.eos_token_ids) == (None, ())
    expected = tensors("llama")["model.layers.1.self_attn.q_proj.weight"].T
    error = np.abs(leaves(model)["layers.1.attention.q_DX"] - expected)
    # Half a step: the largest value of a block over the number of steps on a side.
    assert error.max() < {"4": 0.12, "5": 0.06, "8": 0.01, "F": 0.01}[kind.name[1]]


def test_every_type_that_is_offered_is_dequantised(tmp_path):
    path = tmp_path / "zeros"
    path.write_bytes(bytes(4096))
    for name in TYPES:
        block, size = gguf.GGML_QUANT_SIZES[Type[name]]
        tensor = Tensor(path, (3, block), name, 0, 3 * size)
        with TensorFile(path, {"a": tensor}, {}) as file:
            rows = file.get_tensor("a")[1:]
            assert (rows.shape, rows.dtype) == ((2, block), np.float32), name


# ---------------------------------------------------------------------------- config
def llama3_factors(scaling: RopeScaling, theta: float, head_dim: int) -> np.ndarray:
    """By how much this scaling divides each frequency."""
    shape = dict(architecture="LlamaForCausalLM", vocab_size=8, hidden_size=8, intermediate_size=8)
    shape |= dict(num_layers=1, num_heads=1, num_kv_heads=1, head_dim=head_dim, rope_theta=theta)
    plain, scaled = (ModelConfig(**shape, rope_scaling=one) for one in (None, scaling))
    return np.asarray(rope_frequencies(plain) / rope_frequencies(scaled), np.float32)


@pytest.mark.parametrize(
    ("scaling", "theta", "head_dim"),
    [
        (RopeScaling("llama3", 8.0), 500000.0, 128),  # Llama 3.1
        (RopeScaling("llama3", 32.0), 500000.0, 64),  # Llama 3.2
        (RopeScaling("llama3", 5.0, 1.0, 3.0, 2048), 10000.0, 128),
        (RopeScaling("llama3", 16.0, 2.0, 8.0, 32768), 1e6, 128),
    ],
)
def test_llama3_scaling_is_found_in_its_factors(tmp_path, scaling, theta, head_dim):
    factors = llama3_factors(scaling, theta, head_dim)
    found = llama3_scaling(factors, theta)
    kind = found.pop("rope_type")
    again = llama3_factors(RopeScaling(kind, **found), theta, head_dim)
    np.testing.assert_allclose(again, factors, rtol=1e-5)
    if scaling.original_max_position_embeddings == 8192:
        assert RopeScaling(kind, **found) == scaling


def test_frequency_factors_of_a_file(tmp_path):
    scaling = RopeScaling("llama3", 8.0)
    factors = llama3_factors(scaling, 500000.0, H)
    arrays = stored("llama") | {"rope_freqs.weight": factors}
    theta = {"llama.rope.freq_base": 500000.0}
    path = write(tmp_path / "tiny.gguf", change=theta, arrays=arrays)
    assert load_gguf_config(path).rope_scaling == scaling
    arrays["rope_freqs.weight"] = np.ones(H // 2, np.float32)
    assert load_gguf_config(write(path, arrays=arrays)).rope_scaling is None
    arrays["rope_freqs.weight"] = np.ones(5, np.float32)
    message = "the shape of rope_freqs.weight must be (4,), half of a head, got (5,)"
    assert message in refusal(write(path, arrays=arrays))
    arrays["rope_freqs.weight"] = np.array([1, 2, 3, 1], np.float32)
    assert "rope_freqs.weight must be the factors of Llama 3's scaling" in refusal(
        write(path, arrays=arrays)
    )


def test_linear_scaling_and_what_changes_nothing(tmp_path):
    change = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    change |= {"llama.expert_count": 0, "llama.vocab_size": V, "llama.rope.dimension_count": H}
    config = load_gguf_config(write(tmp_path / "tiny.gguf", change=change))
    assert config.rope_scaling == RopeScaling("linear", 4.0)
    assert config.max_position_embeddings == 4 * 128


def test_yarn_is_read_as_config_json_has_it(tmp_path):
    names = {"type": "yarn", "factor": 4.0, "original_context_length": 32}
    names |= {"yarn_beta_fast": 16.0, "yarn_attn_factor": 1.5}
    change = {f"llama.rope.scaling.{name}": value for name, value in names.items()}
    found = hf_config(read_gguf(write(tmp_path / "tiny.gguf", change=change)))
    assert found["rope_scaling"] == {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32,
        "beta_fast": 16.0, "attention_factor": 1.5,
    }  # fmt: skip
    change["llama.rope.scaling.attn_factor"] = 2.0
    message = refusal(write(tmp_path / "tiny.gguf", change=change))
    assert "llama.rope.scaling.attn_factor is 2.0, expected no such setting" in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"general.architecture": "gemma3"}, "general.architecture must be one of llama, qwen2, "),
        ({"general.type": "mmproj"}, "general.type must be 'model', got 'mmproj'"),
        ({"llama.expert_count": 8}, "llama.expert_count must be 0, got 8"),
        ({"llama.logit_scale": 2.0}, "llama.logit_scale is 2.0, expected no such setting"),
        ({"llama.rope.scaling.type": "longrope"}, "llama.rope.scaling.type must be 'none', 'line"),
        ({"llama.rope.dimension_count": 4}, "llama.rope.dimension_count must be 8, as keys have"),
        ({"llama.attention.value_length": 4}, "llama.attention.value_length must be 8, as keys"),
        ({"llama.block_count": None}, "llama.block_count must be a positive integer, got None"),
        ({"llama.attention.head_count_kv": [1, 2]}, "llama.attention.head_count_kv must be a pos"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, "layer_norm_rms_epsilon must be a pos"),
        ({"llama.block_count": 3}, "lacks tensor 'blk.2.attn_norm.weight' (and 8 more), expected"),
        ({"llama.block_count": 1}, "holds tensor 'blk.1.attn_norm.weight', not expected in a Llam"),
        ({"llama.feed_forward_length": 65}, "has shape (64, 32), expected (65, 32), as metadata"),
        ({"tokenizer.ggml.model": "bert"}, "tokenizer.ggml.model must be 'gpt2' or 'llama', got"),
        ({"tokenizer.ggml.pre": "mine"}, "tokenizer.ggml.pre must be one of codeshell, "),
        ({"tokenizer.ggml.merges": ["h q"]}, "tokenizer.ggml.merges has 'h q', expected two"),
        ({"tokenizer.ggml.merges": None}, "tokenizer.ggml.merges must be a list of texts, got No"),
        ({"tokenizer.ggml.tokens": ["a", "b", "a"]}, "tokenizer.ggml.tokens has 'a' twice"),
        ({"tokenizer.ggml.tokens": ["a", "b" * 600]}, "expected at most 512 characters"),
        ({"tokenizer.ggml.token_type": [1]}, "token_type must have a number for each of 269 tok"),
        ({"tokenizer.ggml.eos_token_id": 999}, "eos_token_id must be a token id (0 to 268), got 9"),
        (
            {
                "tokenizer.ggml.tokens": [str(i) for i in range(301)],
                "tokenizer.ggml.token_type": None,
            },
            "the number of tokenizer.ggml.tokens must be at most the 300 rows of token_embd.weight",
        ),
        ({"tokenizer.ggml.add_bos_token": 3}, "add_bos_token must be true or false, got 3"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path, change, message):
    assert message in refusal(write(tmp_path / "tiny.gguf", change=change))


def test_types_and_windows_that_are_not_read(tmp_path):
    arrays = stored("llama")
    arrays["blk.0.ffn_up.weight"] = arrays["blk.0.ffn_up.weight"].astype(np.float64)
    message = refusal(write(tmp_path / "tiny.gguf", arrays=arrays))
    assert (
        "tensor 'blk.0.ffn_up.weight' has dtype F64, expected one of F32, F16, BF16, Q4_0"
        in message
    )
    change = {"qwen2.attention.sliding_window": 8}
    message = refusal(write(tmp_path / "tiny.gguf", "qwen2", change))
    assert "qwen2.attention.sliding_window must be absent, got 8" in message


# ---------------------------------------------------------------------------- damaged files
EXTRA = (
    "attention.layer_norm_rms_epsilon", "attention.sliding_window", "attention.value_length",
    "attention.causal", "expert_count", "rope.freq_base", "rope.dimension_count",
    "rope.scaling.type", "rope.scaling.factor", "rope.scaling.finetuned",
)  # fmt: skip


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a GGUF file (it does not begin with 'GGUF')"),
        (b"GGUF", "is not a GGUF file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is not a GGUF file (a git-lfs pointer)"),
        (b"GGUF" + struct.pack("<I", 1), "is of version 1, expected version 2 or 3"),
        (b"GGUF" + struct.pack(">I", 3), "is big-endian, expected"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1, 1 << 60), "the file ends before what its header"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 62), "the file ends before what its header"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 0), "the key '' is empty or there twice"),
        (
            b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"a", 9, 8, 1 << 60),
            "the file ends before what its header announces",
        ),
        (
            b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"a", 9, 9, 1),
            "'a' is an array of the unknown type 9",
        ),
        (b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"a", 99), "'a' has the unknown type 99"),
        (b"GGUF" + struct.pack("<IQQQ1sIB", 3, 0, 1, 1, b"a", 7, 2), "'a' is 2, neither true nor"),
        (b"GGUF" + struct.pack("<IQQQ1sIQ", 3, 0, 1, 1, b"\xff", 4, 0), "a key is not UTF-8"),
    ],
)
def test_headers_that_lie(tmp_path, content, message):
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    assert message in refusal(path)


def test_a_header_without_an_end_is_not_read_to_it(tmp_path):
    """A file of a gigabyte of empty keys, or texts, would otherwise fill the memory."""
    path = tmp_path / "bad.gguf"
    with path.open("wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"a", 9, 8, 1 << 26))
        file.truncate(1 << 30)
    assert "the header passes 128 MiB before what its header announces" in refusal(path)


def test_tensors_that_lie(tmp_path):
    whole = write(tmp_path / "tiny.gguf").read_bytes()
    path = tmp_path / "bad.gguf"
    # "output_norm.weight" has one dimension, its length, its type and its offset behind its name.
    place = whole.index(b"output_norm.weight") + len(b"output_norm.weight")
    for offset, value, message in (
        (0, struct.pack("<I", 9), "has 9 dimensions"),
        (4, struct.pack("<Q", 1 << 60), "'output_norm.weight' ends at 461"),
        (4, struct.pack("<Q", 0), "of F32 has shape (0,)"),
        (12, struct.pack("<I", 77), "has type 77"),
        (12, struct.pack("<I", 12), "of Q4_K has shape (32,)"),
        (16, struct.pack("<Q", 1 << 40), "begins at byte 1099511627776 of the data, and the ones"),
    ):
        at = place + offset
        path.write_bytes(whole[:at] + value + whole[at + len(value) :])
        assert message in refusal(path)
    path.write_bytes(whole[: len(whole) - 200])
    assert f"(it has {len(whole) - 200} bytes, and " in refusal(path)


def test_a_hundred_damaged_files_are_each_one_sentence(tmp_path):
    whole = write(tmp_path / "tiny.gguf").read_bytes()
    header = len(whole) - sum(
        one.size for one in read_gguf(tmp_path / "tiny.gguf").tensors.values()
    )
    path, rng, refused = tmp_path / "bad.gguf", np.random.default_rng(0), 0
    for number in range(100):
        bad = bytearray(whole)
        if number % 4 == 0:
            bad = bad[: rng.integers(0, len(bad))]
        elif number % 4 == 1:
            at = int(rng.integers(4, header - 8))
            bad[at : at + 8] = struct.pack("<Q", int(rng.integers(1 << 62)))
        elif number % 4 == 2:
            for at in rng.integers(4, header, 20):
                bad[at] = rng.integers(256)
        else:
            at = int(rng.integers(4, header - 64))
            del bad[at : at + int(rng.integers(1, 64))]
        path.write_bytes(bytes(bad))
        if message := complaint(path):
            refused += 1
            assert str(path) in message
            assert "\n" not in message
    assert refused > 80


def test_metadata_of_other_types_are_each_one_sentence(tmp_path):
    """Whatever stands at a key, it is taken or refused in one sentence about a key."""
    source = read_gguf(write(tmp_path / "tiny.gguf"))
    keys = {f"llama.{name}" for name in (*SIZES, *EXTRA)} | VOCABULARY.keys()
    values = (0, 7, 0.5, float("nan"), True, "a text", ["a", "b"], np.array([1, 2]), np.ones(1))
    for key in sorted(keys | {"general.architecture", "general.type"}):
        for value in values:
            metadata = source.metadata | {key: value}
            try:
                ModelConfig.from_hf(hf_config(source._replace(metadata=metadata)))
                tokenizer_parts(metadata, 128)
            except ValueError as error:
                message = str(error)
                assert re.match(r"(the number of )?[\w.]+ (must|is|has)", message), message
                assert "\n" not in message


def complaint(path: Path) -> str:
    """What reading everything of a file, but for a model, says of it; nothing if all is well."""
    try:
        load_gguf_config(path)
        load_gguf_tokenizer(path)
        with TensorFile(path, read_gguf(path).tensors, {}) as file:
            for name in file.offset_keys():
                file.get_tensor(name)[:]
    except ValueError as error:
        return str(error)
    return ""


def test_other_names_and_folders(tmp_path):
    source = write(tmp_path / "tiny.gguf")
    other = tmp_path / "blob"
    other.write_bytes(source.read_bytes())
    assert load_gguf_config(other) == load_gguf_config(source)
    (tmp_path / "folder.gguf").mkdir()
    assert [is_gguf(path) for path in (source, other, tmp_path / "absent.gguf")] == [True] * 3
    assert not any(is_gguf(path) for path in (tmp_path, tmp_path / "no", tmp_path / "folder.gguf"))
    assert leaves(load_gguf(other, progress=False)).keys() == leaves(load_gguf(source)).keys()


def test_without_the_package_it_is_named(tmp_path, monkeypatch, run):
    source = write(tmp_path / "tiny.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(
        ImportError, match=r"GGUF files need the package gguf: pip install 'kvjax\["
    ):
        kvjax.load(source)
    code, _, err = run("generate", "--model", source, "--prompt", "a")
    assert (code, err) == (
        2,
        "kvjax: GGUF files need the package gguf: pip install 'kvjax[gguf]'\n",
    )
