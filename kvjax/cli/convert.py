"""Run `kvjax convert`; slow imports come late."""

import argparse
import shutil
import sys
from pathlib import Path

# What a checkpoint's folder holds beside its weights; what is there is copied.
_BESIDE = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
    "generation_config.json", "preprocessor_config.json", "processor_config.json",
)  # fmt: skip


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `kvjax convert`."""
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="such as stories15M.bin; a directory for orbax")
    add(
        "vocabulary",
        metavar="VOCABULARY",
        nargs="?",
        help="such as tokenizer.bin, of a llama2.c checkpoint",
    )
    add("out", metavar="OUT", help="a directory that is new or empty")
    add(
        "--to",
        choices=("huggingface", "orbax"),
        default="huggingface",
        help="huggingface: from a llama2.c checkpoint; orbax: from a Hugging Face directory, to"
        " load straight to the shards of any mesh (huggingface)",
    )
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="bfloat16",
        help="of an Orbax checkpoint's weights (bfloat16)",
    )
    add(
        "--split",
        type=int,
        metavar="N",
        help="devices that the weights are split over while they are converted, for models that one"
        " device does not hold (1)",
    )
    add(
        "--distributed",
        action="store_true",
        help="convert with all processes of a TPU slice or a Slurm job; each writes its own shards",
    )


def run(arguments: argparse.Namespace) -> None:
    """`kvjax convert`."""
    if arguments.to == "orbax":
        _to_orbax(arguments)
        return
    from kvjax.models.checkpoints.llama2c import convert_llama2c

    if arguments.vocabulary is None:
        raise ValueError(
            "VOCABULARY is missing, expected a llama2.c checkpoint, its vocabulary and OUT"
        )
    print(convert_llama2c(arguments.checkpoint, arguments.vocabulary, arguments.out))


def _to_orbax(arguments: argparse.Namespace) -> None:
    import jax

    from kvjax.eval.pod import join, workers
    from kvjax.models.checkpoints.llama2c import check_out
    from kvjax.models.checkpoints.orbax import save_orbax
    from kvjax.models.load import load_model

    if arguments.vocabulary is not None:
        raise ValueError(
            f"VOCABULARY {arguments.vocabulary}, expected a Hugging Face directory and OUT alone"
            " with --to orbax"
        )
    source, out = Path(arguments.checkpoint), Path(arguments.out).absolute()
    if arguments.distributed:
        join()
    first = jax.process_index() == 0
    if first:
        check_out(out)
    mesh = workers(arguments.split).mesh
    quiet = not (first and sys.stderr.isatty())
    model = load_model(source, dtype=arguments.dtype, progress=not quiet, mesh=mesh)
    try:
        save_orbax(model, out)
        if first:
            for name in _BESIDE:
                if (source / name).is_file():
                    shutil.copy(source / name, out / name)
    except BaseException:
        if first:
            shutil.rmtree(out, ignore_errors=True)
        raise
    if first:
        print(out)
