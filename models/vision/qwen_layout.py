"""Compute where Qwen2.5-VL's patches and tokens are, on the host (NumPy).

The tower's program then depends on the number of patches alone, not on the pictures' shapes.

I images, P patches of all of them, E values of a patch, U tokens (merged patches) of all of them,
T tokens of a prompt, B prompts.
"""

from collections.abc import Iterable, Sequence
from typing import Any, no_type_check

import numpy as np
from flax import struct
from jaxtyping import Float, Int

from kvjax.models.vision.qwen_config import QwenVisionConfig


@no_type_check  # jax maps trees to other leaves than arrays
class QwenPatches(struct.PyTreeNode):
    """Pictures as the tower reads them: patches window by window.

    Attributes:
      pixels: `[P, E]` values of every patch; those of a token lie beside each other.
      places: `[P, 2]` row and column of a patch in its picture.
      windows: `[P]` number of the window that a patch lies in, never falling.
      frames: `[P]` number of the picture (or frame of it) that a patch lies in, never falling.
      order: `[U]` where a picture's tokens, row by row, come out of the tower.
    """

    pixels: Float[Any, "P E"]
    places: Int[Any, "P 2"]
    windows: Int[Any, " P"]
    frames: Int[Any, " P"]
    order: Int[Any, " U"]


def merged_tokens(grids: Int[Any, "I 3"], merge_size: int) -> Int[np.ndarray, " I"]:
    """Tokens of each image, from its time steps, rows and columns of patches."""
    return np.prod(grids, axis=-1) // merge_size**2


