"""Causal attention of a whole prompt, never materialising T x T.

B batch, T prompt tokens, N query heads, K KV heads, G = N // K, H head dim.
"""

from typing import Literal

from jaxtyping import Array, Float, Int

from kvjax.kernels.platform import Platform, platform
from kvjax.kernels.prefill_attention import gpu, reference, tpu

Implementation = Literal["xla", "cudnn", "splash"]

_BY_PLATFORM: dict[Platform, Implementation] = {"gpu": "cudnn", "tpu": "splash"}
_IMPLEMENTATIONS = {
    "xla": reference.prefill_attention,
    "cudnn": gpu.prefill_attention,
    "splash": tpu.prefill_attention,
}


def prefill_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    lengths: Int[Array, " B"],
    *,
    window: int | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Attend each prompt token to the tokens at and before it.

    Args:
      q, k, v: queries, keys and values after RoPE; K divides N and keys are never repeated.
      lengths: real tokens of each row, 1..T; what follows is padding, which no real token attends
        to.
      window: a query at p sees keys p - window + 1 .. p; None for all of them.
      implementation: "xla" (chunked online softmax), "cudnn" (GPU), "splash" (TPU); by default
        the platform's own, and "xla" where that one cannot take these shapes or dtypes.

    Returns:
      The output in q's dtype and the log-sum-exp of each query's scaled scores in fp32
      (`accumulated` scores reuse it). Rows of padding hold values without meaning: a finite
      output, and a log-sum-exp that may be -inf.
    """
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"k has {k.shape[2]} heads, expected a divisor of q's {q.shape[2]}")
    if implementation is None:
        implementation = _BY_PLATFORM.get(platform(), "xla")
        if not _supported(implementation, q):
            implementation = "xla"
    if implementation not in _IMPLEMENTATIONS:
        raise ValueError(
            f"implementation={implementation!r}, expected one of {sorted(_IMPLEMENTATIONS)}"
        )
    return _IMPLEMENTATIONS[implementation](q, k, v, lengths, window=window)


def _supported(implementation: Implementation, q: Float[Array, "B T N H"]) -> bool:
    if implementation == "cudnn":
        return gpu.supports(q.shape, q.dtype)
    if implementation == "splash":
        return tpu.supports(q.shape, q.dtype)
    return True
