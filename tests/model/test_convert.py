"""llama2.c conversion: tensors against files written here by hand, text against its `encode`."""

import json
import random
import struct
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import AutoTokenizer

from kvjax.models.checkpoints.llama2c import convert_llama2c

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
DIM, HIDDEN, LAYERS, HEADS, KV_HEADS, CONTEXT = 32, 24, 2, 4, 2, 8
SIZES, HEAD_DIM = (DIM, HIDDEN, LAYERS, HEADS, KV_HEADS), DIM // HEADS
GROUP_SIZE = 8
CONTROL = [("<unk>", 0.0), ("\n<s>\n", 0.0), ("\n</s>\n", 0.0)]
BYTES = [(f"<0x{i:02X}>", 0.0) for i in range(256)]
# Merged pieces come best first; "ana", "  " and "    " overlap with themselves, "<s" and "s>" would
# lead to "<s>" were it a piece that text may become.
MERGED = ["an", " b", "na", "ana", " ban", "  ", "    ", "nas", "aa", "aaa"]
MERGED += ["<s", "s>", "\n\n", "é!"]
LETTERS = [*" abns<>\n!", "é"]
PIECES = CONTROL + BYTES + [(p, -float(i)) for i, p in enumerate(MERGED + LETTERS)]
VOCAB = len(PIECES)
ODD = [
    "",
    " ",
    "   leading and trailing   ",
    "line\n\nbreak\r\n\ttab",
    "emoji 🙂👩‍👩‍👧 and é, 中文, \u2581 and \u200a",
    "bananas  bananas    <s> </s> <unk> <0x41> [INST]",
    "aaaaaaaaaaaaaaaaaaaaa" + " " * 33 + "\x00\x7f",
]


def ints(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}i", *numbers)


def write_vocabulary(path: Path, pieces: list[tuple[str, float]]) -> Path:
    encoded = [(piece.encode(), score) for piece, score in pieces]
    data = ints(max(len(piece) for piece, _ in encoded))
    data += b"".join(struct.pack("<fi", score, len(piece)) + piece for piece, score in encoded)
    path.write_bytes(data)
    return path


def random_model(shared: bool) -> dict[str, np.ndarray]:
    """Tensors under llama2.c's names, layers stacked in front."""
    rng = np.random.default_rng(0)
    sizes = {"V": VOCAB, "D": DIM, "F": HIDDEN, "L": LAYERS, "K": KV_HEADS * HEAD_DIM}
    shapes = dict(embed="VD", attention_norm="LD", wq="LDD", wk="LKD", wv="LKD", wo="LDD")
    shapes |= dict(ffn_norm="LD", w1="LFD", w2="LDF", w3="LFD", norm="D")
    shapes |= {} if shared else {"output": "VD"}
    drawn = {name: rng.normal(size=[sizes[a] for a in axes]) for name, axes in shapes.items()}
    return {name: tensor.astype("<f4") for name, tensor in drawn.items()}


def quantize(matrix: np.ndarray) -> bytes:
    groups = matrix.reshape(-1, GROUP_SIZE)
    scales = (np.abs(groups).max(1) / 127).astype("<f4")
    return np.rint(groups / scales[:, None]).astype(np.int8).tobytes() + scales.tobytes()


