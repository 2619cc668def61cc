"""Attention of a few new tokens to cached entries, in parts that merge by log-sum-exp."""

from kvjax.kernels.decode_attention.reference import decode_attention, merge

__all__ = ["decode_attention", "merge"]
