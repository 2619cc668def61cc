"""Run `kvjax calibrate`: PrefixKV's layer profile of a model, measured over prompts."""

import argparse
import json
import logging
from pathlib import Path
from typing import Any

import kvjax
from kvjax import figures
from kvjax.calibrate import Profile, calibrate, check_calibrates, write_profile
from kvjax.cli.files import (
    Sample,
    check_length,
    check_vocabulary,
    read_images,
    read_samples,
)
from kvjax.cli.settings import announce, loading
from kvjax.config import CompressionConfig, parse_budget
from kvjax.inputs.multimodal import with_placeholders
from kvjax.inputs.prompts import as_rows
from kvjax.inputs.read import read
from kvjax.model_interface import Model, VisionModel
from kvjax.settings import check_writable, replacing


def run(arguments: argparse.Namespace) -> None:
    """Measure, write the file and its picture, and say what came out."""
    from kvjax import figures

    budget = None if arguments.budget is None else parse_budget(arguments.budget)
    config = CompressionConfig.named(arguments.method, budget=budget)
    check_calibrates(config)
    places, images = read_samples(arguments.prompts), read_images(arguments.prompts)
    picture = _picture(arguments.output) if figures.available() else None
    for path in filter(None, (arguments.output, picture)):
        check_writable(path)  # before the long work, not after it
    model, tokenizer = kvjax.load(arguments.model, **loading(arguments))
    rows = _rows(places, model, tokenizer, images)
    announce(config, [len(row) for row in rows])
    profile = calibrate(
        model, rows, config, seed=arguments.seed, batch=arguments.batch, progress=True,
        images=images,
    )  # fmt: skip
    write_profile(arguments.output, profile)
    if picture is not None:
        _draw(picture, f"{arguments.method}, {arguments.budget}", profile)
    report = {
        "method": config.method,
        "budget": config.budget,
        "prompts": len(rows),
        "tokens": sum(profile.lengths),
        "retained": profile.retained,
        "spread": profile.spread,
        "file": arguments.output,
        "picture": picture,
    }
    print(json.dumps(report) if arguments.json else _summary(report))


def _rows(
    places: dict[str, Sample], model: Model, tokenizer: Any, images: list[list[str]] | None
) -> list[list[int]]:
    """Token ids of each sample, with those of its images; complaints name its line."""
    # A text that is longer than the tokenizer's own limit is ours to complain of.
    logging.getLogger("transformers").setLevel(logging.ERROR)
    vocab_size, rows = model.config.vocab_size, []
    shown = [[] for _ in places] if images is None else images
    for (place, sample), files in zip(places.items(), shown, strict=True):
        if isinstance(sample, str):
            if tokenizer is None:
                raise ValueError(
                    f'{place} is text but the model has no tokenizer, expected "tokens"'
                )
            if files and isinstance(model, VisionModel):
                sample = with_placeholders(model, tokenizer, sample, len(files))
            sample = as_rows(sample, tokenizer=tokenizer, vocab_size=vocab_size)[0]
        check_vocabulary(sample, place, vocab_size)
        try:
            sample = read(model, sample, files or None).rows[0]
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
        check_length(sample, place, model.config.context)
        rows.append(sample)
    return rows


def _picture(path: str) -> str:
    """The picture's name: beside the profile, and never the profile's own."""
    target = Path(path)
    name = target.stem if target.suffix == ".json" else target.name
    return str(target.with_name(f"{name}.png"))


def _draw(path: str, title: str, profile: Profile) -> None:
    prompts = len(profile.lengths)
    with replacing(path) as part:
        figures.layer_profiles(
            part, {f"{title}, {prompts} prompt{'s' if prompts > 1 else ''}": profile}
        )


def _summary(report: dict[str, Any]) -> str:
    """A line a layer, then the files."""
    mean = sum(report["retained"]) / len(report["retained"])
    lines = [
        f"prompts {report['prompts']}, tokens {report['tokens']}, retained {mean:.2%}",
        "LAYER  RETAINED  SPREAD",
    ]
    for layer, pair in enumerate(zip(report["retained"], report["spread"], strict=True)):
        retained, spread = pair
        lines.append(f"{layer:5}  {retained:8.2%}  {spread:6.2%}")
    return "\n".join([*lines, *filter(None, (report["file"], report["picture"]))])
