"""Read prompts or conversations, and their images, into rows of tokens and what a tower reads."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from kvjax.inputs import chat as chats
from kvjax.inputs.multimodal import Pictures, by_prompt, placeholder, prepare_inputs
from kvjax.inputs.prompts import ModelInputs, Prompts, as_rows
from kvjax.model_interface import Model, VisionModel


def read(
    model: Model,
    prompts: Prompts | None,
    images: Pictures | None = None,
    *,
    tokenizer: Any = None,
    chat: bool = False,
    messages: chats.Messages | None = None,
    template_args: Mapping[str, Any] | None = None,
    history: Sequence[Any] | None = None,
    answered: bool = True,
    **settings: Any,
) -> ModelInputs:
    """Prompts or conversations, and their images, as rows of tokens and what the tower reads.

    Arguments as of `kvjax.generate`, `as_rows` and `kvjax.inputs.multimodal.by_prompt`; and

    Args:
      history: what a cache has read of each row, or of all (`kvjax.cache.history.History`): turns
        follow it.
      answered: whether an answer is to follow the turns.

    Raises:
      ValueError: as these, or not one of prompts and messages.
    """
    if (prompts is None) == (messages is None) or (chat and messages is not None):
        got = "neither" if prompts is None and messages is None else "both"
        raise ValueError(f"prompts (or chat=True) and messages: {got} given, expected one of them")
    talk = chat or messages is not None
    if template_args and not talk:
        raise ValueError(f"template_args={template_args!r}, expected messages or chat=True beside")
    given: Any = prompts if messages is None else chats.conversations(messages)
    text_alone = images is None and not isinstance(model, VisionModel)
    each: Any = given if messages is None else [""] * len(given)
    pictures = None if text_alone else by_prompt(images, each, model)
    turns = None
    if talk:
        chats.check_template_args(template_args or ())
        chats.check_template(tokenizer, "chat=True" if chat else "messages are given")
        if chat:
            token = placeholder(model, tokenizer) if pictures else ""
            given = chats.user_turns(given, tokenizer, pictures, token, **(template_args or {}))
        given, turns = chats.conversation_rows(
            given, tokenizer, history, answered, **(template_args or {})
        )
    rows = as_rows(given, tokenizer=tokenizer, vocab_size=model.config.vocab_size, **settings)
    inputs = ModelInputs(rows) if text_alone else prepare_inputs(model, rows, pictures)
    return dataclasses.replace(inputs, given=rows, turns=turns)
