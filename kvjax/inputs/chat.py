"""Conversations as a chat template writes them, and what follows what a cache has read of one.

Turns are dictionaries with a role and a content, as Hugging Face's chat templates take them.
"""

import contextlib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kvjax.inputs.prompts import encoded

Turn = Mapping[str, Any]
Messages = Sequence[Turn] | Sequence[Sequence[Turn]]
# Marks the end of a turn in a rendered conversation; a template leaves letters as they are.
_MARK = "kvjaxEndOfThisTurn"
_ASKING = {"add_generation_prompt": True}
_OWN = (
    "add_generation_prompt", "answered", "continue_final_message", "conversation", "history",
    "images", "placeholder", "read", "tokenize", "tokenizer", "turns",
)  # fmt: skip


def conversations(messages: Messages) -> list[list[Turn]]:
    """One conversation, or several, as a list of them.

    Raises:
      ValueError: none, an empty one, or a turn without role and content.
    """
    several = [messages] if len(messages) and isinstance(messages[0], Mapping) else messages
    found: list[list[Turn]] = [list(turns) for turns in several]  # type: ignore[arg-type]
    if not found or not all(found):
        raise ValueError(f"messages={messages!r}, expected at least one turn in each conversation")
    for turns in found:
        for index, turn in enumerate(turns):
            if not isinstance(turn, Mapping) or not {"role", "content"} <= set(turn):
                raise ValueError(
                    f"messages[{index}] is {turn!r}, expected a dictionary with role and content"
                )
    return found


def check_template_args(names: Iterable[str]) -> None:
    """Raise ValueError for arguments of a template that are kvjax's own to give."""
    for name in names:
        if name in _OWN:
            raise ValueError(
                f"template argument {name!r}, expected none of {', '.join(_OWN)}, which follow from"
                " the conversation"
            )


def rendered(turns: Sequence[Turn], tokenizer: Any, **settings: Any) -> str:
    """The turns of a conversation as the tokenizer's chat template writes them.

    Raises:
      ValueError: the template fails on them.
    """
    try:
        return tokenizer.apply_chat_template(list(turns), tokenize=False, **settings)
    except Exception as error:  # a template is a program: TypeError and KeyError are among it
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"the chat template does not take this prompt ({reason})") from None


def check_template(tokenizer: Any, argument: str) -> None:
    """Raise ValueError, which begins with the argument, where there is no chat template."""
    if tokenizer is None:
        raise ValueError(f"{argument} but tokenizer=None, expected a tokenizer with chat template")
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(f"{argument}, expected a tokenizer with a chat template")


# ---------------------------------------------------------------------------- a text as a turn
def user_turn(
    text: str, tokenizer: Any, images: int = 0, placeholder: str = "", **settings: Any
) -> Turn:
    """A text as the user's turn, with its images where it has a placeholder, or first.

    Args:
      text: the content.
      tokenizer: with a chat template.
      images: how many the text has.
      placeholder: what stands for one in the text.
      settings: of the template.

    Raises:
      ValueError: the template fails on the text.
    """
    plain = {"role": "user", "content": text}
    if not images:
        return plain
    if placeholder not in text:
        text = placeholder * images + text
        plain = {"role": "user", "content": text}
    parts: list[dict[str, str]] = []
    for index, piece in enumerate(text.split(placeholder)):
        parts += [{"type": "image"}] * (index > 0)
        parts += [{"type": "text", "text": piece}] * bool(piece)
    turn = {"role": "user", "content": parts}
    # A template for text alone fails on such a list, writes it as it is, or leaves images out.
    with contextlib.suppress(ValueError):
        found = rendered([turn], tokenizer, **_ASKING, **settings)
        if found.count(placeholder) == text.count(placeholder):
            return turn
    return plain


