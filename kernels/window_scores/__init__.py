"""How much attention each key receives: column sums of a softmax, without the matrix.

    sums[n, s] = sum over queries w of softmax_s(q[w, n] . k[s, n // G] / sqrt(H)) ** power

B batch, T prompt tokens (= keys), W queries, N query heads, K KV heads, G = N // K, H head dim.
"""

from typing import Any, Literal

from jaxtyping import Array, Float, Int

from kvjax.kernels.platform import Platform, platform
from kvjax.kernels.window_scores import gpu, reference, tpu

__all__ = ["accumulated_scores", "window_scores"]

Implementation = Literal["xla", "pallas", "triton"]

_BY_PLATFORM: dict[Platform, Implementation] = {"tpu": "pallas", "gpu": "triton"}
_MODULES: dict[str, Any] = {"xla": reference, "pallas": tpu, "triton": gpu}


def window_scores(
    q: Float[Array, "B W N H"],
    query_positions: Int[Array, "B W"],
    k: Float[Array, "B T K H"],
    lengths: Int[Array, " B"],
    *,
    window: int | None = None,
    power: Literal[1, 2] = 1,
    group: Literal["mean", "max"] | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "B X T"]:
    """Column sums over a few queries (SnapKV's observation window).

    Args:
      q: the queries after RoPE.
      query_positions: their positions; -1 leaves a query out.
      k: keys after RoPE, at positions 0..T - 1.
      lengths: real tokens of each row; keys past them get 0, whatever they hold.
      window: a sliding-window layer's width, or None.
      power: of the probabilities before they are summed (KV-Compress squares them).
      group: the mean or the max over the query heads of each KV head; None for every query head.
      implementation: "xla", "pallas" (TPU) or "triton" (GPU); by default the platform's own, and
        "xla" where that one cannot take these shapes.

    Returns:
      fp32 sums, X = N without `group` and K with one; each lies in [0, number of queries].
    """
    module = _module(implementation, q, k, power, group)
    settings = {"window": window, "power": power, "group": group}
    return module.window_scores(q, query_positions, k, lengths, **settings)


def accumulated_scores(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    lse: Float[Array, "B N T"],
    lengths: Int[Array, " B"],
    *,
    window: int | None = None,
    power: Literal[1, 2] = 1,
    group: Literal["mean", "max"] | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "B X T"]:
    """Column sums over ALL queries of the prompt (H2O, PrefixKV), from attention's `lse`.

    Costs one score product and one exponential over the causal half, and no value product.
    The other arguments and the result are as in `window_scores`.
    """
    module = _module(implementation, q, k, power, group)
    settings = {"window": window, "power": power, "group": group}
    return module.accumulated_scores(q, k, lse, lengths, **settings)


def _module(
    implementation: str | None,
    q: Float[Array, "B W N H"],
    k: Float[Array, "B T K H"],
    power: int,
    group: str | None,
) -> Any:
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"k has {k.shape[2]} heads, expected a divisor of q's {q.shape[2]}")
    if power not in (1, 2):
        raise ValueError(f"power={power!r}, expected 1 or 2")
    if group not in ("mean", "max", None):
        raise ValueError(f"group={group!r}, expected 'mean', 'max' or None")
    if implementation is None:
        implementation = _BY_PLATFORM.get(platform(), "xla")
        tokens, kv_heads = k.shape[1:3]
        kernel = _MODULES[implementation]
        if implementation != "xla" and not kernel.supports(q.shape, kv_heads, tokens):
            implementation = "xla"
    if implementation not in _MODULES:
        raise ValueError(
            f"implementation={implementation!r}, expected one of {', '.join(_MODULES)}"
        )
    return _MODULES[implementation]
