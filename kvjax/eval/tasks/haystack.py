"""The text that needles are hidden in: a user's own, or RULER's repeated sentences."""

import re
from collections.abc import Sequence
from pathlib import Path

from kvjax.eval.tasks.files import read_json, read_text, shortened

# RULER's noise (NVIDIA/RULER @c3f5e3b4, data/synthetic/niah.py).
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
# Places that needles are put at in an essay, percent of its sentences (likewise).
DEPTHS = tuple(round(100 * place / 39) for place in range(40))

_END = re.compile(r"(?<=[.!?])\s+")


def read_essay(path: str | Path) -> list[str]:
    """The words of a text file, or of a JSON file {"text": ...}.

    Raises:
      ValueError: neither, or no word in it.
      OSError: it cannot be read.
    """
    if str(path).endswith((".json", ".json.gz")):
        value = read_json(path)
        text = value.get("text") if isinstance(value, dict) else None
        if not isinstance(text, str):
            raise ValueError(f'haystack {path} is {shortened(value)}, expected {{"text": "..."}}')
    else:
        text = read_text(path)
    words = text.split()
    if not words:
        raise ValueError(f"haystack {path} has no words, expected a text")
    return words


def essay_of(words: Sequence[str], count: int) -> list[str]:
    """Sentences of the first `count` words; the text starts anew where it is shorter.

    A sentence ends at ".", "!" or "?" before a space (RULER asks NLTK's punkt model).
    """
    repeated = list(words) * -(-count // len(words))
    return _END.split(" ".join(repeated[:count]))