def write_checkpoint(path: Path, version: int, model: dict[str, np.ndarray]) -> Path:
    shared = "output" not in model
    matrices = ["wq", "wk", "wv", "wo", "w1", "w2", "w3"]
    last = [] if shared else ["output"]
    if version == 0:
        order = ["embed", "attention_norm", "wq", "wk", "wv", "wo", "ffn_norm", "w1", "w2", "w3"]
        data = ints(*SIZES, VOCAB if shared else -VOCAB, CONTEXT)
        data += b"".join(model[name].tobytes() for name in [*order, "norm"])
        data += np.full((2, CONTEXT, HEAD_DIM // 2), 7.0, "<f4").tobytes()  # two RoPE tables
        data += b"".join(model[name].tobytes() for name in last)
    else:
        data = ints(0x616B3432, version, *SIZES, VOCAB, CONTEXT) + bytes([shared])
        data = (data + ints(GROUP_SIZE) * (version == 2)).ljust(256, b"\0")
        data += b"".join(model[name].tobytes() for name in ["attention_norm", "ffn_norm", "norm"])
        for name in ["embed", *matrices, *last]:
            layers = model[name] if name in matrices else [model[name]]
            write = quantize if version == 2 else np.ndarray.tobytes
            data += b"".join(write(layer) for layer in layers)
    path.write_bytes(data)
    return path


def expected_tensors(model: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    names = dict(attention_norm="input_layernorm", ffn_norm="post_attention_layernorm")
    names |= {f"w{name}": f"self_attn.{name}_proj" for name in "qkvo"}
    names |= dict(w1="mlp.gate_proj", w2="mlp.down_proj", w3="mlp.up_proj")
    tensors = {"model.embed_tokens.weight": model["embed"], "model.norm.weight": model["norm"]}
    if "output" in model:
        tensors["lm_head.weight"] = model["output"]
    for layer in range(LAYERS):
        for name, target in names.items():
            tensor = model[name][layer]
            if name in ("wq", "wk"):
                heads = np.split(tensor, len(tensor) // HEAD_DIM)  # even rows first, then odd
                tensor = np.concatenate([head[i::2] for head in heads for i in (0, 1)])
            tensors[f"model.layers.{layer}.{target}.weight"] = tensor
    return tensors


def llama2c_encode(pieces: list[tuple[str, float]], text: str) -> list[int]:
    """run.c's `encode` without BOS: characters or bytes, then the best (leftmost) join, again."""
    ids = {piece: i for i, (piece, _) in enumerate(pieces)}

    def score(left: int, right: int) -> float:
        joined = ids.get(pieces[left][0] + pieces[right][0])
        return -1e10 if joined is None else pieces[joined][1]

    tokens = [ids[" "]] if text else []
    for character in text:
        known = ids.get(character)
        tokens += [byte + 3 for byte in character.encode()] if known is None else [known]
    scores = [score(*pair) for pair in pairwise(tokens)]
    while scores and max(scores) > -1e10:
        i = scores.index(max(scores))
        tokens[i : i + 2] = [ids[pieces[tokens[i]][0] + pieces[tokens[i + 1]][0]]]
        around = range(max(i - 1, 0), min(i + 1, len(tokens) - 1))
        scores[max(i - 1, 0) : i + 2] = [score(tokens[j], tokens[j + 1]) for j in around]
    return tokens


def check_text(tokenizer, pieces: list[tuple[str, float]], text: str) -> int:
    """Encoding is llama2.c's, decoding undoes it; the number of tokens, BOS and all."""
    ids = tokenizer(text)["input_ids"]
    assert ids == [1, *llama2c_encode(pieces, text)], text
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    return len(ids)


def read_pieces(path: Path) -> list[tuple[str, float]]:
    data, position, pieces = path.read_bytes(), 4, []
    while position < len(data):
        score, length = struct.unpack_from("<fi", data, position)
        position += 8 + length
        pieces.append((data[position - length : position].decode(), score))
    return pieces


@pytest.fixture
def tiny(tmp_path: Path) -> tuple[Path, Path]:
    """(checkpoint, vocabulary), version 0 with a shared classifier."""
    checkpoint = write_checkpoint(tmp_path / "tiny.bin", 0, random_model(shared=True))
    return checkpoint, write_vocabulary(tmp_path / "tok.bin", PIECES)


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = DATA / "stories260K"
    if not folder.is_dir() or not (DATA / "text").is_dir():
        pytest.skip("shared/data with stories260K and text is absent")
    out = tmp_path_factory.mktemp("stories") / "hf"
    return convert_llama2c(folder / "stories260K.bin", folder / "tok512.bin", out)


@pytest.mark.parametrize("version", [0, 1])
@pytest.mark.parametrize("shared", [True, False])
def test_fp32_checkpoints_convert_exactly(tmp_path, version, shared):
    model = random_model(shared)
    checkpoint = write_checkpoint(tmp_path / "m.bin", version, model)
    vocabulary = write_vocabulary(tmp_path / "tok.bin", PIECES)
    out = convert_llama2c(str(checkpoint), str(vocabulary), str(tmp_path / "new" / "hf"))
    assert out == (tmp_path / "new" / "hf").resolve()
    files = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in out.iterdir()} == files
    tensors, expected = load_file(out / "model.safetensors"), expected_tensors(model)
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == np.float32
        np.testing.assert_array_equal(tensor, expected[name], err_msg=name)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is shared


@pytest.mark.parametrize("shared", [True, False])
def test_int8_checkpoint_is_within_half_a_step_of_fp32(tmp_path, shared):
    model = random_model(shared)
    vocabulary = write_vocabulary(tmp_path / "tok.bin", PIECES)
    files = [write_checkpoint(tmp_path / f"v{v}.bin", v, model) for v in (0, 2)]
    outs = [convert_llama2c(file, vocabulary, tmp_path / f"hf-{file.stem}") for file in files]
    exact, rounded = (load_file(out / "model.safetensors") for out in outs)
    assert exact.keys() == rounded.keys()
    for name in exact:
        if "norm" in name:
            np.testing.assert_array_equal(rounded[name], exact[name], err_msg=name)
            continue
        assert (rounded[name] != exact[name]).any()
        half_a_step = 0.501 * np.abs(exact[name]).max() / 127
        np.testing.assert_allclose(rounded[name], exact[name], rtol=0, atol=half_a_step)
    assert len({(out / "config.json").read_text() for out in outs}) == 1


def test_half_split_rope_on_converted_weights_scores_like_interleaved_rope(tmp_path, tiny):
    model = random_model(shared=True)
    tensors = load_file(convert_llama2c(*tiny, tmp_path / "hf") / "model.safetensors")
    rng = np.random.default_rng(1)
    x_D, y_D = rng.normal(size=(2, DIM))
    frequency = 10000.0 ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM)

    def interleaved(vector_H, position):
        turn = np.exp(1j * position * frequency)
        turned = (vector_H[0::2] + 1j * vector_H[1::2]) * turn
        return np.stack([turned.real, turned.imag], -1).reshape(-1)

    def half_split(vector_H, position):
        cos, sin = (np.tile(f(position * frequency), 2) for f in (np.cos, np.sin))
        low, high = np.split(vector_H, 2)
        return vector_H * cos + np.concatenate([-high, low]) * sin

    def scores(query_weight, key_weight, rotate):
        q_NH = (query_weight.astype(np.float64) @ x_D).reshape(HEADS, HEAD_DIM)
        k_KH = (key_weight.astype(np.float64) @ y_D).reshape(KV_HEADS, HEAD_DIM)
        group = HEADS // KV_HEADS
        return [rotate(q_NH[n], 11) @ rotate(k_KH[n // group], 3) for n in range(HEADS)]

    for layer in range(LAYERS):
        q, k = (tensors[f"model.layers.{layer}.self_attn.{x}_proj.weight"] for x in "qk")
        expected = scores(model["wq"][layer], model["wk"][layer], interleaved)
        np.testing.assert_allclose(scores(q, k, half_split), expected, rtol=1e-12)
        unpermuted = scores(model["wq"][layer], model["wk"][layer], half_split)
        assert not np.allclose(unpermuted, expected)  # so the permutation is what did it


def test_config_says_what_llama2c_takes_for_granted(tmp_path, tiny):
    config = json.loads((convert_llama2c(*tiny, tmp_path / "hf") / "config.json").read_text())
    expected = dict(vocab_size=VOCAB, hidden_size=DIM, intermediate_size=HIDDEN)
    expected |= dict(num_hidden_layers=LAYERS, num_attention_heads=HEADS, head_dim=HEAD_DIM)
    expected |= dict(num_key_value_heads=KV_HEADS, max_position_embeddings=CONTEXT)
    expected |= dict(rms_norm_eps=1e-5, rope_theta=10000.0, bos_token_id=1, eos_token_id=2)
    expected |= dict(architectures=["LlamaForCausalLM"], model_type="llama", hidden_act="silu")
    assert {key: config[key] for key in expected} == expected


def test_hand_made_vocabulary_encodes_like_llama2c(tmp_path, tiny):
    tokenizer = AutoTokenizer.from_pretrained(convert_llama2c(*tiny, tmp_path / "hf"))
    for text in ODD:
        check_text(tokenizer, PIECES, text)


def test_random_vocabularies_encode_like_llama2c(tmp_path, tiny):
    """Pieces of two or three letters in any order of score: runs, overlaps, dead ends."""
    rng = random.Random(0)
    merged_anything = 0
    for trial in range(40):
        letters = rng.choice([" a", " ab"])
        merged = {"".join(rng.choices(letters, k=rng.randint(2, 6))) for _ in range(VOCAB)}
        count = VOCAB - 259 - len(letters)
        chosen = rng.sample(sorted(merged), min(count, len(merged)))
        filler = [chr(0x4E00 + i) for i in range(count - len(chosen))]
        pieces = CONTROL + BYTES
        pieces += [(p, -float(i)) for i, p in enumerate([*chosen, *letters, *filler])]
        out = convert_llama2c(tiny[0], write_vocabulary(tiny[1], pieces), tmp_path / f"hf{trial}")
        tokenizer = AutoTokenizer.from_pretrained(out)
        for _ in range(20):
            text = "".join(rng.choices(letters, k=rng.randint(0, 50)))
            merged_anything += check_text(tokenizer, pieces, text) < len(text)
    assert merged_anything > 300


def test_runs_that_share_a_score_encode_like_llama2c(tmp_path, tiny):
    """Llama 2 gives every run of spaces -1e9: the leftmost grows to 5, then the next begins."""
    pieces = [(p if p not in ("  ", "    ") else f"no{p}", s) for p, s in PIECES]
    pieces[-4:] = [(" " * n, -1e9) for n in (2, 3, 4, 5)]
    out = convert_llama2c(tiny[0], write_vocabulary(tiny[1], pieces), tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(out)
    for text in [" " * n + after + " " * m for n in range(20) for m in range(4) for after in "ba"]:
        check_text(tokenizer, pieces, text)


def test_stories260k_converts(stories):
    config = json.loads((stories / "config.json").read_text())
    assert (config["hidden_size"], config["intermediate_size"]) == (64, 172)
    tensors = load_file(stories / "model.safetensors")
    assert len(tensors) == 2 + 5 * 9
    assert tensors["model.layers.4.self_attn.k_proj.weight"].shape == (32, 64)


def test_stories260k_text_encodes_like_llama2c(stories):
    text = (DATA / "text" / "tinystories.txt").read_text(encoding="utf-8")
    stories_200 = text.split("<|endoftext|>")[:200]
    pieces = read_pieces(DATA / "stories260K" / "tok512.bin")
    tokenizer = AutoTokenizer.from_pretrained(stories)
    for text in stories_200 + ODD:
        check_text(tokenizer, pieces, text)


def test_auto_tokenizer_loads_and_adds_bos(tmp_path, tiny):
    tokenizer = AutoTokenizer.from_pretrained(convert_llama2c(*tiny, tmp_path / "hf"))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    assert len(tokenizer) == VOCAB
    assert tokenizer("")["input_ids"] == [1]
    assert set(tokenizer("banana")) == {"input_ids", "attention_mask"}
    plain = tokenizer("banana", add_special_tokens=False)["input_ids"]
    assert tokenizer("banana")["input_ids"] == [1, *plain]
    assert tokenizer("a", "b")["input_ids"].count(1) == 2
    assert 1 not in tokenizer("<s>", add_special_tokens=False)["input_ids"]  # text stays text


def test_empty_out_is_filled_and_any_other_refused(tmp_path, tiny):
    out = tmp_path / "hf"
    out.mkdir()
    convert_llama2c(*tiny, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(ValueError, match=r"hf is not empty"):
        convert_llama2c(*tiny, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    for bad in (tmp_path / "tok.bin", tmp_path / "tok.bin" / "hf"):
        with pytest.raises(ValueError, match=r"tok\.bin is not a directory"):
            convert_llama2c(*tiny, bad)
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "tiny.bin", "tok.bin"}


def change(data: bytes, offset: int, new: bytes) -> bytes:
    return data[:offset] + new + data[offset + len(new) :]


NAN = struct.pack("<f", float("nan"))
BAD_CHECKPOINTS = {
    "empty": (0, lambda data: b"", "is truncated: 0 bytes"),
    "in the old header": (0, lambda data: data[:27], "is truncated: 27 bytes"),
    "in the new header": (1, lambda data: data[:255], "is truncated: 255 bytes"),
    "v0 short": (0, lambda data: data[:-1], "is truncated"),
    "v1 short": (1, lambda data: data[:-4], "is truncated"),
    "v2 short": (2, lambda data: data[:-4], "is truncated"),
    "long": (0, lambda data: data + b"\0", "is longer than its header says"),
    "magic": (1, lambda data: change(data, 0, b"ak42"), "has no 'ak42' magic"),
    "text": (0, lambda data: b"Once upon a time, there was a fox", "has no 'ak42' magic"),
    "version": (1, lambda data: change(data, 4, ints(3)), "has version 3"),
    "dim": (0, lambda data: change(data, 0, ints(0)), "dim 0"),
    "odd head": (0, lambda data: change(data, 0, ints(12)), "dim 12"),
    "layers": (0, lambda data: change(data, 8, ints(-2)), "layers -2"),
    "many layers": (0, lambda data: change(data, 8, ints(1 << 30)), "layers 1073741824"),
    "heads": (0, lambda data: change(data, 12, ints(3)), "heads 3"),
    "KV heads": (0, lambda data: change(data, 16, ints(3)), "KV heads 3"),
    "vocabulary": (1, lambda data: change(data, 28, ints(-VOCAB)), f"vocabulary -{VOCAB}"),
    "flag": (1, lambda data: change(data, 36, b"\2"), "shared classifier 2"),
    "group of 0": (2, lambda data: change(data, 37, ints(0)), "group size 0"),
    "group of 7": (2, lambda data: change(data, 37, ints(7)), "group size 7 does not divide"),
    "not finite": (0, lambda data: change(data, 28, NAN), "tensor embed of layer 0"),
    "scale": (2, lambda data: change(data, len(data) - 4, NAN), "tensor w3 of layer 1"),
}


@pytest.mark.parametrize("case", BAD_CHECKPOINTS)
def test_bad_checkpoint_is_one_error_that_names_it(tmp_path, case):
    version, damage, message = BAD_CHECKPOINTS[case]
    vocabulary = write_vocabulary(tmp_path / "tok.bin", PIECES)
    checkpoint = write_checkpoint(tmp_path / "bad.bin", version, random_model(shared=True))
    checkpoint.write_bytes(damage(checkpoint.read_bytes()))
    with pytest.raises(ValueError, match=message) as error:
        convert_llama2c(checkpoint, vocabulary, tmp_path / "hf")
    assert str(checkpoint) in str(error.value)
    assert {path.name for path in tmp_path.iterdir()} == {"bad.bin", "tok.bin"}


RAW = 4 + sum(8 + len(piece.encode()) for piece, _ in CONTROL)  # where piece <0x00> begins
BAD_VOCABULARIES = {
    "empty": (PIECES, lambda data: b"", "is truncated"),
    "short": (PIECES, lambda data: data[:-1], "is truncated"),
    "short score": (PIECES, lambda data: data + b"\0\0\0\0", f"its piece {VOCAB} has"),
    "length": (PIECES, lambda data: change(data, RAW + 4, ints(-1)), "its piece 3 has -1 bytes"),
    "UTF-8": (PIECES, lambda data: change(data, RAW + 8, b"\xff"), "its piece 3 has 6 bytes"),
    "score": (PIECES, lambda data: change(data, RAW, NAN), "its piece 3 has 6 bytes and score nan"),
    "fewer": (PIECES[:-1], bytes, f"has {VOCAB - 1} pieces, and checkpoint .*tiny.bin is for"),
    "more": ([*PIECES, ("x", -99.0)], bytes, f"has {VOCAB + 1} pieces"),
    "twice": ([*PIECES[:-1], ("an", -99.0)], bytes, f"has 'an' twice, at 259 and {VOCAB - 1}"),
    "bytes": ([*PIECES[:3], ("A", 0.0), *PIECES[4:]], bytes, "byte piece <0x00> at 3"),
    "no space": ([(p if p != " " else "x", s) for p, s in PIECES], bytes, "has no piece ' '"),
    "ties": ([(p, s if p != "na" else 0.0) for p, s in PIECES], bytes, "'an' and 'na' the same"),
}


@pytest.mark.parametrize("case", BAD_VOCABULARIES)
def test_bad_vocabulary_is_one_error_that_names_it(tmp_path, tiny, case):
    pieces, damage, message = BAD_VOCABULARIES[case]
    vocabulary = write_vocabulary(tmp_path / "bad.bin", pieces)
    vocabulary.write_bytes(damage(vocabulary.read_bytes()))
    with pytest.raises(ValueError, match=message) as error:
        convert_llama2c(tiny[0], vocabulary, tmp_path / "hf")
    assert f"vocabulary {vocabulary}" in str(error.value)
    assert not (tmp_path / "hf").exists()


def test_missing_files_are_named(tmp_path, tiny):
    missing = tmp_path / "missing.bin"
    for files, name in (
        ((missing, tiny[1]), r"checkpoint .*missing\.bin"),
        ((tmp_path, tiny[1]), "checkpoint .*"),
        ((tiny[0], missing), r"vocabulary .*missing\.bin"),
    ):
        with pytest.raises(ValueError, match=f"{name} cannot be read"):
            convert_llama2c(*files, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
