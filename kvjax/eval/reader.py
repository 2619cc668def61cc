"""Prompts that several methods compress, read once for all of them."""

from collections.abc import Sequence
from typing import Any

import jax

import kvjax
from kvjax.config import CompressionConfig
from kvjax.generation.prefilled import PrefilledPrompts, by_prefill
from kvjax.inputs.prompts import bucket
from kvjax.model_interface import Model


class Reader:
    """Reads prompts once for all configs that a prefill serves; the latest prompts are held.

    Args:
      model: that reads them.
      configs: which are going to be used. Of one alone nothing is read ahead: it is compressed
        layer by layer, in less memory.
    """

    def __init__(self, model: Model, configs: Sequence[CompressionConfig]):
        self._model, self._configs = model, configs
        self._key: Any = None
        self._held: tuple[int, PrefilledPrompts] | None = None
        self._by_bucket: dict[int, list[list[CompressionConfig]]] = {}

    def read(
        self,
        prompts: list[list[int]],
        images: Any,
        config: CompressionConfig,
        more: int | Sequence[int],
    ) -> PrefilledPrompts | None:
        """The prompts as they are to be compressed with `config`; None: let it read them itself.

        `more` tokens are to follow each prompt, as in `kvjax.compress_prompt`.

        Raises:
          RuntimeError: keys and values that do not fit; its bucket is read ahead no more.
        """
        key = prompts, images, more
        if key != self._key:
            self._key, self._held = key, None
        tokens = bucket(max(map(len, prompts)))
        groups = self._groups(tokens)
        mine = [number for number, group in enumerate(groups) if config in group]
        if not mine or len(groups[mine[0]]) == 1:
            return None
        if self._held is None or self._held[0] != mine[0]:
            self._held = None  # before the next ones take their place
            try:
                found = kvjax.prefill_prompts(
                    self._model, prompts, groups[mine[0]], images=images, max_new_tokens=more
                )
                jax.block_until_ready(found.arrays)  # its seconds are nobody's
            except RuntimeError:
                self._by_bucket[tokens] = []
                raise
            self._held = mine[0], found
        return self._held[1]

    def turn(self, config: CompressionConfig, tokens: int) -> int:
        """Where a config's turn comes, so that a bucket of `tokens` is read once for each group."""
        groups = self._groups(tokens)
        return next((n for n, group in enumerate(groups) if config in group), len(groups))

    def _groups(self, tokens: int) -> list[list[CompressionConfig]]:
        """The configs, those together that one prefill of a bucket of `tokens` serves."""
        if tokens not in self._by_bucket:
            groups = by_prefill(self._configs, tokens)
            found = [[self._configs[number] for number in group] for group in groups]
            self._by_bucket[tokens] = found
        return self._by_bucket[tokens]

    def forget(self):
        """Let go of what is held."""
        self._key = self._held = None
