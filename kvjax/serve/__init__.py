"""Serving: many requests at once on one pool of compressed caches.

    engine = kvjax.serve.Engine(model, tokenizer, config, cache_bytes=2**30)
    async for step in engine.submit("a prompt", max_new_tokens=64):
        print(step.text, end="")

Read `engine.py` first, then `scheduler.py`, `pages.py` and `programs.py`.
"""

from kvjax.serve.engine import Engine
from kvjax.serve.job import Answer, Step, Usage
from kvjax.serve.stats import Context, Holder, Stats

__all__ = ["Answer", "Context", "Engine", "Holder", "Stats", "Step", "Usage"]
