"""PrefixKV's offline profiles: what each layer retains, measured once and stored.

A profile makes layer sizes known before the prompt is read, so that a layer can be packed before
the next one runs. B prompts of a batch, P prompts, L layers, K KV heads.

Source: PrefixKV, Wang et al. 2024 (arXiv 2412.03409), whose authors publish such files.
"""

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from kvjax.config import CompressionConfig, ConfigError, check_config
from kvjax.generation.generate import compress_prompt
from kvjax.generation.request import check_rows
from kvjax.inputs.prompts import Prompts, as_rows, bucket
from kvjax.inputs.read import read
from kvjax.methods import METHODS
from kvjax.model_interface import Model
from kvjax.settings import replacing


@dataclass(frozen=True)
class Profile:
    """What each layer retained of some prompts.

    Attributes:
      by_prompt: `[P, L]` fraction of each prompt that each layer retained, mean over KV heads,
        above 0 and at most 1.
      lengths: tokens of each prompt.
    """

    by_prompt: Float[np.ndarray, "P L"]
    lengths: tuple[int, ...]

    @property
    def retained(self) -> tuple[float, ...]:
        """The mean over prompts, one fraction a layer: a `CompressionConfig.profile`."""
        return tuple(self.by_prompt.mean(0).tolist())

    @property
    def spread(self) -> tuple[float, ...]:
        """The standard deviation over prompts, one a layer; 0 for one prompt."""
        return tuple(self.by_prompt.std(0).tolist())


def check_calibrates(config: CompressionConfig) -> None:
    """Raise ConfigError unless the layer sizes of `config` follow from scores."""
    check_config(config)
    if config.layers != "prefix":
        names = ", ".join(name for name, method in METHODS.items() if method.layers == "prefix")
        raise ConfigError(
            f"method={config.method!r} (layers={config.layers!r}) has no layer profile,"
            f" expected one of {names}"
        )
    if config.profile is not None:
        raise ConfigError(
            f"profile of {len(config.profile)} layers, expected None: it is what is measured"
        )


def calibrate(
    model: Model,
    prompts: Prompts,
    config: CompressionConfig,
    *,
    tokenizer: Any = None,
    seed: int = 0,
    batch: int = 16,
    progress: bool = False,
    images: Sequence[Sequence[Any]] | None = None,
) -> Profile:
    """Compress prompts, and note how many entries each layer keeps.

    Each prompt counts alike, whatever its length. An integer budget is another fraction of each
    length; a profile measured with one is for prompts of about the lengths it was measured on.

    Args:
      model: from `kvjax.load`.
      prompts: as in `generate`.
      config: a method whose layer sizes follow from scores (`layers="prefix"`), with a budget.
      tokenizer: from `kvjax.load`, needed for text.
      seed: of the `random` scorer; no named method that can be calibrated draws.
      batch: most prompts at once, all of one bucket. It changes no result.
      progress: whether to show a bar on stderr, where that is a terminal.
      images: of a vision-language model: each prompt's, in a list of its own.

    Raises:
      ConfigError: layer sizes that do not follow from scores.
      ValueError: batch below 1, no prompt, an empty one, an id outside the vocabulary, a prompt
        longer than the model's context.
    """
    check_calibrates(config)
    if batch < 1:
        raise ValueError(f"batch={batch}, expected at least 1")
    rows = as_rows(prompts, tokenizer=tokenizer, vocab_size=model.config.vocab_size)
    if images is not None:
        if len(images) != len(rows):
            raise ValueError(f"images has {len(images)} entries, expected {len(rows)}")
        pairs = zip(rows, images, strict=True)
        rows = [read(model, row, list(given)).rows[0] for row, given in pairs]
    check_rows(model, rows, config)  # all of them before the first is run
    lengths = [len(row) for row in rows]
    by_prompt = np.zeros((len(rows), model.config.num_layers))
    with tqdm(
        total=len(rows), desc="calibrate", unit="prompt", disable=None if progress else True
    ) as bar:
        for chosen in _batches(lengths, batch):
            these = [rows[row] for row in chosen]
            shown = None if images is None else [list(images[row]) for row in chosen]
            cache = compress_prompt(
                model, these, config, tokenizer=tokenizer, seed=seed, images=shown
            )
            counts_BLK = np.asarray(cache.counts)
            tokens = np.array([lengths[row] for row in chosen])
            by_prompt[chosen] = counts_BLK.mean(-1) / tokens[:, None]
            bar.update(len(set(chosen)))
    return Profile(by_prompt=by_prompt, lengths=tuple(lengths))


def _batches(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Places of at most `size` prompts of one bucket.

    A program is compiled for each shape, so all batches of a bucket have as many rows: the last
    one is filled up with a repeated prompt.
    """
    groups: dict[int, list[int]] = defaultdict(list)
    for place, length in enumerate(lengths):
        groups[bucket(length)].append(place)
    for group in groups.values():
        rows = math.ceil(len(group) / math.ceil(len(group) / size))
        for start in range(0, len(group), rows):
            part = group[start : start + rows]
            yield part + part[-1:] * (rows - len(part))


# ---------------------------------------------------------------------------- files
def write_profile(path: str | Path, profile: Profile) -> Path:
    """Write a profile in its authors' form: a JSON list of the fraction EVICTED from each layer.

    A file of this name is replaced once the new one is whole.

    Raises:
      OSError: it cannot be written.
    """
    evicted = [1.0 - share for share in profile.retained]
    with replacing(path) as part:
        part.write_text(json.dumps(evicted))
    return Path(path)


def read_profile(path: str | Path) -> tuple[float, ...]:
    """The fraction RETAINED of each layer, from PrefixKV's list of fractions EVICTED.

    Raises:
      ValueError: not such a list.
      OSError: the file cannot be read.
    """
    expected = f"profile {path}, expected a JSON list of the fraction (0 to 1) evicted per layer"
    try:
        evicted = json.loads(Path(path).read_bytes().decode("utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{expected} ({error})") from None

    def fraction(share: Any) -> bool:
        return type(share) in (int, float) and 0 <= share <= 1

    if not (isinstance(evicted, list) and evicted and all(map(fraction, evicted))):
        raise ValueError(expected)
    return tuple(1.0 - share for share in evicted)