def user_turns(
    prompts: str | Sequence[Any],
    tokenizer: Any,
    pictures: Sequence[Sequence[Any]] | None,
    placeholder: str,
    **settings: Any,
) -> list[list[Turn]]:
    """Each text as a conversation of the user's turn alone; arguments as of `user_turn`.

    Raises:
      ValueError: no texts, or an empty one.
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    found: list[list[Turn]] = []
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError("prompts are token ids beside chat=True, expected texts")
        if not text:
            raise ValueError(f"prompt {index} is empty, expected at least one token")
        images = 0 if pictures is None else len(pictures[index])
        found.append([user_turn(text, tokenizer, images, placeholder, **settings)])
    return found


def chat_text(prompt: str, tokenizer: Any, images: int = 0, placeholder: str = "") -> str:
    """The prompt as the user's turn (`user_turn`), as the template writes it."""
    check_template(tokenizer, "chat=True")
    turn = user_turn(prompt, tokenizer, images, placeholder)
    return rendered([turn], tokenizer, add_generation_prompt=True)


def opening(system: str | None, document: str | None, tokenizer: Any, **settings: Any) -> list:
    """Turns before the first question: instructions, and a document to be asked about.

    The document is a turn of the user's; where a template wants roles to alternate, it follows the
    instructions in the system's turn.

    Raises:
      ValueError: the template takes neither.
    """
    check_template(tokenizer, "a chat")
    told = [{"role": "system", "content": system}] if system else []
    ways = [[*told, {"role": "user", "content": document}]] if document else [told]
    if document:
        together = "\n\n".join(filter(None, (system, document)))
        ways.append([{"role": "system", "content": together}])
    question = {"role": "user", "content": "?"}
    for turns in ways[:-1]:
        with contextlib.suppress(ValueError):
            rendered([*turns, question], tokenizer, **_ASKING, **settings)
            return turns
    rendered([*ways[-1], question], tokenizer, **_ASKING, **settings)
    return ways[-1]


# ---------------------------------------------------------------------------- token ids
def turn_tokens(turns: Sequence[Turn], tokenizer: Any, **settings: Any) -> list[int]:
    """Token ids of a conversation; the template writes its special tokens itself.

    Args:
      turns: the conversation.
      tokenizer: with a chat template.
      settings: of the template, `add_generation_prompt` for the beginning of an answer among them.
    """
    return encoded(rendered(turns, tokenizer, **settings), tokenizer, special=False)


def conversation_rows(
    turns: Sequence[Sequence[Turn]],
    tokenizer: Any,
    history: Sequence[Any] | None,
    answered: bool,
    **settings: Any,
) -> tuple[list[list[int]], list[list[Turn]]]:
    """Token ids to be read of each conversation, and all of its turns.

    Args:
      turns: of each conversation.
      tokenizer, settings: as of `turn_tokens`.
      history: what a cache has read (`kvjax.cache.history.History`), of each conversation or of
        all; None where nothing was read.
      answered: whether an answer is to follow.

    Raises:
      ValueError: a conversation that is not the cache's, or as many as it has not.
    """
    if history is None:
        settings = {"add_generation_prompt": answered} | settings
        whole = [list(each) for each in turns]
        return [turn_tokens(each, tokenizer, **settings) for each in whole], whole
    if len(history) not in (1, len(turns)):
        raise ValueError(
            f"the cache has {len(history)} rows, expected 1 or the {len(turns)} conversations"
        )
    befores = list(history) * (len(turns) if len(history) == 1 else 1)
    found = [
        continued(each, before.tokens, before.turns, tokenizer, **settings)
        for each, before in zip(turns, befores, strict=True)
    ]
    return [rest for rest, _ in found], [whole for _, whole in found]


def continued(
    turns: Sequence[Turn],
    read: Sequence[int],
    held: Sequence[Turn] | None,
    tokenizer: Any,
    **settings: Any,
) -> tuple[list[int], list[Turn]]:
    """Token ids that follow what a cache has read of a conversation, and all of its turns.

    What was read and what follows are together what the template makes of the whole conversation,
    the ids of answers as they were drawn. Where a template writes an earlier turn otherwise than it
    was read (it drops earlier thinking, or trims), what was read stays, and a warning names the
    first such turn.

    Args:
      turns: those that follow, or the whole conversation.
      read: ids that the cache has read.
      held: turns that these are; None where they are no turns, and `turns` is all of it then.
      tokenizer, settings: as of `turn_tokens`.

    Raises:
      ValueError: a conversation that is not the cache's.
    """
    if not read:
        raise ValueError(
            "the cache does not say what it has read, expected one of compress_prompt or generate"
            " for messages to follow"
        )
    settings = {"add_generation_prompt": True} | settings
    whole = _whole(turns, held)
    ids, count = turn_tokens(whole, tokenizer, **settings), len(read)
    if ids[:count] == list(read):
        rest = ids[count:]
    else:
        before, after = _decoded(read, tokenizer), _decoded(ids, tokenizer)
        if after.startswith(before):  # an answer that the tokenizer cuts up otherwise
            rest = _amid(after[len(before) :], tokenizer)
        elif held is None:
            raise ValueError(
                "messages do not begin with what the cache has read, expected the whole"
                " conversation, or a cache of turns (compress_prompt(messages=))"
            )
        else:
            _warn_of_rewriting(whole, len(held), before, after, tokenizer, settings)
            rest = _after(whole, len(held) - 1, read, tokenizer, settings)
    if not rest:
        raise ValueError("messages end where the cache does, expected turns that follow")
    return rest, whole


