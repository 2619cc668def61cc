"""Read prompts and their images into rows of tokens and what a tower reads."""

from typing import Any

from kvjax.inputs.multimodal import Pictures, by_prompt, placeholder, prepare_inputs
from kvjax.inputs.prompts import ModelInputs, Prompts, as_rows
from kvjax.model_interface import Model, VisionModel


def read(
    model: Model,
    prompts: Prompts,
    images: Pictures | None,
    *,
    tokenizer: Any = None,
    chat: bool = False,
    **settings: Any,
) -> ModelInputs:
    """Prompts and their images as rows of tokens and what the tower reads.

    Arguments and errors as of `as_rows` and `kvjax.inputs.multimodal.by_prompt`.
    """
    vocab_size = model.config.vocab_size
    if images is None and not isinstance(model, VisionModel):
        settings |= {"tokenizer": tokenizer, "chat": chat}
        return ModelInputs(as_rows(prompts, vocab_size=vocab_size, **settings))
    pictures = by_prompt(images, prompts, model)
    rows = as_rows(
        prompts,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        images=None if pictures is None else [len(given) for given in pictures],
        placeholder=placeholder(model, tokenizer) if pictures and chat and tokenizer else "",
        chat=chat,
        **settings,
    )
    return prepare_inputs(model, rows, pictures)
