"""One part of the check, and its outcome."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np


class Failed(Exception):
    """What a part found is wrong; the message is one line."""


@dataclass(frozen=True)
class Part:
    """Something that is run by itself and reported in one line.

    Attributes:
      name: by which it is found again.
      limit: its clock, seconds, compilation included.
      run: a function without arguments (one that can be pickled), which returns numbers for JSON,
        "shown" (what the summary says of them) among them, or raises.
      apart: whether it needs a process of its own, without JAX's hand on the device's memory.
    """

    name: str
    limit: int | float
    run: Callable[[], dict[str, Any]]
    apart: bool = False


class Answer(NamedTuple):
    """One row's tokens and their log-probabilities."""

    tokens: Sequence[int]
    log_probs: Sequence[float]


def tolerance(dtype: Any) -> float:
    """Most error, relative to 1 + the value, of what is computed from entries of this dtype.

    256 steps of fp32 (3e-5: sums over thousands, exponentials by polynomials) and 3 of the half
    widths (2e-2 in bf16: probabilities are rounded before they meet the values).
    """
    dtype = jnp.dtype(dtype)
    return float(jnp.finfo(dtype).eps) * (256 if dtype == jnp.float32 else 3)


def error(found: Any, expected: Any) -> float:
    """Largest |found - expected| / (1 + |expected|); NaN, or infinity in one alone, is infinite."""
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    if found.shape != expected.shape:
        raise Failed(f"shape {found.shape}, expected {expected.shape}")
    same = found == expected  # equal infinities too
    with np.errstate(invalid="ignore"):
        far = np.where(same, 0.0, np.abs(found - expected) / (1 + np.abs(expected)))
    return float(np.where(np.isnan(far), np.inf, far).max(initial=0.0))


def agree(found: Sequence[Answer], expected: Sequence[Answer], most: float) -> dict[str, Any]:
    """Largest difference of log-probabilities, up to where a row draws another token.

    Two machines may draw differently where two tokens are equally likely; what follows is another
    text. So the first token that differs has to be as likely as the other, and most have to agree.

    Raises:
      Failed: a difference above `most`, or fewer than half of the tokens agree.
    """
    worst, same, total = 0.0, 0, 0
    if len(found) != len(expected):
        raise Failed(f"{len(found)} rows, expected {len(expected)}")
    for row, (mine, other) in enumerate(zip(found, expected, strict=True)):
        if len(mine.tokens) != len(other.tokens):
            raise Failed(f"row {row} has {len(mine.tokens)} tokens, expected {len(other.tokens)}")
        total += len(other.tokens)
        unlike = np.flatnonzero(np.asarray(mine.tokens) != np.asarray(other.tokens))
        first = int(unlike[0]) if len(unlike) else len(other.tokens)
        same += first
        until = min(first + 1, len(other.tokens))
        mine_lp, other_lp = (np.asarray(x.log_probs, np.float64)[:until] for x in (mine, other))
        far = np.abs(mine_lp - other_lp)
        worst = max(worst, float(np.where(np.isnan(far), np.inf, far).max(initial=0.0)))
        if worst > most:
            at = int(np.argmax(np.nan_to_num(far, nan=np.inf)))
            raise Failed(
                f"row {row}, token {at}: log-probability {mine_lp[at]:.4f}, expected"
                f" {other_lp[at]:.4f} (within {most:g})"
            )
    if 2 * same < total:
        raise Failed(f"{same} of {total} tokens agree, expected at least half")
    shown = f"log-probs within {worst:.1e} (bound {most:g}), {same} of {total} tokens agree"
    return {"error": worst, "tolerance": most, "same": same, "tokens": total, "shown": shown}
