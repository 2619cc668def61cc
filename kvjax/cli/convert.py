"""Run `kvjax convert`; slow imports come late."""

import argparse
import shutil
import sys
from pathlib import Path

# What a checkpoint's folder holds beside its weights; what is there is copied.
_BESIDE = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja",
    "chat_template.json", "generation_config.json", "preprocessor_config.json",
    "processor_config.json",
)  # fmt: skip


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `kvjax convert`."""
    add = parser.add_argument
    add(
        "checkpoint",
        metavar="CHECKPOINT",
        help="a GGUF file (of one in parts the first), or of llama2.c, such as stories15M.bin; for"
        " orbax a Hugging Face directory or a GGUF file",
    )
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
        help="huggingface: from a GGUF file or a llama2.c checkpoint; orbax: from a Hugging Face"
        " directory or a GGUF file, to load straight to the shards of any mesh (huggingface)",
    )
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the weights (bfloat16; from a GGUF file to huggingface float32, which loses"
        " nothing)",
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
    from kvjax.models.checkpoints.gguf_file import is_gguf

    for flag, given in (("--split", arguments.split), ("--distributed", arguments.distributed)):
        if given:
            raise ValueError(f"{flag} is of Orbax checkpoints, expected --to orbax beside it")
    if is_gguf(arguments.checkpoint):
        _from_gguf(arguments)
        return
    if arguments.dtype is not None:
        raise ValueError(
            f"--dtype {arguments.dtype}, expected none: llama2.c's weights are float32"
        )
    from kvjax.models.checkpoints.llama2c import convert_llama2c

    if arguments.vocabulary is None:
        raise ValueError(
            "VOCABULARY is missing, expected a llama2.c checkpoint, its vocabulary and OUT, or a"
            " GGUF file and OUT"
        )
    print(convert_llama2c(arguments.checkpoint, arguments.vocabulary, arguments.out))


def _from_gguf(arguments: argparse.Namespace) -> None:
    from kvjax.models.checkpoints.gguf import convert_gguf

    if arguments.vocabulary is not None:
        raise ValueError(
            f"VOCABULARY {arguments.vocabulary}, expected a GGUF file and OUT alone, as the file"
            " has its vocabulary"
        )
    dtype, progress = arguments.dtype or "float32", sys.stderr.isatty()
    print(convert_gguf(arguments.checkpoint, arguments.out, dtype=dtype, progress=progress))


def _to_orbax(arguments: argparse.Namespace) -> None:
    import jax

    from kvjax.eval.pod import join, workers
    from kvjax.models.checkpoints.export import check_out
    from kvjax.models.checkpoints.gguf import save_gguf_tokenizer
    from kvjax.models.checkpoints.gguf_file import is_gguf
    from kvjax.models.checkpoints.orbax import save_orbax
    from kvjax.models.load import load_model

    if arguments.vocabulary is not None:
        raise ValueError(
            f"VOCABULARY {arguments.vocabulary}, expected a Hugging Face directory or a GGUF file,"
            " and OUT alone, with --to orbax"
        )
    source, out = Path(arguments.checkpoint), Path(arguments.out).absolute()
    if arguments.distributed:
        join()
    first = jax.process_index() == 0
    if first:
        check_out(out)
    mesh = workers(arguments.split).mesh
    quiet = not (first and sys.stderr.isatty())
    dtype = arguments.dtype or "bfloat16"
    model = load_model(source, dtype=dtype, progress=not quiet, mesh=mesh)
    try:
        save_orbax(model, out)
        if first and is_gguf(source):
            save_gguf_tokenizer(source, out)
        elif first:
            for name in _BESIDE:
                if (source / name).is_file():
                    shutil.copy(source / name, out / name)
    except BaseException:
        if first:
            shutil.rmtree(out, ignore_errors=True)
        raise
    if first:
        print(out)
