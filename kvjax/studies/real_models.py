"""Measure every method on a real model, over the texts of `kvjax.studies.real_texts`.

    python -m kvjax.studies.real_models --model FOLDER --texts build/real/texts.jsonl \\
        -o docs/real_models [--short] [--shared]

For each text, method and budget: the NLL (nats a token) of what follows the compressed prompt, and
for questions whether each answer is right. A greedy answer is right to the last token exactly if
every token of it is the likeliest one after those before it, so one pass judges it.

A prompt is prefilled once for all methods. Budgets are run-time numbers and caches are widened to
the prompt's bucket (as in `kvjax.studies.retrieval`), so that a method compiles once a bucket.
Rows are appended to `kvjax_PART.csv` as they are made; a run goes on where it stopped.

R rows that follow a prompt, U their tokens, V vocabulary, L layers, K KV heads, T tokens.
"""

import argparse
import csv
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import kvjax
from kvjax.cache.state import for_rows, with_room
from kvjax.compression.row_budgets import make_rows
from kvjax.config import CompressionConfig
from kvjax.eval.journal import repair
from kvjax.generation.request import instructed
from kvjax.inputs.prompts import pad
from kvjax.spelling import parse_method
from kvjax.studies.real_texts import Text, read_texts
from kvjax.studies.retrieval import compress_widest, widest

COLUMNS = ("part", "name", "method", "budget", "kept", "nll", "right")
BUDGETS = {"novel": (0.5, 0.25, 0.1, 0.05), "unseen": (0.25, 0.1), "seen": (0.25, 0.1)}
NAMED = tuple(name for name in kvjax.METHODS if name != "full")
# SnapKV and its relatives with kvpress's pooling, and a window that fits the smallest budget
# (tests/fixtures/peer_kvpress.py has it, too).
_PEER = "window=32,pooling=average,kernel=5"
AGREEING = tuple(f"{name}:{_PEER}" for name in ("snapkv", "ada-snapkv", "pyramidkv"))
# What kvpress has as well.
SHARED = (*AGREEING, "tova", "knorm", "key-diff", "expected-attention", "ada-expected-attention",
          "kvzip", "ada-kvzip")  # fmt: skip
# A scorer under each division of a budget among layers, its heads by need in all of them.
LAYERS = ("uniform", "pyramid", "prefix", "global", "joint")
LAYERED = {
    "snapkv": (
        "ada-snapkv", "ada-pyramid", "ada-prefixkv", "snapkv:layers=global,heads=global",
        "joint-snapkv",
    ),
    "expected-attention": (
        "ada-expected-attention",
        *(f"ada-expected-attention:layers={layers}" for layers in ("pyramid", "prefix")),
        *(f"ada-expected-attention:layers={both},heads={both}" for both in ("global", "joint")),
    ),
    "kvzip": (
        "ada-kvzip", "ada-kvzip:layers=pyramid", "ada-kvzip:layers=prefix", "kvzip", "joint-kvzip",
    ),
    "key-diff": (
        "key-diff:heads=ada",
        *(f"key-diff:layers={layers},heads=ada" for layers in ("pyramid", "prefix")),
        *(f"key-diff:layers={both},heads={both}" for both in ("global", "joint")),
    ),
}  # fmt: skip
# Ada-KV's floor gives every head a fifth of what equal heads would have; kvpress's KVzip has none.
FLOORLESS = tuple(
    f"{name},floor=0".replace("kvzip,", "kvzip:")
    for name in ("ada-kvzip", "ada-kvzip:layers=prefix", "joint-kvzip")
)
# Contexts whose questions are asked of every method. The others ask the ten best of these.
SURVEYED, BEST = 7, 10
KEPT = ("1024-00", "1024-08", "2048-00", "4096-00")  # texts whose kept positions are written


def read_rows(path: str | Path) -> list[dict[str, str]]:
    """Rows of a result file, as texts; none where there is no file."""
    path = Path(path)
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def methods_of(text: Text, number: int, rows: Iterable[dict[str, str]]) -> tuple[str, ...]:
    """The methods that text `number` of its part is measured with.

    All named ones, and those that agree with kvpress in their settings. Where the question is
    unseen also every scorer with every division among layers; after the survey, the ten that were
    right most often in it, and what kvpress has.
    """
    if text.part == "unseen" and number >= SURVEYED:
        return tuple(dict.fromkeys(("full", *SHARED, *ten_best(rows))))
    layered = [name for names in LAYERED.values() for name in names if text.part == "unseen"]
    return tuple(dict.fromkeys(("full", *NAMED, *AGREEING, *FLOORLESS, *layered)))


def ten_best(rows: Iterable[dict[str, str]]) -> list[str]:
    """The methods with most answers right in the survey, over both budgets."""
    right: dict[str, int] = defaultdict(int)
    for row in rows:
        if int(row["name"]) < SURVEYED and row["method"] != "full":
            right[row["method"]] += row["right"].count("1")
    return sorted(right, key=lambda name: (-right[name], name))[:BEST]


# ---------------------------------------------------------------------------- one text
@partial(jax.jit, static_argnames="widest")
def _kept(cache, widest: int):
    return cache.kept_mask(widest)


