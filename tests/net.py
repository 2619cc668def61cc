"""What kvjax computes today, cell by cell, to be held against tomorrow (`fixtures/net.json`).

    python tests/net.py            # says which cells differ from the file
    python tests/net.py --write    # writes them: only where a fault was mended, never for tidiness

Kept entries of every named method at two budgets, and tokens with log-probabilities of generate,
stream, questions to a cache, second turns and recompression, on two tiny checkpoints (one with
sliding-window layers), in both layouts and in int8.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial, reduce
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import kvjax
from kvjax import METHODS, CompressionConfig, Recompress, probe_request
from kvjax.generation import prefill
from kvjax.inputs.prompts import pad
from kvjax.models.checkpoints.weights import load_decoder

HERE = Path(__file__).parent / "fixtures"
FILE = HERE / "net.json"
CHECKPOINTS = ("llama2-gqa", "qwen2")
BUDGETS = (12, 0.25)
LENGTHS = (64, 41)
STEPS = 10
# Log-probabilities of two machines differ by less.
TOLERANCE = 5e-5

Cell = Callable[[], Any]


def prompts(lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    """The same random prompts for every cell."""
    rng = np.random.default_rng(7)
    return [rng.integers(3, 80, size).tolist() for size in lengths]


def cells(checkpoint: str) -> Iterator[tuple[str, Cell]]:
    """Names of a checkpoint's cells, and how each is computed."""
    model = load_decoder(HERE / "hf" / checkpoint, progress=False)
    yield from _kept(model)
    yield from _answers(model, whole=checkpoint == CHECKPOINTS[0])


# ---------------------------------------------------------------------------- kept entries
def _kept(model: Any) -> Iterator[tuple[str, Cell]]:
    """A method's kept entries of one prefill that has what any of them reads."""
    tokens, lengths = map(jnp.asarray, pad(prompts()))
    chosen = {
        f"kept {name} {budget}": CompressionConfig.named(name, budget)
        for name in METHODS
        if name != "full"
        for budget in BUDGETS
    }
    width = tokens.shape[1]
    wanted = reduce(lambda a, b: a | b, (probe_request(c, width) for c in chosen.values()))
    found: list[Any] = []

    def cell(config: CompressionConfig) -> list[list[str]]:
        if not found:
            found.append(jax.jit(partial(prefill.prefill, request=wanted))(model, tokens, lengths))
        windows = model.config.sliding_windows
        run = jax.jit(partial(prefill.compress_prefilled, windows=windows, config=config))
        cache = run(found[0], key=jax.random.key(0))
        kept = np.asarray(cache.kept_mask(width))
        return [[_hex(layer) for layer in row] for row in kept]

    for name, config in chosen.items():
        yield name, partial(cell, config)


def _hex(mask_KT: np.ndarray) -> str:
    """One bit a position, the first one highest, heads apart."""
    return " ".join(np.packbits(head).tobytes().hex() for head in mask_KT)


# ---------------------------------------------------------------------------- answers
def _answers(model: Any, whole: bool) -> Iterator[tuple[str, Cell]]:
    named = CompressionConfig.named
    configs = {
        "snapkv padded": named("snapkv", 12, layout="padded"),
        "ada-snapkv packed": named("ada-snapkv", 12, layout="packed"),
        "prefixkv packed": named("prefixkv", 0.25, layout="packed"),
        "snapkv int8": named("snapkv", 12, quantize="int8"),
    }
    if whole:
        configs["prefixkv padded"] = named("prefixkv", 0.25, layout="padded")
    for name, config in configs.items():
        yield f"generate {name}", partial(_generate, model, config)
        yield f"ask {name}", partial(_ask, model, config)
    for name in ("ada-snapkv packed", "prefixkv packed"):
        yield f"stream {name}", partial(_stream, model, configs[name])
    by_budget = Recompress(every=4, budget=16)
    yield (
        "recompress window",
        partial(_generate, model, configs["ada-snapkv packed"], recompress=by_budget),
    )
    if whole:
        other = Recompress(every=4, budget=16, scorer="key-diff", heads="uniform")
        yield (
            "recompress key-diff",
            partial(_generate, model, configs["snapkv padded"], recompress=other),
        )
        yield (
            "recompress int8",
            partial(_generate, model, configs["snapkv int8"], recompress=by_budget),
        )
        yield "recompress ask", partial(_ask, model, configs["snapkv padded"], by_budget)
    yield (
        "recompress ratio",
        partial(_generate, model, configs["prefixkv packed"], recompress=Recompress(every=4)),
    )


def _shown(out: Any) -> dict[str, Any]:
    return {"tokens": out.tokens, "log_probs": np.round(_flat(out.log_probs), 6).tolist()}


def _flat(rows: list[list[float]]) -> list[float]:
    return [value for row in rows for value in row]


def _generate(model, config, **settings) -> dict[str, Any]:
    settings = {"max_new_tokens": STEPS, "eos_ids": (), **settings}
    return _shown(kvjax.generate(model, prompts(), config, **settings))


def _stream(model, config) -> dict[str, Any]:
    tokens: list[list[int]] = [[] for _ in LENGTHS]
    log_probs: list[list[float]] = [[] for _ in LENGTHS]
    for step in kvjax.stream(model, prompts(), config, max_new_tokens=STEPS, eos_ids=()):
        for row in range(len(LENGTHS)):
            tokens[row] += step.tokens[row]
            log_probs[row] += step.log_probs[row]
    return {"tokens": tokens, "log_probs": np.round(_flat(log_probs), 6).tolist()}


def _ask(model, config, recompress=None) -> list[dict[str, Any]]:
    """A question to a compressed prompt, and a second turn after its answer."""
    cache = kvjax.compress_prompt(model, prompts(), config)
    rules = {"max_new_tokens": STEPS, "eos_ids": (), "return_cache": True, "recompress": recompress}
    first = kvjax.generate(model, prompts((5, 3)), cache=cache, **rules)
    second = kvjax.generate(model, prompts((2, 4)), cache=first.cache, **rules)
    return [_shown(first), _shown(second)]


# ---------------------------------------------------------------------------- comparison
def differs(found: Any, expected: Any) -> bool:
    """Whether two cells differ; log-probabilities by more than `TOLERANCE`."""
    if isinstance(found, list) and found and isinstance(found[0], dict):
        return len(found) != len(expected) or any(map(differs, found, expected))
    if isinstance(found, dict):
        if found["tokens"] != expected["tokens"]:
            return True
        gap = np.subtract(found["log_probs"], expected["log_probs"])
        return bool(np.abs(gap).max() > TOLERANCE)
    return bool(found != expected)


def main() -> int:
    """Compare, or write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    write = parser.parse_args().write
    found = {
        checkpoint: {name: cell() for name, cell in cells(checkpoint)} for checkpoint in CHECKPOINTS
    }
    before = json.loads(FILE.read_text()) if FILE.exists() else {}
    changed = [
        f"{checkpoint}: {name}"
        for checkpoint, mine in found.items()
        for name, cell in mine.items()
        if name not in before.get(checkpoint, {}) or differs(cell, before[checkpoint][name])
    ]
    print("\n".join(changed) or "every cell as before")
    if write:
        lines = (
            f"{json.dumps(checkpoint)}: {{\n"
            + ",\n".join(f"{json.dumps(name)}: {json.dumps(cell)}" for name, cell in mine.items())
            + "\n}"
            for checkpoint, mine in found.items()
        )
        FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    return int(bool(changed) and not write)


if __name__ == "__main__":
    sys.exit(main())
