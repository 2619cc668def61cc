"""Prefill attention on TPUs: splash attention, JAX's own Pallas kernel."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jaxtyping import Array, Float, Int

_LANES = 128


def supports(shape: tuple[int, ...], dtype: jnp.dtype) -> bool:
    """Whole blocks of 128 tokens; any head width (narrow heads are padded to the lanes)."""
    del dtype
    return shape[1] % _LANES == 0


def prefill_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    lengths: Int[Array, " B"],
    *,
    window: int | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """See `kvjax.kernels.prefill_attention`; `interpret` runs the kernel on the CPU."""
    batch, tokens, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    group = heads // kv_heads
    if not supports(q.shape, q.dtype):
        raise NotImplementedError(f"splash attention takes whole blocks of {_LANES}, {q.shape=}")
    mask = (
        splash.CausalMask((tokens, tokens))
        if window is None
        else splash.LocalMask((tokens, tokens), (window - 1, 0), 0)
    )
    # The largest block of at most 512 that divides the prompt.
    block = next(size for size in (512, 384, 256, _LANES) if tokens % size == 0)
    attend = splash.make_splash_mqa_single_device(
        splash.MultiHeadMask([mask] * group),
        block_sizes=splash.BlockSizes(block_q=block, block_kv=block, block_kv_compute=block),
        save_residuals=True,
        interpret=interpret,
    )
    widen = ((0, 0), (0, 0), (0, 0), (0, -head_dim % _LANES))
    q, k, v = (jnp.pad(x, widen) for x in (q * head_dim**-0.5, k, v))
    q_BKGTH = q.reshape(batch, tokens, kv_heads, group, -1).transpose(0, 2, 3, 1, 4)
    real_BT = (jnp.arange(tokens) < lengths[:, None]).astype(jnp.int32)
    segments = splash.SegmentIds(q=real_BT, kv=real_BT)  # padding sees padding, nothing else does
    per_head = jax.vmap(attend, in_axes=(0, 0, 0, None))
    out_BKGTH, (lse_BKGT,) = jax.vmap(per_head)(
        q_BKGTH, k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3), segments
    )
    out_BTNH = out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(batch, tokens, heads, -1)
    return out_BTNH[..., :head_dim], lse_BKGT.reshape(batch, heads, tokens)
