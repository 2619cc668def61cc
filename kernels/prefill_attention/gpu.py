"""Prefill attention on GPUs: cuDNN flash attention through `jax.nn.dot_product_attention`."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def supports(shape: tuple[int, ...], dtype: jnp.dtype) -> bool:
    """cuDNN's flash attention takes bf16 and fp16, and heads up to 128 wide in steps of 8."""
    return dtype in (jnp.bfloat16, jnp.float16) and shape[-1] <= 128 and shape[-1] % 8 == 0


def prefill_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    lengths: Int[Array, " B"],
    *,
    window: int | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """See `kvjax.kernels.prefill_attention`."""
    if not supports(q.shape, q.dtype):
        raise NotImplementedError(f"cuDNN attention takes no {q.shape=} in {q.dtype}")
    out_BTNH, lse_BTN = jax.nn.dot_product_attention(
        q,
        k,
        v,
        is_causal=True,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
        return_residual=True,
    )
    # cuDNN leaves rows past a sequence's length undefined.
    real_BT = jnp.arange(q.shape[1]) < lengths[:, None]
    out_BTNH = jnp.where(real_BT[:, :, None, None], out_BTNH, 0)
    lse_BTN = jnp.where(real_BT[:, :, None], lse_BTN.astype(jnp.float32), 0.0)
    return out_BTNH, lse_BTN.transpose(0, 2, 1)
