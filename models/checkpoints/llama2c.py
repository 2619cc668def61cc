"""Convert llama2.c checkpoints (github.com/karpathy/llama2.c) to Hugging Face directories.

Three layouts are read, all little-endian, every matrix stored [out, in]:

    version 0   7 int32: dim, hidden, layers, heads, kv heads, vocab, context. A NEGATIVE vocab
                says that the classifier is stored on its own. Then fp32 tensors.
    version 1   magic, version, the 7 int32, a byte "classifier is shared"; 256 bytes in all.
                Then fp32 tensors, norms first.
    version 2   as version 1, and an int32 group size. The norms are fp32; each matrix of each
                layer is int8 values followed by one fp32 scale for every `group size` of them.

llama2.c rotates neighbouring pairs of a head's components by RoPE, Hugging Face component i with
i + H/2, so the rows of wq and wk change places within each head; attention scores do not notice.
"""

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE

from kvjax.models.checkpoints.export import check_out, new_folder, write_json, write_safetensors

_MAGIC = 0x616B3432  # "ak42", written as a uint32
_HEADER_BYTES, _OLD_HEADER_BYTES = 256, 28  # of versions 1 and 2, and of version 0
_LARGEST = 1 << 24  # no header value of a real model comes near
_BYTE_PIECES = range(3, 259)  # ids of <0x00> ... <0xFF>, which llama2.c takes for granted
_NO_MERGE = -1e10  # the score at and below which llama2.c never merges
_SPECIAL = ("<unk>", "<s>", "</s>")  # ids 0, 1, 2; llama2.c writes 1 and 2 between newlines

_ATTENTION, _MLP = ("wq", "wk", "wv", "wo"), ("w1", "w2", "w3")
_TAIL = ("final_norm", "rope_cos", "rope_sin", "head")
_NORMS = ("attention_norm", "mlp_norm", "final_norm")
_ORDER = {  # of the tensors in a file, by version; each name is all its layers in turn
    0: ("embed", "attention_norm", *_ATTENTION, "mlp_norm", *_MLP, *_TAIL),
    1: (*_NORMS, "embed", *_ATTENTION, *_MLP, "head"),
    2: (*_NORMS, "embed", *_ATTENTION, *_MLP, "head"),
}
_SHAPES = dict(embed="VD", head="VD", rope_cos="SR", rope_sin="SR")  # the norms: "D"
_SHAPES |= dict(wq="DD", wk="KD", wv="KD", wo="DD", w1="FD", w2="DF", w3="FD")
_PER_LAYER = {
    "attention_norm": "input_layernorm",
    "wq": "self_attn.q_proj",
    "wk": "self_attn.k_proj",
    "wv": "self_attn.v_proj",
    "wo": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "w1": "mlp.gate_proj",
    "w2": "mlp.down_proj",
    "w3": "mlp.up_proj",
}
_ONCE = {"embed": "model.embed_tokens", "final_norm": "model.norm", "head": "lm_head"}


