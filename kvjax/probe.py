"""What attention hands to compression, and how it is asked to.

B batch, T prompt tokens, W observed queries, N query heads, K KV heads, H head dim.
"""

from dataclasses import dataclass
from typing import no_type_check

from flax import struct
from jaxtyping import Array, Float


@no_type_check  # jax maps trees to other leaves than arrays
class Probe(struct.PyTreeNode):
    """What attention hands to compression: small, and never an attention matrix.

    Everything is None unless asked for (`ProbeRequest`).

    Attributes:
      queries: `[B, W, N, H]`, the last W queries of each row after RoPE, right-aligned:
        `queries[:, -1]` is the prompt's last token (a row shorter than W repeats its first
        query on the left).
      column_sums: `[B, N, T]` fp32, attention that each key received from all queries of the
        prompt.
      future_mean, future_cov: `[B, N, H]` and `[B, N, H, H]` fp32, mean and covariance of the
        queries to come, estimated from the prompt's.
      output_norms: `[B, K, T]` fp32, L1 norm of each value's part in the layer's output, the mean
        over the query heads of a KV head.
      reconstruction: `[B, K, T]` fp32 in [0, 1], most attention that an entry gets while the
        prompt is repeated (KVzip).
    """

    queries: Float[Array, "B W N H"] | None = None
    column_sums: Float[Array, "B N T"] | None = None
    future_mean: Float[Array, "B N H"] | None = None
    future_cov: Float[Array, "B N H H"] | None = None
    output_norms: Float[Array, "B K T"] | None = None
    reconstruction: Float[Array, "B K T"] | None = None


@dataclass(frozen=True)
class Repeat:
    """How KVzip repeats a prompt (static).

    Attributes:
      chunk: tokens repeated at once.
      instructions: token ids before the first chunk, and before each of the others.
      sinks: first positions that a chunk's attention is shared with.
    """

    chunk: int
    instructions: tuple[tuple[int, ...], tuple[int, ...]]
    sinks: int


@dataclass(frozen=True)
class ProbeRequest:
    """What a prefill is asked to leave in the `Probe` (static).

    Attributes:
      queries: how many of the last ones.
      column_sums, output_norms: whether.
      future: positions after the prompt to expect queries at; 0 for none.
      skipped: first queries of the prompt that the expectation leaves out.
      repeat: how to repeat the prompt, or None.
    """

    queries: int = 0
    column_sums: bool = False
    output_norms: bool = False
    future: int = 0
    skipped: int = 0
    repeat: Repeat | None = None

    def __or__(self, other: "ProbeRequest") -> "ProbeRequest":
        """Both requests at once; where they repeat or skip differently, the first one's way."""
        return ProbeRequest(
            queries=max(self.queries, other.queries),
            column_sums=self.column_sums or other.column_sums,
            output_norms=self.output_norms or other.output_norms,
            future=max(self.future, other.future),
            skipped=self.skipped if self.future else other.skipped,
            repeat=self.repeat or other.repeat,
        )
