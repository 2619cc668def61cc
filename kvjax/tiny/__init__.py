"""A small model trained on synthetic long-context tasks, to judge compression offline.

`vocabulary` and `filler` are the language, `tasks` what is asked in it, `batches` sequences to
train on, `settings` and `train` the trainer, `questions` what evaluation asks, `weights/` the model
that came of it. See docs/tiny.md.
"""

from pathlib import Path
from typing import Any

import jax.numpy as jnp

# A Hugging Face directory.
WEIGHTS = Path(__file__).parent / "weights"


def load(dtype: Any = jnp.float32) -> tuple[Any, Any]:
    """The bundled model and its tokenizer, as `kvjax.load` gives them."""
    import kvjax

    return kvjax.load(WEIGHTS, dtype=dtype, progress=False)
