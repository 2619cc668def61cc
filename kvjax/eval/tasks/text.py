"""Tasks from any text: its prefixes, and what follows them.

"perplexity": the continuation is scored under a compressed prefix. "rouge": a continuation is
generated and compared with the text's own. The question is empty: the context goes on.
"""

import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from kvjax.eval.tasks.example import Ask, Document, Task, TaskSettings
from kvjax.eval.tasks.files import read_text
from kvjax.eval.tasks.lengths import largest, prompt_tokens, room, tokens_of

# What separates documents in a file; without it the whole file is one.
SEPARATOR = "<|endoftext|>"
_WORD = re.compile(r"\s*\S+")


def _read(name: str, path: Path, settings: TaskSettings) -> Iterator[Document]:
    made = 0
    for piece in read_text(path).split(SEPARATOR):
        for context, rest in _parts(piece.strip(), settings):
            ask = Ask(
                id=f"{name}/{made}/0",
                question="",
                answers=(rest,),
                new_tokens=settings.continuation,
                metric="perplexity" if name == "perplexity" else "rouge-l",
            )
            yield Document(id=f"{name}/{made}", task=name, context=context, asks=(ask,))
            made += 1
            if made == settings.count:
                return
    if not made:
        raise ValueError(f"{path} has no {settings.length} tokens in a row, expected a longer text")


def _parts(text: str, settings: TaskSettings) -> Iterator[tuple[str, str]]:
    """(prefix, continuation) one after another; an end that is too short for both is left out.

    Both end before a space, and together they are the text as it stands.
    """
    tokenizer, wanted = settings.tokenizer, settings.continuation
    limit = room(settings, wanted)
    words, at = _WORD.findall(text), 0

    def ends(start: int, most: int, special: bool) -> int:
        """Where the longest part from `start` with at most so many tokens ends.

        A prefix has special tokens, and no space at its beginning.
        """
        least, left = min(start + 1, len(words)), len(words)

        def size(end: int) -> int:
            part = _joined(words, start, end)
            return len(tokens_of(tokenizer, part.lstrip() if special else part, special=special))

        found = largest(size, most, least, left)
        return start if found is None else found

    while at < len(words):
        middle = ends(at, limit, True)
        end = ends(middle, wanted, False)
        if end == len(words) or not at < middle < end:
            return
        context = _joined(words, at, middle).lstrip()
        while prompt_tokens(tokenizer, context, _joined(words, middle, end)) > limit + wanted:
            end -= 1
        yield context, _joined(words, middle, end)
        at = end


def _joined(words: Sequence[str], start: int, end: int) -> str:
    return "".join(words[start:end])


def _task(name: str, metric: str, source: str) -> Task:
    return Task(
        name=name,
        metric=metric,
        source=source,
        needs=("tokenizer", "length", "data"),
        read=partial(_read, name),
    )


TASKS = (
    _task("perplexity", "perplexity", "a text of the user's: mean NLL of what follows a prefix"),
    _task("rouge", "rouge-l", "a text of the user's: ROUGE-L (Lin 2004) of what follows a prefix"),
)
