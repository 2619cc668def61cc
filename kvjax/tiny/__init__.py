"""The bundled model: what it is trained on, how, and the weights themselves.

`vocabulary` and `filler` are the language, `tasks` what is asked in it, `batches` sequences to
train on, `settings` and `train` the trainer, `questions` what evaluation asks; `weights/` is a
Hugging Face directory like any other. The model card: docs/tiny.md.
"""

from pathlib import Path
from typing import Any

WEIGHTS = Path(__file__).parent / "weights"


def load(*, dtype: Any = "float32") -> tuple[Any, Any]:
    """The bundled model and its tokenizer, as from `kvjax.load`."""
    import kvjax

    return kvjax.load(WEIGHTS, dtype=dtype, progress=False)
