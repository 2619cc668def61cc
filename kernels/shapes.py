"""Named shapes, one list for tests, benchmark and ahead-of-time compilation.

A shape is a layer of a known model under a load: N query heads, K KV heads, H head dim; B rows, a
prompt of T tokens, a budget of entries a KV head.
"""

from typing import NamedTuple


class Shape(NamedTuple):
    """One layer under one load."""

    name: str
    heads: int
    kv_heads: int
    head_dim: int
    batch: int
    tokens: int
    budget: int
    dtype: str = "bfloat16"

    @property
    def slots(self) -> int:
        """Slots that a layer has in the pool."""
        return self.kv_heads * self.budget


SHAPES = (
    Shape("llama-3-8b b1 32k/1024", 32, 8, 128, 1, 32_768, 1024),
    Shape("llama-3-8b b16 32k/1024", 32, 8, 128, 16, 32_768, 1024),
    Shape("llama-3-8b b64 8k/512", 32, 8, 128, 64, 8192, 512),
    Shape("llama-3-8b b1 128k/8192", 32, 8, 128, 1, 131_072, 8192),
    Shape("llama-3-70b/tp8 b16 32k/1024", 8, 1, 128, 16, 32_768, 1024),
    Shape("qwen3-0.6b b4 8k/512", 16, 8, 128, 4, 8192, 512),
    Shape("qwen3-32b b4 32k/2048", 64, 8, 128, 4, 32_768, 2048),
    Shape("mistral-7b b8 8k/128", 32, 8, 128, 8, 8192, 128),
    Shape("llava-1.5-7b b16 1k/205", 32, 32, 128, 16, 1024, 205),
    Shape("qwen2-0.5b b4 8k/512", 14, 2, 64, 4, 8192, 512),
    Shape("phi-3-mini b4 4k/256", 32, 32, 96, 4, 4096, 256),
    Shape("gemma-like b2 8k/512", 8, 4, 256, 2, 8192, 512),
    Shape("tiny b4 1k/128", 8, 4, 32, 4, 1024, 128, "float32"),
)
# The three that every test run compiles for every target.
TESTED = (SHAPES[1], SHAPES[4], SHAPES[9])
