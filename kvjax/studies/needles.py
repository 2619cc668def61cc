"""Needles in long prompts, answered from the full cache and from every method's.

    python -m kvjax.studies.needles [--length 512] [--prompts 16] [--out DIR] [--model DIR]

The bundled model, or another that `kvjax train-tiny` made, reads documents with notes scattered
through them, and is asked for one. Every method answers at 50, 25, 10 and 5 % of the entries, under
two protocols: with the question at the end of the prompt, where an observation window sees it, and
asked after compression. Printed are answers, and a table of how many are right to the last word,
beside entries and bytes held; written is `kept.png`, which entries each head kept of the first
prompt.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

import kvjax
from kvjax import figures, tiny
from kvjax.studies.retrieval import PROTOCOLS, Outcome, ask
from kvjax.tiny.questions import Item, questions
from kvjax.tiny.vocabulary import ID, text

BUDGETS = (0.5, 0.25, 0.1, 0.05)
SHOWN = ("snapkv", "ada-snapkv", "prefixkv", "ada-prefixkv", "ada-kvzip", "h2o", "streaming-llm")
Runs = dict[tuple[str, float], Outcome]  # by method and budget


def answer_all(model, items: Sequence[Item], protocol: str) -> Runs:
    """Every method at every budget; the full cache at 1."""
    names = [(name, budget) for name in kvjax.METHODS if name != "full" for budget in BUDGETS]
    names.insert(0, ("full", 1.0))
    runs: Runs = {}
    for method in tqdm(kvjax.METHODS, desc=protocol, leave=False, disable=None):
        mine = [(name, budget) for name, budget in names if name == method]
        configs = [
            kvjax.CompressionConfig.named(name, None if name == "full" else budget)
            for name, budget in mine
        ]
        runs |= zip(mine, ask(model, items, configs, protocol), strict=True)
    return runs


def show_answers(model, items: Sequence[Item], count: int = 3) -> None:
    """The same questions through the public calls: full cache, a good and a bad method."""
    shown = items[:count]
    stop = [ID["."]]
    for name in ("full", "ada-snapkv", "streaming-llm"):
        config = kvjax.CompressionConfig.named(name, None if name == "full" else 0.1)
        prompts = [[*item.document, *item.question] for item in shown]
        out = kvjax.generate(model, prompts, config, max_new_tokens=8, eos_ids=stop)
        print(f"[{name}: {out.kept.mean():.0f} of {len(prompts[0])} entries a head]")
        for item, answer in zip(shown, out.tokens, strict=True):
            mark = "right" if answer == list(item.answer) else f"wrong: {text(item.answer)}"
            print(f"  {text(item.question)} {text(answer)}   ({mark})")
    print()


def show_table(runs: Runs, title: str, entry_bytes: int) -> None:
    """Share right by method and budget, entries and bytes of the smallest and largest budget."""
    full = runs["full", 1.0]
    held = full.kept.sum(axis=(1, 2)).mean() * entry_bytes / 1024
    print(f"{title}: answers right (full cache {full.right.mean():.0%}, {held:.0f} KiB a prompt)")
    print(f"  {'kept':<23}" + "".join(f"{budget:>9.0%}" for budget in BUDGETS))
    for name in kvjax.METHODS:
        if name != "full":
            shares = [runs[name, budget].right.mean() for budget in BUDGETS]
            print(f"  {name:<23}" + "".join(f"{share:>9.0%}" for share in shares))
    some = [runs["snapkv", budget].kept for budget in BUDGETS]
    print(f"  {'entries/head':<23}" + "".join(f"{kept.mean():>9.1f}" for kept in some))
    sizes = [kept.sum(axis=(1, 2)).mean() * entry_bytes / 1024 for kept in some]
    print(f"  {'KiB/prompt':<23}" + "".join(f"{size:>9.1f}" for size in sizes) + "\n")


def needles(item: Item) -> tuple[list[tuple[int, int]], tuple[int, int]]:
    """[first, end) of every note, and of the one that is asked for."""
    tokens = list(item.document)
    starts = [place for place, token in enumerate(tokens) if token == ID["note"]]
    spans = [(place, place + 5) for place in starts]
    asked = next(span for span in spans if tokens[span[0] + 1] == item.question[1])
    return spans, asked


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=tiny.WEIGHTS, help="a run's model/")
    parser.add_argument("--length", type=int, default=512, help="tokens of a prompt (512)")
    parser.add_argument("--prompts", type=int, default=16, help="how many (16)")
    parser.add_argument(
        "--out", type=Path, default=Path("build/needles"), help="folder of kept.png"
    )
    options = parser.parse_args(arguments)
    if options.prompts < 1:
        print(f"kvjax: --prompts {options.prompts}, expected at least 1", file=sys.stderr)
        return 2
    try:
        model, _ = kvjax.load(options.model, progress=False)
    except ValueError as error:
        print(f"kvjax: {error}", file=sys.stderr)
        return 2
    context = model.config.context - 8
    if not 64 <= options.length <= context:
        print(f"kvjax: --length {options.length}, expected 64 to {context}", file=sys.stderr)
        return 2
    items = questions("multikey", options.length, options.prompts)
    notes = len(needles(items[0])[0])
    print(f"{options.prompts} prompts of {options.length} tokens, {notes} notes in each:")
    print("  ..." + text(list(items[0].document)[100:140]) + "...\n")
    show_answers(model, items)
    shape = model.config
    entry_bytes = 2 * shape.head_dim * np.dtype(np.float32).itemsize
    for protocol, title in PROTOCOLS.items():
        runs = answer_all(model, items, protocol)
        show_table(runs, title, entry_bytes)
        if protocol == "seen":
            pictured = {name: runs[name, 0.1].positions for name in SHOWN}
    if figures.available():
        path = _picture(options.out / "kept.png", items[0], pictured)
        print(f"{path}: which entries each head kept at 10 %")
    else:
        print("kept.png needs matplotlib: pip install 'kvjax[plot]'", file=sys.stderr)
    return 0


def _picture(path: Path, item: Item, kept: dict[str, np.ndarray]) -> Path:
    spans, asked = needles(item)
    length = len(item.document) + len(item.question)
    title = f"entries kept at 10 % of {length}, a row a KV head"
    return figures.heat_map(path, kept, length, needles=spans, asked=asked, title=title)


if __name__ == "__main__":
    sys.exit(main())
