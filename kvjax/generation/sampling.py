"""Choose the next token: static switches, run-time values.

B batch, V vocabulary. A change of temperature or of a threshold does not recompile; switching a
rule on or off does.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from kvjax.exact import MOST

# Temperatures below are greedy: the draw is the likeliest token anyway, and logits divided by a
# smaller number can leave fp32.
COLD = 1e-6


class Switches(NamedTuple):
    """Which rules are on (static)."""

    greedy: bool
    top_k: bool
    top_p: bool
    min_p: bool
    penalty: bool


class Values(NamedTuple):
    """The rules' numbers (arrays)."""

    temperature: Float[Array, ""]
    top_k: Int[Array, ""]
    top_p: Float[Array, ""]
    min_p: Float[Array, ""]
    penalty: Float[Array, ""]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn, in Hugging Face's order: penalty, temperature, top-k, top-p, min-p.

    Attributes:
      temperature: 0 for greedy (the default).
      top_k: keep the k likeliest, 0 for all.
      top_p: keep the fewest whose probabilities reach this, in (0, 1]; 1 for all.
      min_p: keep those with at least this share of the likeliest's probability, in [0, 1].
      repetition_penalty: > 1 makes tokens of the prompt and the answer less likely (CTRL); what
        a cache held before the call is not remembered.

    Raises:
      ValueError: a value outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self):
        def demand(name: str, holds: bool, expected: str):
            value = getattr(self, name)
            if not (holds and math.isfinite(value)):
                raise ValueError(f"{name}={value!r}, expected {expected}")

        demand("temperature", self.temperature >= 0, "a number of at least 0")
        whole = isinstance(self.top_k, int) and 0 <= self.top_k <= MOST
        demand("top_k", whole, f"an integer from 0 (all tokens) to {MOST}")
        demand("top_p", 0 < self.top_p <= 1, "a number above 0 and at most 1")
        demand("min_p", 0 <= self.min_p <= 1, "a number from 0 to 1")
        demand("repetition_penalty", self.repetition_penalty > 0, "a number above 0")

    @property
    def switches(self) -> Switches:
        """Which rules are on."""
        return Switches(
            greedy=self.temperature < COLD,
            top_k=self.top_k > 0,
            top_p=self.top_p < 1,
            min_p=self.min_p > 0,
            penalty=self.repetition_penalty != 1,
        )

    @property
    def values(self) -> Values:
        """The numbers as arrays."""
        return Values(
            temperature=jnp.float32(self.temperature),
            top_k=jnp.int32(self.top_k),
            top_p=jnp.float32(self.top_p),
            min_p=jnp.float32(self.min_p),
            penalty=jnp.float32(self.repetition_penalty),
        )


def row_keys(seed: int | Sequence[int], rows: int) -> Key[Array, " B"]:
    """A random key for each row, from one seed for all of them or from one a row.

    A row's draws depend on its own seed alone: they are the same alone and in any batch, and two
    rows of one prompt and one seed draw the same.

    Raises:
      ValueError: another number of seeds than rows, or one that is none.
    """
    if not isinstance(seed, Sequence | np.ndarray):
        return jnp.broadcast_to(jax.random.key(check_seed(seed)), (rows,))
    if len(seed) != rows:
        raise ValueError(f"seed has {len(seed)} entries, expected one number or one a row ({rows})")
    return jnp.stack([jax.random.key(check_seed(one)) for one in seed])


def check_seed(seed: Any) -> int:
    """The seed; of a larger one a key would have the low half alone.

    Raises:
      ValueError: no integer, or one that 32 bits do not hold.
    """
    whole = isinstance(seed, int | np.integer) and not isinstance(seed, bool)
    if not (whole and 0 <= seed < 2**32):
        raise ValueError(f"seed={seed!r}, expected an integer from 0 to {2**32 - 1}")
    return int(seed)


def sample(
    logits: Float[Array, "B V"],
    keys: Key[Array, " B"],
    used: Bool[Array, "B V"] | None,
    switches: Switches,
    values: Values,
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """Draw a token a row.

    Args:
      logits: fp32, unscaled.
      keys: one random key a row.
      used: tokens of the prompt and the answer so far, for the repetition penalty.

    Returns:
      The tokens, and their log-probabilities under the model itself (before any rule).
    """
    log_probs_BV = jax.nn.log_softmax(logits)
    if switches.penalty and used is not None:
        logits = penalised(logits, used, values.penalty)
    if switches.greedy:
        tokens_B = jnp.argmax(logits, axis=-1)
    else:
        logits = filtered(logits / values.temperature, switches, values)
        tokens_B = jax.vmap(jax.random.categorical)(keys, logits)
    tokens_B = tokens_B.astype(jnp.int32)
    return tokens_B, jnp.take_along_axis(log_probs_BV, tokens_B[:, None], axis=-1)[:, 0]


def penalised(
    logits: Float[Array, "B V"], used: Bool[Array, "B V"], penalty: Float[Array, "*#rows"]
) -> Float[Array, "B V"]:
    """The logits with those of used tokens made less likely, by one penalty or one a row `[B, 1]`.

    As transformers does it (CTRL, arXiv 1909.05858, section 4.1, for negative ones too).
    """
    less_BV = jnp.where(logits < 0, logits * penalty, logits / penalty)
    return jnp.where(used, less_BV, logits)


def filtered(
    logits: Float[Array, "B V"], switches: Switches, values: Values
) -> Float[Array, "B V"]:
    """Logits with what top-k, top-p and min-p rule out at -inf; the likeliest always stays."""
    if switches.top_k:
        ranked_BV = -jnp.sort(-logits, axis=-1)
        last_B1 = jax.lax.dynamic_slice_in_dim(
            ranked_BV, jnp.minimum(values.top_k, logits.shape[-1]) - 1, 1, axis=-1
        )
        logits = jnp.where(logits < last_B1, -jnp.inf, logits)
    if switches.top_p:
        order_BV = jnp.argsort(-logits, axis=-1, stable=True)
        probs_BV = jax.nn.softmax(jnp.take_along_axis(logits, order_BV, axis=-1))
        before_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV
        rank_BV = jnp.argsort(order_BV, axis=-1)
        out_BV = jnp.take_along_axis(before_BV >= values.top_p, rank_BV, axis=-1)
        logits = jnp.where(out_BV & (rank_BV > 0), -jnp.inf, logits)
    if switches.min_p:
        least_B1 = logits.max(-1, keepdims=True) + jnp.log(values.min_p)
        logits = jnp.where(logits < least_B1, -jnp.inf, logits)
    return logits