@dataclass(frozen=True)
class _Header:
    version: int
    dim: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    context: int
    shared: bool  # the classifier is the embedding
    group_size: int  # values to a scale; 0 where nothing is quantized

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one layer's tensor `name`."""
        sizes = {"D": self.dim, "F": self.hidden, "V": self.vocab, "S": self.context}
        sizes |= {"K": self.kv_heads * self.head_dim, "R": self.head_dim // 2}
        return tuple(sizes[axis] for axis in _SHAPES.get(name, "D"))

    def quantized(self, name: str) -> bool:
        return self.version == 2 and not name.endswith("_norm")

    def size(self, name: str) -> int:
        """The bytes that one layer's tensor `name` takes."""
        count = math.prod(self.shape(name))
        return count + 4 * (count // self.group_size) if self.quantized(name) else 4 * count


class _Checkpoint:
    """One llama2.c file: the header read and checked, the tensors read when asked for."""

    def __init__(self, path: Path):
        self.path = path
        try:
            with path.open("rb") as file:
                start = file.read(_HEADER_BYTES)
                size = os.fstat(file.fileno()).st_size
        except OSError as error:
            raise _unreadable("checkpoint", path, error) from error
        self.header = header = _read_header(path, start)
        self._offset: dict[str, int] = {}  # of layer 0, in bytes
        position = _HEADER_BYTES if header.version else _OLD_HEADER_BYTES
        for name in _ORDER[header.version]:
            if name == "head" and header.shared:
                continue
            if header.quantized(name) and math.prod(header.shape(name)) % header.group_size:
                raise ValueError(
                    f"checkpoint {path} is not a llama2.c checkpoint: its group size "
                    f"{header.group_size} does not divide tensor {name} of {header.shape(name)}"
                )
            self._offset[name] = position
            position += header.size(name) * (header.layers if name in _PER_LAYER else 1)
        if size != position:
            what = "is truncated" if size < position else "is longer than its header says"
            raise ValueError(
                f"checkpoint {path} {what}: {size} bytes, {position} by its header, version "
                f"{header.version} with dim {header.dim} and {header.layers} layers"
            )

    def read(self, name: str, layer: int = 0) -> Float[np.ndarray, "..."]:
        """Tensor `name` of `layer` as float32; ValueError if it holds what no model has."""
        shape, group_size = self.header.shape(name), self.header.group_size
        count, offset = math.prod(shape), self._offset[name] + layer * self.header.size(name)
        if not self.header.quantized(name):
            values = np.fromfile(self.path, "<f4", count, offset=offset)
            good = np.isfinite(values).all()
        else:
            scales = np.fromfile(self.path, "<f4", count // group_size, offset=offset + count)
            good = np.isfinite(scales).all() and (scales >= 0).all()
            values = np.fromfile(self.path, np.int8, count, offset=offset)
            if good:
                values = values.reshape(-1, group_size) * scales[:, None]
        if not good:
            raise ValueError(
                f"checkpoint {self.path} is damaged: tensor {name} of layer {layer} has a value "
                "that is not finite, or a negative scale"
            )
        return values.reshape(shape).astype(np.float32, copy=False)


def _unreadable(what: str, path: Path, error: OSError) -> ValueError:
    return ValueError(f"{what} {path} cannot be read: {error.strerror or error}")


def _read_header(path: Path, start: bytes) -> _Header:
    if len(start) < _OLD_HEADER_BYTES:
        raise ValueError(f"checkpoint {path} is truncated: {len(start)} bytes of header")
    (magic,) = struct.unpack_from("<I", start)
    if magic != _MAGIC:
        version, numbers, group_size = 0, struct.unpack_from("<7i", start), 0
        shared, vocab = int(numbers[5] > 0), abs(numbers[5])
        no_magic = "it has no 'ak42' magic, and as version 0 "
    else:
        if len(start) < _HEADER_BYTES:
            raise ValueError(f"checkpoint {path} is truncated: {len(start)} bytes of header")
        fields = struct.unpack_from("<8iBi", start, 4)
        version, numbers, (shared, group_size) = fields[0], fields[1:8], fields[8:]
        vocab, no_magic = numbers[5], ""
        if version not in (1, 2):
            raise ValueError(f"checkpoint {path} has version {version}; 0, 1 and 2 are known")
    dim, hidden, layers, heads, kv_heads, _, context = numbers
    sizes = (dim, hidden, layers, heads, kv_heads, vocab, context)
    if (
        any(not 0 < number <= _LARGEST for number in sizes)
        or dim % (2 * heads)
        or heads % kv_heads
        or shared not in (0, 1)
        or (version == 2 and group_size <= 0)
    ):
        raise ValueError(
            f"checkpoint {path} is not a llama2.c checkpoint: {no_magic}its header says dim {dim}, "
            f"hidden {hidden}, layers {layers}, heads {heads}, KV heads {kv_heads}, vocabulary "
            f"{vocab}, context {context}, shared classifier {shared}, group size {group_size}"
        )
    return _Header(version, *sizes, bool(shared), group_size if version == 2 else 0)


def _read_vocabulary(path: Path) -> list[tuple[str, float]]:
    """(piece, score) by id, with ids 0, 1 and 2 under their Hugging Face names.

    The file: an int32, then for each piece a fp32 score, an int32 length and its UTF-8 bytes.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _unreadable("vocabulary", path, error) from error
    pieces: list[tuple[str, float]] = []
    position = 4
    while position < len(data) or not pieces:
        score, length = math.nan, 0
        if position + 8 <= len(data):
            score, length = struct.unpack_from("<fi", data, position)
        piece = data[position + 8 : position + 8 + max(length, 0)]
        position += 8 + len(piece)
        if len(piece) != length or not length or math.isnan(score) or not _is_utf8(piece):
            raise ValueError(
                f"vocabulary {path} is truncated or not a llama2.c vocabulary: its piece "
                f"{len(pieces)} has {length} bytes and score {score}, {len(piece)} bytes are there"
            )
        pieces.append((piece.decode("utf-8"), score))
    return [(name, score) for name, (_, score) in zip(_SPECIAL, pieces, strict=False)] + pieces[3:]


def _is_utf8(piece: bytes) -> bool:
    return piece.decode("utf-8", "ignore").encode("utf-8") == piece


def _check_vocabulary(path: Path, pieces: list[tuple[str, float]], checkpoint: _Checkpoint) -> None:
    vocab = checkpoint.header.vocab
    if len(pieces) != vocab:
        count = f"vocabulary {path} has {len(pieces)} pieces"
        raise ValueError(f"{count}, and checkpoint {checkpoint.path} is for {vocab}")
    ids: dict[str, int] = {}
    for i, (piece, _) in enumerate(pieces):
        if ids.setdefault(piece, i) != i:
            raise ValueError(f"vocabulary {path} has {piece!r} twice, at {ids[piece]} and {i}")
    for i in _BYTE_PIECES:
        byte = f"<0x{i - _BYTE_PIECES.start:02X}>"
        if ids.get(byte) != i:
            raise ValueError(f"vocabulary {path} does not have the byte piece {byte} at {i}")
    if " " not in ids:
        raise ValueError(f"vocabulary {path} has no piece ' ', which llama2.c begins a text with")


def _merges(path: Path, pieces: list[tuple[str, float]]) -> list[tuple[str, str]]:
    """The merges, best first, that make BPE merge as llama2.c does.

    llama2.c joins the two neighbours whose joint piece scores best, the leftmost of equals; BPE
    goes by the rank of a pair. So pairs are ranked by the score of what they make. The order among
    the pairs that make one piece decides nothing: when that piece's turn comes, its characters
    have been joined in one way, the same wherever they stand. Where runs of one character share a
    score (Llama 2's of spaces do), the leftmost run grows until it cannot: longer ones go first.
    Control and byte pieces take no part: text never turns into either.

    Raises:
        ValueError: other pieces that pairs can make share a score; ranks cannot say "leftmost".
    """
    scores = dict(pieces[_BYTE_PIECES.stop :])
    first: dict[float, str] = {}
    made: list[tuple[float, int, str, list[int]]] = []
    for piece, score in scores.items():
        cuts = [i for i in range(1, len(piece)) if piece[:i] in scores and piece[i:] in scores]
        if not cuts or score <= _NO_MERGE:
            continue
        other = first.setdefault(score, piece)
        if other != piece and len({*other, *piece}) > 1:
            raise ValueError(
                f"vocabulary {path} gives {other!r} and {piece!r} the same score {score}: which of "
                "them is merged first depends on the text, and no tokenizer.json can say that"
            )
        made.append((score, len(piece), piece, cuts))
    made.sort(reverse=True)
    return [(piece[:i], piece[i:]) for *_, piece, cuts in made for i in reversed(cuts)]


def _tokenizer(path: Path, pieces: list[tuple[str, float]]) -> Tokenizer:
    """Encodes as llama2.c does, BOS included; decoding strips the space that encoding put first.

    A space does not become sentencepiece's U+2581, so every text comes back from decoding.
    """
    vocabulary = {piece: i for i, (piece, _) in enumerate(pieces)}
    unk, bos, eos = _SPECIAL
    tokenizer = Tokenizer(
        BPE(vocabulary, _merges(path, pieces), unk_token=unk, byte_fallback=True, fuse_unk=False)
    )
    tokenizer.normalizer = normalizers.Prepend(" ")  # nothing is put before an empty text
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, 1)]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in (unk, bos, eos)])
    return tokenizer


def _model_config(header: _Header) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": header.vocab,
        "hidden_size": header.dim,
        "intermediate_size": header.hidden,
        "num_hidden_layers": header.layers,
        "num_attention_heads": header.heads,
        "num_key_value_heads": header.kv_heads,
        "head_dim": header.head_dim,
        "max_position_embeddings": header.context,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": header.shared,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "float32",
    }


def _tokenizer_config(header: _Header) -> dict:
    unk, bos, eos = _SPECIAL
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",  # reads tokenizer.json as it is
        "unk_token": unk,
        "bos_token": bos,
        "eos_token": eos,
        "split_special_tokens": True,  # "<s>" in a text is text, as in llama2.c
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": header.context,
    }


def _half_split(weight: Float[np.ndarray, "rows D"], head_dim: int) -> Float[np.ndarray, "rows D"]:
    """Rows of each head from (0, 1), (2, 3), ... pairs to (0, H/2), (1, H/2 + 1), ... pairs."""
    pairs = weight.reshape(-1, head_dim // 2, 2, weight.shape[1])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def _write_safetensors(path: Path, checkpoint: _Checkpoint) -> None:
    """Tensor by tensor, so that memory holds one of them and not the model."""
    header = checkpoint.header
    once = [(f"{target}.weight", name, 0) for name, target in _ONCE.items()]
    names = [entry for entry in once if entry[1] != "head" or not header.shared]
    for layer in range(header.layers):
        prefix = f"model.layers.{layer}"
        names += [(f"{prefix}.{target}.weight", name, layer) for name, target in _PER_LAYER.items()]
    sources = {target: (name, layer) for target, name, layer in names}

    def read(target: str) -> Float[np.ndarray, "..."]:
        name, layer = sources[target]
        values = checkpoint.read(name, layer)
        return _half_split(values, header.head_dim) if name in ("wq", "wk") else values

    shapes = {target: header.shape(name) for target, (name, _) in sources.items()}
    write_safetensors(path, shapes, np.float32, read)


def convert_llama2c(checkpoint: str | Path, vocabulary: str | Path, out: str | Path) -> Path:
    """Turns a llama2.c checkpoint and its vocabulary into a Hugging Face directory.

    The directory holds config.json (LlamaForCausalLM, eps 1e-5, RoPE base 10000, BOS 1, EOS 2),
    model.safetensors (fp32; int8 is dequantized), tokenizer.json and tokenizer_config.json, from
    which `transformers.AutoTokenizer` encodes as llama2.c does. It appears when complete; a failure
    leaves nothing behind. Memory: a few copies of the largest tensor. Source: karpathy/llama2.c.

    Args:
        checkpoint: the model, version 0, 1 (fp32) or 2 (int8), told apart by the header.
        vocabulary: its vocabulary, tok*.bin or tokenizer.bin, with byte pieces <0x00> to <0xFF> at
            ids 3 to 258, a piece ' ', and a score of its own for each piece made by merging
            (runs of one character may share theirs).
        out: a directory that is new or empty. Missing parents are made.

    Returns:
        `out` as an absolute path.

    Raises:
        ValueError: a file is missing, truncated or something else; the vocabulary is not the
            checkpoint's; `out` is a file or is not empty.
    """
    out = Path(out).resolve()
    check_out(out)
    model = _Checkpoint(Path(checkpoint))
    pieces = _read_vocabulary(Path(vocabulary))
    _check_vocabulary(Path(vocabulary), pieces, model)
    tokenizer = _tokenizer(Path(vocabulary), pieces)

    with new_folder(out) as folder:
        _write_safetensors(folder / "model.safetensors", model)
        tokenizer.save(str(folder / "tokenizer.json"))
        write_json(folder / "config.json", _model_config(model.header))
        write_json(folder / "tokenizer_config.json", _tokenizer_config(model.header))
    return out
