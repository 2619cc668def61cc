"""Measure Ada-KV's own argument: how far eviction moves the output of each layer's attention.

    python -m kvjax.studies.attention_loss [--model M] [--text FILE] [--out docs]

Ada-KV (Feng et al. 2024, arXiv 2407.11550) bounds the L1 distance between a layer's attention
output before and after eviction by 2 C sum_h (1 - F_h): F_h is the share of head h's attention that
is kept, C the largest L1 norm of a value's part in the output. Sharing a layer's budget by the best
scores of all heads makes the bound as small as it can be. Here texts are compressed by what their
last 32 tokens look at, and the loss is that of the 32 tokens which follow, whose own keys are kept.
Prints a table (docs/ada_loss.md), and draws `images/ada_loss.png`. The last line is a JSON object.

B texts, P tokens of a prompt, T of prompt and what follows, W queries that follow, N query heads,
K KV heads, G = N // K, H head dim, D model dim, X = N H, L layers.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float
from tqdm import tqdm

import kvjax
from kvjax import figures
from kvjax.compression.compress import compress
from kvjax.config import CompressionConfig
from kvjax.generation import prefill
from kvjax.model_interface import ProbeRequest
from kvjax.models.decoder import Decoder
from kvjax.spelling import parse_method
from kvjax.studies.smollm2 import FILE, FOLDER

METHODS = ("snapkv", "ada-snapkv", "ada-snapkv:floor=0", "joint-snapkv")
BUDGETS = (64, 128, 256)
PROMPT, FOLLOWING, WINDOW = 1024, 32, 32
_TEXT = Path("../shared/data/text/war_and_peace.txt")


class Loss(NamedTuple):
    """Of one layer, the mean over texts and queries.

    Attributes:
      moved: L1 distance of the output before and after eviction.
      size: L1 norm of the output before.
      missed: attention that is not kept, the mean over query heads.
      bound: Ada-KV's, of `moved`.
    """

    moved: Float[Array, ""]
    size: Float[Array, ""]
    missed: Float[Array, ""]
    bound: Float[Array, ""]


@jax.jit
def layer_loss(
    q_BWNH: Float[Array, "B W N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    o_XD: Float[Array, "X D"],
    keep_BKP: Bool[Array, "B K P"],
) -> Loss:
    """What eviction does to a layer's attention; arrays as the layer has them, keys after RoPE.

    The queries are those of the last W tokens, before which nothing but `keep_BKP` is evicted.
    """
    batch, width, _, head_dim = q_BWNH.shape
    tokens, kv_heads = k_BTKH.shape[1:3]
    q_BWKGH = q_BWNH.reshape(batch, width, kv_heads, -1, head_dim)
    s_BKGWT = jnp.einsum("BWKGH,BTKH->BKGWT", q_BWKGH, k_BTKH) * head_dim**-0.5
    places_T = jnp.arange(tokens)
    seen_WT = places_T <= (tokens - width + jnp.arange(width))[:, None]
    p_BKGWT = jax.nn.softmax(jnp.where(seen_WT, s_BKGWT, -jnp.inf))
    later = ((0, 0), (0, 0), (0, tokens - keep_BKP.shape[-1]))
    keep_BKT = jnp.pad(keep_BKP, later, constant_values=True)
    left_BKGWT = jnp.where(keep_BKT[:, :, None, None], p_BKGWT, 0)
    kept_BKGW = left_BKGWT.sum(-1)
    change_BKGWT = p_BKGWT - left_BKGWT / kept_BKGW[..., None]
    parts_TKGHD = o_XD.reshape(kv_heads, -1, head_dim, o_XD.shape[-1])

    def output(p_BKGWT):
        return jnp.einsum("BKGWT,BTKH,KGHD->BWD", p_BKGWT, v_BTKH, parts_TKGHD)

    def largest(o_KHD):
        return jnp.abs(jnp.einsum("BTKH,KHD->BTKD", v_BTKH, o_KHD)).sum(-1).max()

    most = jax.lax.map(largest, parts_TKGHD.swapaxes(0, 1)).max()
    missed_BKGW = 1 - kept_BKGW
    return Loss(
        moved=jnp.abs(output(change_BKGWT)).sum(-1).mean(),
        size=jnp.abs(output(p_BKGWT)).sum(-1).mean(),
        missed=missed_BKGW.mean(),
        bound=2 * most * missed_BKGW.sum((1, 2)).mean(),
    )


def measure(
    model: Decoder, tokens_BT: np.ndarray, configs: Mapping[str, CompressionConfig]
) -> dict[str, list[Loss]]:
    """A loss a layer for each config, over texts that are read once.

    Args:
      model: a decoder without sliding windows.
      tokens_BT: texts of one length, whose last FOLLOWING tokens follow the prompt.
      configs: by name; they observe at most WINDOW queries.
    """
    lengths = jnp.full(len(tokens_BT), tokens_BT.shape[1], jnp.int32)
    read = _read(model, jnp.asarray(tokens_BT, jnp.int32), lengths)
    prompt = tokens_BT.shape[1] - FOLLOWING
    keys, values = ([x[:, :prompt] for x in layers] for layers in (read.keys, read.values))
    probes = [probe.replace(queries=probe.queries[:, :WINDOW]) for probe in read.probes]
    found = {}
    for name, config in configs.items():
        cache = compress(keys, values, probes, config)
        keep_BLKP = cache.kept_mask(prompt)
        found[name] = [
            layer_loss(
                read.probes[index].queries[:, WINDOW:],
                read.keys[index],
                read.values[index],
                layer.attention.o_XD[...],
                keep_BLKP[:, index],
            )
            for index, layer in enumerate(model.layers)
        ]
    return found


@jax.jit
def _read(model, tokens, lengths):
    return prefill.prefill(model, tokens, lengths, ProbeRequest(queries=WINDOW + FOLLOWING))


def relative(losses: Sequence[Loss]) -> Float[np.ndarray, " L"]:
    """Each layer's loss as a share of its output's norm."""
    return np.array([float(loss.moved / loss.size) for loss in losses])


def markdown(found: Mapping[int, Mapping[str, Sequence[Loss]]]) -> str:
    """A row a budget and method: means over layers, and in how many layers SnapKV loses more."""
    heads = ["entries", "method", "L1 loss", "attention not kept", "bound / SnapKV's", "layers"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for budget, methods in found.items():
        base = methods["snapkv"]
        for name, losses in methods.items():
            missed = np.mean([float(loss.missed) for loss in losses])
            bounds = [sum(float(loss.bound) for loss in each) for each in (losses, base)]
            less = int((relative(losses) < relative(base)).sum())
            row = [str(budget), f"`{name}`", f"{relative(losses).mean():.2%}", f"{missed:.2%}"]
            row += [f"{bounds[0] / bounds[1]:.3f}", "" if name == "snapkv" else str(less)]
            lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(FOLDER / FILE))
    parser.add_argument("--text", type=Path, default=_TEXT)
    parser.add_argument("--count", type=int, default=6, help="texts, from all of the file (6)")
    parser.add_argument("--out", type=Path, default=Path("docs"))
    options = parser.parse_args(arguments)
    model, tokenizer = kvjax.load(options.model, progress=False)
    text = options.text.read_text(encoding="utf-8-sig")
    starts = np.linspace(0.05, 0.9, options.count) * len(text)
    length = PROMPT + FOLLOWING
    rows = [tokenizer(text[int(at) : int(at) + 8 * length])["input_ids"] for at in starts]
    tokens_BT = np.array([row[:length] for row in rows])
    found = {}
    for budget in tqdm(BUDGETS, desc="budgets", disable=None):
        configs = {name: parse_method(name, budget) for name in METHODS}
        found[budget] = measure(model, tokens_BT, configs)
    print(markdown(found))
    if figures.available():
        lines = {
            f"{budget} entries": {name: relative(losses) for name, losses in methods.items()}
            for budget, methods in found.items()
        }
        print(figures.layer_losses(options.out / "images" / "ada_loss.png", lines))
    report = {
        budget: {name: relative(losses).round(4).tolist() for name, losses in methods.items()}
        for budget, methods in found.items()
    }
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
