"""Continue stories from every method's cache, and show what each keeps and costs.

    python -m kvjax.studies.stories [--model DIR] [--data ../shared/data] [--budget 25%]

Runs the stories260K model on the stories of the data folder, or your own checkpoint on a text of
yours. The table: difference in NLL to the full cache (nats a token) over what follows a 192-token
prefix, how often the likeliest token stays the same, entries kept per head, bytes of those entries.
About two minutes on two cores.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from tqdm import tqdm

import kvjax
from kvjax.inputs.prompts import encoded
from kvjax.models.checkpoints.llama2c import convert_llama2c
from kvjax.studies.continuation import evaluate

PREFIX, REST, DOCUMENTS = 192, 128, 24
MISSING = """\
kvjax: {path} is missing, expected the stories260K model and its stories.
With a Llama, Mistral or Qwen checkpoint of your own and a text file:
    .venv/bin/python -m kvjax.studies.stories --model DIR --text FILE"""


def documents_of(text: str, tokenizer: Any, length: int) -> list[dict]:
    """The first documents of a text file that are long enough, cut to `length` tokens."""
    found = []
    pieces = text.split("<|endoftext|>") if "<|endoftext|>" in text else [text]
    for piece in pieces:
        ids = encoded(piece.strip(), tokenizer, verbose=False)
        # One long text serves as well as many short ones.
        for start in range(0, len(ids) - length + 1, length):
            found.append({"ids": ids[start : start + length], "prompt": PREFIX})
            if len(found) == DOCUMENTS:
                return found
    return found


def show_texts(model, tokenizer, document: dict, budget: int | float):
    """The same prompt continued under three caches."""
    prompt = document["ids"][:PREFIX]
    print("Prompt ends: ..." + tokenizer.decode(prompt[-40:]).replace("\n", " "), "\n")
    for name in ("full", "ada-snapkv", "streaming-llm"):
        config = kvjax.CompressionConfig.named(name, budget)
        out = kvjax.generate(
            model, [prompt], config, max_new_tokens=60, tokenizer=tokenizer, eos_ids=()
        )
        text = (out.text or [""])[0].replace("\n", " ")
        print(f"[{name}, {out.kept.mean():.0f} of {PREFIX} entries] {text}\n")


def show_table(model, documents: list[dict], budget: int | float):
    """Every method at one budget."""
    shape = model.config
    entry = 2 * shape.head_dim * model.embed.table_VD[...].dtype.itemsize
    heads = shape.num_layers * shape.num_kv_heads
    rows, full = [], None
    for name in tqdm(kvjax.METHODS, desc="methods", leave=False, disable=None):
        config = kvjax.CompressionConfig.named(name, budget)
        scores, result = evaluate(model, documents, config, full)
        full = full or scores
        held = result.kept * heads * entry / 1024
        rows.append((name, result.delta, result.agree, result.kept, held))
    print(f"{'method':<23} {'delta NLL':>10} {'agreement':>10} {'entries/head':>13} {'KiB':>8}")
    for name, delta, agree, kept, held in rows:
        print(f"{name:<23} {delta:>+10.4f} {agree:>10.1%} {kept:>13.1f} {held:>8.1f}")
    print("\nprefixkv goes on evicting while the text grows (the paper's rule); the others do not.")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, help="a Hugging Face directory")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--text", type=Path, help="stories to read; the data folder's by default")
    parser.add_argument("--budget", default="25%", help="entries, or P%% of the prompt")
    arguments = parser.parse_args()
    source = arguments.data / "stories260K"
    text = arguments.text or arguments.data / "text" / "tinystories.txt"
    for path in [text] if arguments.model else [source, text]:
        if not path.exists():
            print(MISSING.format(path=path), file=sys.stderr)
            return 2
    budget = kvjax.parse_budget(arguments.budget)
    with tempfile.TemporaryDirectory() as folder:
        directory = arguments.model
        if directory is None:
            directory = Path(folder) / "model"
            convert_llama2c(source / "stories260K.bin", source / "tok512.bin", directory)
        model, tokenizer = kvjax.load(directory, progress=False)
    if tokenizer is None:
        print(f"kvjax: {directory} has no tokenizer, expected one", file=sys.stderr)
        return 2
    documents = documents_of(text.read_text(), tokenizer, PREFIX + REST)
    if not documents:
        print(f"kvjax: {text} has no {PREFIX + REST} tokens in a row", file=sys.stderr)
        return 2
    show_texts(model, tokenizer, documents[0], budget)
    print(f"{len(documents)} documents, {PREFIX}-token prefix kept at {arguments.budget}:\n")
    show_table(model, documents, budget)
    return 0


if __name__ == "__main__":
    sys.exit(main())
