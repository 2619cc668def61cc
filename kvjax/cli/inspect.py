"""Run `kvjax inspect`; slow imports come late."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import kvjax
from kvjax.cli.settings import loading
from kvjax.config import CompressionConfig, parse_budget
from kvjax.methods import METHODS
from kvjax.model_interface import Model, VisionModel

_METHODS = "snapkv,ada-snapkv,prefixkv,ada-prefixkv,kvzip,streaming-llm"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `kvjax inspect`."""
    add = parser.add_argument
    add("--model", metavar="M", help="a folder, a GGUF file or org/name (the bundled model)")
    add("--revision", metavar="R", help="branch, tag or commit of a name on the hub (main)")
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of weights and cache (float32)",
    )
    add("--max-context", type=int, metavar="N", help="most tokens of the prompt (the model's own)")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT")
    prompt.add_argument("--prompt-file", metavar="F", help="the whole file as it is, in UTF-8")
    add(
        "--image",
        action="append",
        metavar="F",
        help="a picture, for a vision-language model; repeatable",
    )
    add("--chat", action="store_true", help="apply the model's chat template")
    add("--methods", default=_METHODS, metavar="A,B", help=f"of {', '.join(METHODS)} (%(default)s)")
    add(
        "--budget",
        default="25%",
        metavar="N|P%",
        help="entries kept per KV head, or a percentage of the prompt (25%%)",
    )
    add("--seed", type=int, default=0, metavar="N", help="of the method random (0)")
    add("-o", "--out", default="inspect.html", metavar="FILE", help="(%(default)s)")
    add("--json", action="store_true", help="print one JSON object: file, tokens, entries kept")


def run(arguments: argparse.Namespace) -> None:
    """`kvjax inspect`."""
    from kvjax import tiny
    from kvjax.cli.files import check_length, read_text
    from kvjax.eval.report.inspect import pieces, shown, write_inspection
    from kvjax.inputs.images import load_image
    from kvjax.inputs.multimodal import with_placeholders
    from kvjax.inputs.read import read

    configs = _configs(arguments.methods, arguments.budget)
    given = arguments.prompt_file
    text = arguments.prompt if given is None else read_text(given)
    pictures = [load_image(file) for file in arguments.image or ()]
    directory = arguments.model or tiny.WEIGHTS
    model, tokenizer = kvjax.load(directory, **loading(arguments))
    if tokenizer is None:
        raise ValueError(f"{directory} has no tokenizer, expected one")
    if pictures and isinstance(model, VisionModel) and not arguments.chat:
        text = with_placeholders(model, tokenizer, text, len(pictures))
    images = [pictures] if pictures else None
    inputs = read(model, [text], images, tokenizer=tokenizer, chat=arguments.chat)
    [row] = inputs.rows
    check_length(row, given or "--prompt", model.config.context)
    kept = _masks(model, tokenizer, row, images, configs, arguments.seed)
    name = Path(directory).name if arguments.model else "the bundled one"
    facts = {
        "model": name,
        "budget": arguments.budget,
        "tokens": len(row),
        "shape": f"{model.config.num_layers} layers of {model.config.num_kv_heads} KV heads",
    }
    token = inputs.token if pictures else None
    written = write_inspection(
        arguments.out,
        pieces(row, tokenizer, token),
        kept,
        "What each head kept",
        facts,
        shown(model, inputs, pictures),
    )
    means = {name: float(mask.sum(axis=-1).mean()) for name, mask in kept.items()}
    if arguments.json:
        print(json.dumps({"file": str(written), "tokens": len(row), "kept": means}))
        return
    for name, mean in means.items():
        print(f"{name}: {mean:.1f} of {len(row)} entries a head")
    print(written)


def _configs(methods: str, budget: str) -> dict[str, CompressionConfig]:
    names = list(dict.fromkeys(filter(None, (name.strip() for name in methods.split(",")))))
    if not names:
        raise ValueError(f"--methods {methods!r} is empty, expected some of {', '.join(METHODS)}")
    parsed = parse_budget(budget)
    return {name: CompressionConfig.named(name, parsed) for name in names}


def _masks(
    model: Model,
    tokenizer: Any,
    row: Sequence[int],
    images: Any,
    configs: dict[str, CompressionConfig],
    seed: int,
) -> dict[str, np.ndarray]:
    """`[L, K, T]` which tokens each head keeps, by method."""
    from tqdm import tqdm

    masks = {}
    with tqdm(configs.items(), desc="inspect", unit="method", disable=None) as bar:
        for name, config in bar:
            bar.set_postfix_str(name)
            cache = kvjax.compress_prompt(
                model, [row], config, tokenizer=tokenizer, seed=seed, images=images
            )
            masks[name] = np.asarray(cache.kept_mask(len(row))[0])
    return masks