@jax.jit
def _follow(model, cache, first_BV, rows_RU, counts):
    """NLL of every token of the rows, and whether it is the likeliest, `[R, U]` each."""
    rows, width = rows_RU.shape
    cache = with_room(for_rows(cache, rows), width)
    x_RUD, _ = model.extend(rows_RU[:, :-1], counts - 1, cache)
    first_R1V = jnp.broadcast_to(first_BV[:, None], (rows, 1, first_BV.shape[-1]))
    logits_RUV = jnp.concatenate([first_R1V, model.logits(x_RUD)], axis=1)
    at_RU1 = rows_RU[..., None]
    nll_RU = -jnp.take_along_axis(jax.nn.log_softmax(logits_RUV), at_RU1, axis=-1)[..., 0]
    return nll_RU, jnp.argmax(logits_RUV, axis=-1) == rows_RU


def judged(text: Text, nll_RU: np.ndarray, hit_RU: np.ndarray) -> tuple[float, str]:
    """Mean NLL of the tokens that count, and for each row 1 where all of them are likeliest."""
    nll, right = [], ""
    for row, (ids, count) in enumerate(zip(text.follows, text.judged, strict=True)):
        mine = slice(len(ids) - count, len(ids))
        nll += nll_RU[row, mine].tolist()
        right += str(int(hit_RU[row, mine].all()))
    return float(np.mean(nll)), right


class Measurement:
    """One text, read once for several methods.

    Args:
      model: a decoder.
      text: prompt and what follows.
      configs: all that are going to be asked for; other budgets of the same methods may join.
    """

    def __init__(self, model, text: Text, configs: Sequence[CompressionConfig]):
        self._model, self._text = model, text
        self._arrays = kvjax.prefill_prompts(model, [text.prompt], configs).arrays
        width = -(-max(map(len, text.follows)) // 16) * 16
        self._rows, self._counts = pad(text.follows, at_least=width)

    def row(self, config: CompressionConfig) -> tuple[dict, np.ndarray]:
        """What a config comes to (`kept`, `nll`, `right`), and which entries it keeps."""
        read = self._arrays
        layers = read.keys, read.values, read.probes
        budgets = make_rows(config, read.lengths)
        cache = compress_widest(*layers, budgets, jax.random.key(0), config=widest(config))
        nll, hit = _follow(self._model, cache, read.logits, self._rows, self._counts)
        kept_LKT = np.asarray(_kept(cache, read.keys[0].shape[1])[0])
        score, right = judged(self._text, np.asarray(nll), np.asarray(hit))
        kept = kept_LKT.sum() / kept_LKT[..., 0].size
        return {"kept": f"{kept:.3f}", "nll": f"{score:.5f}", "right": right}, kept_LKT


# ---------------------------------------------------------------------------- all of them
def measure(
    model, tokenizer, texts: Sequence[Text], out: Path, positions: Path, *, shared: bool = False
) -> None:
    """Append the rows of one part's texts that are not in the file `out` yet.

    `shared`: of the methods that kvpress has alone.
    Which entries the texts of KEPT keep goes to the folder `positions`, a file each.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    repair(out)
    rows = read_rows(out)
    done = {(row["name"], row["method"], row["budget"]) for row in rows}
    with out.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if not file.tell():
            writer.writeheader()
        for number, text in enumerate(tqdm(texts, desc=out.stem, disable=None)):
            configs = {}
            for method in ("full", *SHARED) if shared else methods_of(text, number, rows):
                for budget in (1.0,) if method == "full" else BUDGETS[text.part]:
                    if (text.name, method, f"{budget:g}") not in done:
                        config = parse_method(method, budget)
                        config = instructed(config, tokenizer, model.config.vocab_size)
                        configs[method, f"{budget:g}"] = config
            kept = {}
            measured = Measurement(model, text, list(configs.values())) if configs else None
            for (method, share), config in configs.items():
                assert measured is not None
                found, kept[f"{method} {share}"] = measured.row(config)
                row = dict(part=text.part, name=text.name, method=method, budget=share) | found
                writer.writerow(row)
                file.flush()
                rows.append(row)
            if text.name in KEPT and kept:
                positions.mkdir(parents=True, exist_ok=True)
                path = positions / f"{text.name}.npz"
                packed = dict(np.load(path)) if path.exists() else {}
                packed |= {name: np.packbits(kept_LKT, axis=-1) for name, kept_LKT in kept.items()}
                np.savez(path, **packed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--texts", type=Path, required=True, help="from kvjax.studies.real_texts")
    parser.add_argument("--parts", nargs="+", default=list(BUDGETS), choices=BUDGETS)
    parser.add_argument("--short", action="store_true", help="two texts of each part")
    parser.add_argument("--shared", action="store_true", help="only the methods of kvpress")
    parser.add_argument("--kept", type=Path, default=Path("build/real/kept"))
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the results")
    options = parser.parse_args()
    model, tokenizer = kvjax.load(options.model, progress=False)
    for part in options.parts:
        texts = [text for text in read_texts(options.texts) if text.part == part]
        texts = texts[:2] if options.short else texts
        out = options.output / f"kvjax_{part}.csv"
        measure(model, tokenizer, texts, out, options.kept, shared=options.shared)


if __name__ == "__main__":
    main()
