"""Made-up probes that hold everything that any scorer reads."""

import numpy as np

from kvjax import Probe

# Every scorer's reading, every allocator and every rule of what is kept, in few methods: for tests
# that compile a whole model for each.
TYPICAL = (
    "ada-pyramid",
    "prefixkv",
    "critical-ada-snapkv",
    "kv-compress",
    "joint-kvzip",
    "ada-expected-attention",
    "chunk-snapkv",
    "key-diff",
    "h2o",
    "random",
)


def probe_of(seed, batch, tokens, heads, kv_heads, head_dim, queries) -> Probe:
    """Of B rows of T tokens, N query and K KV heads; the last W queries."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    root = normal(batch, heads, head_dim, head_dim)
    return Probe(
        queries=normal(batch, queries, heads, head_dim),
        column_sums=np.exp(normal(batch, heads, tokens)),
        future_mean=normal(batch, heads, head_dim),
        future_cov=root @ root.swapaxes(-1, -2) / head_dim,
        output_norms=np.abs(normal(batch, kv_heads, tokens)),
        reconstruction=rng.random((batch, kv_heads, tokens)).astype(np.float32),
    )
