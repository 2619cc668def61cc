"""The config of Qwen2.5-VL's vision tower, read from a `config.json`'s `vision_config`.

A missing key has the default of transformers' class. What is not implemented is an error.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from kvjax.models.checkpoints.checks import check_fields, expect, is_int, positive_int, token_id

_DEFAULTS: dict[str, Any] = {
    "depth": 32,
    "hidden_size": 3584,
    "intermediate_size": 3420,
    "num_heads": 16,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "window_size": 112,
    "out_hidden_size": 3584,
    "fullatt_block_indexes": (7, 15, 23, 31),
    "hidden_act": "silu",
}
_SIZES = {
    "num_layers": "depth",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_heads": "num_heads",
    "patch_size": "patch_size",
    "temporal_patch_size": "temporal_patch_size",
    "merge_size": "spatial_merge_size",
    "window_size": "window_size",
    "projector_size": "out_hidden_size",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class QwenVisionConfig:
    """Qwen2.5-VL's tower and merger, validated and hashable.

    Attributes:
      num_layers, hidden_size, intermediate_size, num_heads: of the tower; the width of a head is a
        multiple of 4.
      patch_size, temporal_patch_size: pixels of each side of a patch, and its frames.
      merge_size: patches of each side of what becomes one token.
      window_size: pixels of each side of a window of attention, at least one token.
      full_layers: layers (from 0) in which a patch sees its whole picture, not its window.
      projector_size: D, the decoder's width.
      image_token_id: the token that stands for an image's features in a prompt.
      around: the tokens before and after those of an image.

    Raises:
      ValueError: a value outside the ranges above.
    """

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    patch_size: int
    temporal_patch_size: int
    merge_size: int
    window_size: int
    projector_size: int
    full_layers: tuple[int, ...]
    image_token_id: int = 151655
    around: tuple[int, int] = (151652, 151653)

    def __post_init__(self):
        check_fields(self)
        multiple = f"a multiple of 4 num_heads = {4 * self.num_heads}"
        fits = self.hidden_size % (4 * self.num_heads) == 0
        expect(fits, "hidden_size", multiple, self.hidden_size)
        least = self.patch_size * self.merge_size
        wide = f"at least patch_size times spatial_merge_size = {least}"
        expect(self.window_size >= least, "window_size", wide, self.window_size)
        listed = isinstance(self.full_layers, tuple)
        known = listed and all(is_int(n, 0) and n < self.num_layers for n in self.full_layers)
        expected = f"a list of layers, 0 to {self.num_layers - 1}"
        expect(known, "fullatt_block_indexes", expected, self.full_layers)

    @property
    def merged(self) -> int:
        """Patches of a token."""
        return self.merge_size**2

    @property
    def window(self) -> int:
        """Tokens of each side of a window."""
        return self.window_size // self.patch_size // self.merge_size

    @property
    def patch_values(self) -> int:
        """E, values of a patch."""
        return 3 * self.temporal_patch_size * self.patch_size**2

    @classmethod
    def from_hf(cls, mapping: Mapping[str, Any], projector_size: int) -> "QwenVisionConfig":
        """Read the dictionary of a Qwen2.5-VL `config.json`.

        Args:
          mapping: its keys.
          projector_size: width of the decoder, which `out_hidden_size` has to be.

        Raises:
          ValueError: one sentence that names the key, its value and what was expected.
        """
        given = mapping.get("vision_config")
        expect(isinstance(given, Mapping | None), "vision_config", "an object or null", given)
        keys = _DEFAULTS | dict(given or {})
        for name in ("in_channels", "in_chans"):  # the second is how published files spell it
            expect(keys.get(name, 3) == 3, f"vision_config.{name}", "3", keys.get(name))
        act = keys["hidden_act"]
        expect(act == "silu", "vision_config.hidden_act", "'silu'", act)
        width = keys["out_hidden_size"]
        wide = f"the decoder's width, {projector_size}"
        expect(width == projector_size, "vision_config.out_hidden_size", wide, width)
        layers = keys["fullatt_block_indexes"]

        def token(name: str, missing: int) -> int:
            return token_id(name, mapping.get(name, missing))

        return cls(
            **{
                field: positive_int(f"vision_config.{key}", keys[key])
                for field, key in _SIZES.items()
            },
            full_layers=tuple(layers) if isinstance(layers, list) else layers,
            image_token_id=token("image_token_id", 151655),
            around=(token("vision_start_token_id", 151652), token("vision_end_token_id", 151653)),
        )
