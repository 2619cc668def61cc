"""What a cache has read, token by token and turn by turn."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class History:
    """What one row of a cache has read, in order, whatever was evicted since.

    Attributes:
      tokens: ids of prompts and answers; an image counts as the one token that stands for it.
      turns: of the conversation that these ids are; None where a text or ids were among them.
    """

    tokens: tuple[int, ...] = ()
    turns: tuple[Mapping[str, Any], ...] | None = dataclasses.field(default=(), compare=False)


BEGUN = (History(),)


def extended(
    history: Sequence[History] | None,
    rows: Sequence[Sequence[int]],
    conversations: Sequence[Sequence[Mapping[str, Any]]] | None,
    answers: Sequence[Sequence[int]] | None = None,
    texts: Sequence[str] | None = None,
) -> tuple[History, ...] | None:
    """The history of each row after what it has read now; None where none was known before.

    Args:
      history: one for all rows, or one each.
      rows: token ids read.
      conversations: all turns of each row, the earlier ones among them; None where `rows` are none.
      answers: token ids drawn after them.
      texts: of the answers; without them the turns are lost.
    """
    if history is None:
        return None
    found = []
    for index, row in enumerate(rows):
        before = history[index if len(history) > 1 else 0]
        tokens = (*before.tokens, *row)
        turns = None if conversations is None else tuple(conversations[index])
        if answers is not None:
            tokens += tuple(answers[index])
            said = None if texts is None else {"role": "assistant", "content": texts[index]}
            turns = None if turns is None or said is None else (*turns, said)
        found.append(History(tokens, turns))
    return tuple(found)