def _whole(turns: Sequence[Turn], held: Sequence[Turn] | None) -> list[Turn]:
    """The whole conversation, of which `turns` is the end or all."""
    if not held:
        return list(turns)
    same = [_content(a) == _content(b) for a, b in zip(turns, held, strict=False)]
    if all(same) and len(turns) >= len(held):
        return [*held, *turns[len(held) :]]
    if not same[0] and turns[0]["role"] != "system":
        return [*held, *turns]
    told = " are the beginning of what the cache holds"
    if False in same:
        told = f"[{same.index(False)}] is not the turn that the cache holds there"
    raise ValueError(
        f"messages{told}, expected the whole conversation as it was, or the turns that follow it"
    )


def _content(turn: Turn) -> tuple[str, Any]:
    content = turn["content"]
    return turn["role"], content.strip() if isinstance(content, str) else content


def _amid(text: str, tokenizer: Any) -> list[int]:
    """Token ids of a text amid another: without the space that some tokenizers put in front."""
    for letter in ("\n", "a"):
        ids = encoded(letter, tokenizer, special=False)
        found = encoded(letter + text, tokenizer, special=False)
        if found[: len(ids)] == ids:
            return found[len(ids) :]
    return encoded(text, tokenizer, special=False)


def _decoded(ids: Sequence[int], tokenizer: Any) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=False)


def _around(
    turns: Sequence[Turn], index: int, tokenizer: Any, settings: Mapping[str, Any]
) -> tuple[str, str]:
    """The whole conversation as text: up to the end of one turn's content, and from there on."""
    content = turns[index]["content"]
    if isinstance(content, str):
        marked: Any = content + _MARK
    else:
        marked = [*content, {"type": "text", "text": _MARK}]
    changed = [*turns[:index], dict(turns[index]) | {"content": marked}, *turns[index + 1 :]]
    before, found, after = rendered(changed, tokenizer, **settings).partition(_MARK)
    if not found:
        raise ValueError(
            f"the chat template leaves out turn {index} ({turns[index]['role']}), which the cache"
            " has read, expected one that writes it"
        )
    return before, after


def _warn_of_rewriting(
    turns: Sequence[Turn],
    held: int,
    before: str,
    after: str,
    tokenizer: Any,
    settings: Mapping[str, Any],
) -> None:
    """Name the first turn that is rendered otherwise than it was read."""
    pairs = zip(before, after, strict=False)
    same = next((place for place, (a, b) in enumerate(pairs) if a != b), len(after))
    index = 0
    for index in range(held):
        text = _around(turns, index, tokenizer, settings)[0]
        if len(_decoded(encoded(text, tokenizer, special=False), tokenizer)) > same:
            break
    warnings.warn(
        f"the chat template writes turn {index} ({turns[index]['role']}) otherwise than the cache"
        " has read it, which stays as it was read",
        stacklevel=2,
    )


def _after(
    turns: Sequence[Turn],
    index: int,
    read: Sequence[int],
    tokenizer: Any,
    settings: Mapping[str, Any],
) -> list[int]:
    """What stands behind a turn's content, without the tokens of it that were read already."""
    ids = _amid(_around(turns, index, tokenizer, settings)[1], tokenizer)
    # An answer's end may have been drawn, or not.
    longest = min(len(ids), len(read))
    overlaps = (n for n in range(longest, 0, -1) if list(read[-n:]) == ids[:n])
    return ids[next(overlaps, 0) :]