def lay_out(
    pixels: Float[np.ndarray, "P E"],
    grids: Int[np.ndarray, "I 3"],
    config: QwenVisionConfig,
    total: int | None = None,
) -> QwenPatches:
    """Sort patches by window, and note where each is.

    Args:
      pixels, grids: of `kvjax.inputs.images.qwen_patches`.
      config: of the tower.
      total: patches to pad to, so that more pictures share a program; the tower's output is then
        as much longer, without meaning at its end.

    Raises:
      ValueError: rows or columns that are no multiple of `merge_size`, other numbers of patches or
        values than the grids and the config have, or a total that is less or no multiple.
    """
    merge, merged = config.merge_size, config.merged
    grids = np.asarray(grids)
    if (grids[:, 1:] % merge).any() or (grids < 1).any():
        raise ValueError(
            f"grids={grids.tolist()}, expected rows and columns in multiples of {merge}"
        )
    expected = int(np.prod(grids, axis=-1).sum()), config.patch_values
    if pixels.shape != expected:
        raise ValueError(f"pixels of shape {pixels.shape}, expected {expected} by the grids")
    total = len(pixels) if total is None else total
    if total < len(pixels) or total % merged:
        raise ValueError(
            f"total={total}, expected a multiple of {merged} of at least {len(pixels)}"
        )
    steps, rows, columns, numbers = _tokens(grids, merge)
    # Tokens of a picture stay together, and those of a window, in rows.
    keys = (columns // config.window, rows // config.window, steps, numbers)
    found, window_U = np.unique(np.stack(keys[::-1], -1), axis=0, return_inverse=True)
    window_U = window_U.reshape(-1)  # NumPy 2.0 keeps the axis
    sorted_U = np.argsort(window_U, kind="stable")
    _, frame_U = np.unique(np.stack([numbers, steps], -1), axis=0, return_inverse=True)
    corner_U2 = np.stack([rows, columns], -1)[sorted_U] * merge
    inner_X2 = np.stack(np.divmod(np.arange(merged), merge), -1)
    places_P2 = (corner_U2[:, None] + inner_X2).reshape(-1, 2)
    values_PE = pixels.reshape(len(sorted_U), merged, -1)[sorted_U].reshape(pixels.shape)
    more = total - len(pixels)
    rest = np.arange(len(sorted_U), total // merged)
    return QwenPatches(
        pixels=np.pad(values_PE, [(0, more), (0, 0)]),
        places=np.pad(places_P2, [(0, more), (0, 0)]).astype(np.int32),
        windows=_spread(window_U[sorted_U], merged, more, len(found)),
        frames=_spread(frame_U.reshape(-1)[sorted_U], merged, more, int(frame_U.max()) + 1),
        order=np.concatenate([np.argsort(sorted_U), rest]).astype(np.int32),
    )


def _tokens(grids: np.ndarray, merge: int) -> tuple[np.ndarray, ...]:
    """Time step, row, column and image of every token, image by image in rows."""
    shapes = [(step, row // merge, column // merge) for step, row, column in grids.tolist()]
    places = [np.indices(shape).reshape(3, -1) for shape in shapes]
    numbers = np.repeat(np.arange(len(shapes)), [place.shape[1] for place in places])
    steps, rows, columns = np.concatenate(places, axis=1)
    return steps, rows, columns, numbers


def _spread(numbers_U: np.ndarray, merged: int, more: int, padding: int) -> np.ndarray:
    """A token's number for each of its patches, and one of their own for those that pad."""
    numbers_P = np.repeat(numbers_U, merged)
    return np.pad(numbers_P, (0, more), constant_values=padding).astype(np.int32)


def mrope_positions(
    prompts: Sequence[Sequence[int] | np.ndarray],
    grids: Int[np.ndarray, "I 3"],
    config: QwenVisionConfig,
    width: int | None = None,
) -> tuple[Int[np.ndarray, "B T 3"], Int[np.ndarray, " B"]]:
    """Rotary positions in time, rows and columns (M-RoPE: Wang et al. 2024, section 2.1).

    A token of text has one position for all three, the next one. An image's tokens have its own
    position in time, and their row and column added to that for the others; text after it goes on
    after the largest. (Still images: every grid has one time step.)

    Args:
      prompts: token ids, with the image token once for each of an image's merged patches.
      grids: time steps (1), rows and columns of patches of every image, as they stand in the
        prompts.
      config: of the tower.
      width: T, at least the longest prompt, which is the default.

    Returns:
      Positions (0 beyond a prompt's end), and what to add to the true position of all that follows
      a prompt.

    Raises:
      ValueError: other image tokens than the grids make, a grid of several time steps, a width
        that is too small.
    """
    longest = max(map(len, prompts))
    width = longest if width is None else width
    if width < longest:
        raise ValueError(f"width={width}, expected at least the longest prompt's {longest}")
    if (np.asarray(grids)[:, 0] != 1).any():
        raise ValueError(f"grids={np.asarray(grids).tolist()}, expected one time step (no videos)")
    left = iter(np.asarray(grids).tolist())
    positions_BT3 = np.zeros((len(prompts), width, 3), np.int32)
    shift_B = np.zeros(len(prompts), np.int32)
    for index, prompt in enumerate(prompts):
        row_T3, after = _row_positions(index, np.asarray(prompt), left, config)
        positions_BT3[index, : len(row_T3)] = row_T3
        shift_B[index] = after - len(row_T3)
    more = len(list(left))
    if more:
        raise ValueError(
            f"{more} of the images have no token in the prompts, expected a place each"
        )
    return positions_BT3, shift_B


def _row_positions(
    index: int, tokens_T: np.ndarray, grids: Iterable[list[int]], config: QwenVisionConfig
) -> tuple[np.ndarray, int]:
    """Positions [T, 3] of one prompt, and the position after it."""
    image_T = tokens_T == config.image_token_id
    parts: list[np.ndarray] = []
    start, after, left = 0, 0, iter(grids)
    while start < len(tokens_T):
        if image_T[start]:
            grid = next(left, None)
            shape = [0, 0, 0] if grid is None else [1, *(n // config.merge_size for n in grid[1:])]
            count = int(np.prod(shape))
            if (
                grid is None
                or not image_T[start : start + count].all()
                or len(tokens_T) < start + count
            ):
                raise ValueError(
                    f"prompt {index} has other image tokens (id {config.image_token_id}) at"
                    f" {start} than expected there: {count}"
                )
            parts.append(np.indices(shape).reshape(3, -1).T + after)
            after += max(shape[1:])
        else:
            run = image_T[start:]
            count = int(run.argmax()) if run.any() else len(run)
            parts.append(np.repeat(np.arange(after, after + count)[:, None], 3, axis=1))
            after += count
        start += count
    return np.concatenate(parts), after
