"""The rows that are being answered: what each is at, how it draws, when it ends; on the device.

R rows, V vocabulary, E end-of-sequence ids, O steps of a dispatch, X likeliest
tokens.
"""

from typing import NamedTuple, no_type_check

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from kvjax.generation.sampling import COLD, Switches, Values, filtered, penalised

_NONE = Switches(greedy=False, top_k=False, top_p=False, min_p=False, penalty=False)


@no_type_check  # jax maps trees to other leaves than arrays
class Rows(struct.PyTreeNode):
    """Every row's place in its answer; all `[R]` but `used`.

    Attributes:
      token: drawn last, which is fed next.
      position: of that token.
      prompt: tokens of the prompt.
      drawn: tokens of the answer so far.
      limit: tokens of the answer at most.
      running: whether more tokens are to be drawn.
      ends: whether an end-of-sequence token ends the row.
      keys: random keys, to be folded with `drawn`.
      values: how each row draws; 0, 0, 1, 0, 1 is the likeliest token.
      used: `[R, V]` tokens of the prompt and the answer so far, for the repetition penalty.
      rope_length: as of `kvjax.Cache`, or None.
    """

    token: Int[Array, " R"]
    position: Int[Array, " R"]
    prompt: Int[Array, " R"]
    drawn: Int[Array, " R"]
    limit: Int[Array, " R"]
    running: Bool[Array, " R"]
    ends: Bool[Array, " R"]
    keys: Key[Array, " R"]
    values: Values
    used: Bool[Array, "R V"]
    rope_length: Int[Array, " R"] | None = None


class Drawn(NamedTuple):
    """Tokens of a dispatch, -1 where a row drew none, and their log-probabilities.

    `top_tokens` are the likeliest at each place, `top_log_probs` theirs.
    """

    tokens: Int[Array, "R O"]
    log_probs: Float[Array, "R O"]
    top_tokens: Int[Array, "R O X"]
    top_log_probs: Float[Array, "R O X"]


def nothing_drawn(rows: int, steps: int, top: int) -> Drawn:
    """Room for a dispatch."""
    shape = rows, steps
    return Drawn(
        tokens=jnp.full(shape, -1, jnp.int32),
        log_probs=jnp.zeros(shape, jnp.float32),
        top_tokens=jnp.zeros((*shape, top), jnp.int32),
        top_log_probs=jnp.zeros((*shape, top), jnp.float32),
    )


def empty_rows(rows: int, vocab: int, *, rope_by_length: bool = False) -> Rows:
    """Rows that nobody has."""

    def number() -> Array:  # arrays of their own: a program is given them to overwrite
        return jnp.zeros((rows,), jnp.int32)

    def real() -> Array:
        return jnp.zeros((rows,), jnp.float32)

    return Rows(
        token=number(), position=number(), prompt=number(), drawn=number(), limit=number(),
        running=jnp.zeros((rows,), bool), ends=jnp.zeros((rows,), bool),
        keys=jax.vmap(jax.random.key)(jnp.zeros((rows,), jnp.uint32)),
        values=Values(real(), number(), real(), real(), jnp.ones((rows,), jnp.float32)),
        used=jnp.zeros((rows, vocab), bool),
        rope_length=number() if rope_by_length else None,
    )  # fmt: skip


def set_row(rows: Rows, row: Int[Array, ""] | int, one: Rows) -> Rows:
    """The rows with another one, `[1]`, in a row's place."""
    return jax.tree.map(lambda all, new: all.at[row].set(new[0]), rows, one)


def draw(
    logits: Float[Array, "R V"], rows: Rows, eos: Int[Array, " E"], top: int = 0
) -> tuple[Rows, Drawn]:
    """The next token of every running row, in its own way; the others keep theirs.

    With it come the `top` likeliest ones. The tokens are those that
    `kvjax.generation.sampling.sample` draws of the same logits.
    """
    log_probs_RV = jax.nn.log_softmax(logits)
    logits = _penalised(logits, rows)
    cold_R = rows.values.temperature < COLD
    token_R = lax.cond(
        (rows.running & ~cold_R).any(),
        lambda: jnp.where(cold_R, jnp.argmax(logits, axis=-1), _sampled(logits, rows)),
        lambda: jnp.argmax(logits, axis=-1),
    ).astype(jnp.int32)
    log_prob_R = jnp.take_along_axis(log_probs_RV, token_R[:, None], axis=-1)[:, 0]
    likeliest_RX, tokens_RX = lax.top_k(log_probs_RV, top)
    new = Drawn(
        tokens=jnp.where(rows.running, token_R, -1)[:, None],
        log_probs=jnp.where(rows.running, log_prob_R, 0.0)[:, None],
        top_tokens=tokens_RX[:, None].astype(jnp.int32),
        top_log_probs=likeliest_RX[:, None],
    )
    drawn_R = rows.drawn + rows.running
    over_R = (token_R[:, None] == eos).any(-1) & rows.ends
    rows = rows.replace(
        token=jnp.where(rows.running, token_R, rows.token),
        drawn=drawn_R,
        used=rows.used.at[jnp.arange(len(token_R)), token_R].max(rows.running),
        running=rows.running & ~over_R & (drawn_R < rows.limit),
    )
    return rows, new


def _penalised(logits: Float[Array, "R V"], rows: Rows) -> Float[Array, "R V"]:
    """The logits with each row's repetition penalty, where any row has one."""
    on_R = rows.running & (rows.values.penalty != 1)
    used_RV = rows.used & on_R[:, None]
    penalty_R1 = jnp.where(on_R, rows.values.penalty, 1.0)[:, None]
    return lax.cond(on_R.any(), lambda: penalised(logits, used_RV, penalty_R1), lambda: logits)


def _sampled(logits: Float[Array, "R V"], rows: Rows) -> Int[Array, " R"]:
    """What each row draws at its temperature of what its rules leave."""

    def one(logits_V, key, values: Values):
        warm = jnp.where(values.temperature < COLD, 1.0, values.temperature)
        left_1V = (logits_V / warm)[None]
        for name, on in (
            ("top_k", values.top_k > 0), ("top_p", values.top_p < 1), ("min_p", values.min_p > 0)
        ):  # fmt: skip
            ruled_1V = filtered(left_1V, _NONE._replace(**{name: True}), values)
            left_1V = jnp.where(on, ruled_1V, left_1V)
        return jax.random.categorical(key, left_1V[0])

    keys = jax.vmap(jax.random.fold_in)(rows.keys, rows.drawn)
    return jax.vmap(one)(logits, keys, rows.values)
