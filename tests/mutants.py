"""Small faults planted one at a time, to see whether the tests notice (`make mutants`).

    python tests/mutants.py                 # every fault, against the files that should catch it
    python tests/mutants.py --full          # those that slip through: against all of `make test`
    python tests/mutants.py slots rope      # faults whose name holds one of these words

A fault is planted in a copy of the tree, never in the tree itself. The tests named with a fault run
first and stop at the first failure. Exit code 1 if a fault goes unnoticed.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
# A test that hangs over a fault has noticed it.
LIMIT_S = 900


class Mutant(NamedTuple):
    """A fault.

    Attributes:
      name: the part it is planted in, and what goes wrong.
      file: below the root.
      old: text that the file holds exactly once.
      new: what stands there instead.
      tests: files below `tests/`, the likeliest to notice first.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


MUTANTS = (
    # ------------------------------------------------------------------------ scorers
    Mutant(
        "scorers: the oldest query of the window is not observed",
        "kvjax/compression/scorers.py",
        "observed_BW = back_W <= rows.window[:, None]",
        "observed_BW = back_W < rows.window[:, None]",
        ("test_scores.py",),
    ),
    Mutant(
        "scorers: a chunk's mean counts a token of the window",
        "kvjax/compression/scorers.py",
        "can_BT &= positions_T < (rows.lengths - rows.recent)[:, None]",
        "can_BT &= positions_T <= (rows.lengths - rows.recent)[:, None]",
        ("test_scorers.py",),
    ),
    Mutant(
        "scorers: expected attention takes the covariance twice",
        "kvjax/compression/scorers.py",
        "square_BKGS / (2 * head_dim)",
        "square_BKGS / head_dim",
        ("test_scorers.py",),
    ),
    Mutant(
        "scorers: KeyDiff's mean holds keys that the layer cannot see",
        "kvjax/compression/scorers.py",
        "anchor_BKH = unit(units.total(layer.can))",
        "anchor_BKH = unit(units.total(jnp.ones_like(layer.can)))",
        ("test_scorers.py",),
    ),
    # ------------------------------------------------------------------------ allocators
    Mutant(
        "allocators: one entry too few of those that tie",
        "kvjax/exact.py",
        "return above | (tied & (rank_among_tied <= spare))",
        "return above | (tied & (rank_among_tied < spare))",
        ("test_budgets.py",),
    ),
    Mutant(
        "allocators: spread forgets the least that a head keeps",
        "kvjax/exact.py",
        "return jnp.maximum(jnp.minimum(raised, caps), least)",
        "return jnp.minimum(raised, caps)",
        ("test_budgets.py",),
    ),
    Mutant(
        "allocators: protected entries come on top of PrefixKV's budget",
        "kvjax/compression/allocators.py",
        "budget = scores.shape[1] * base - protected.sum(-1, dtype=jnp.int32)",
        "budget = scores.shape[1] * base",
        ("test_budgets.py",),
    ),
    Mutant(
        "allocators: Ada-KV's remainders go to the head of the least mass",
        "kvjax/compression/allocators.py",
        "by_mass = jnp.argsort(-jnp.where(eligible, scores, 0.0).sum(-1)",
        "by_mass = jnp.argsort(jnp.where(eligible, scores, 0.0).sum(-1)",
        ("test_budgets.py",),
    ),
    Mutant(
        "allocators: the joint floor is one entry higher",
        "kvjax/compression/allocators.py",
        "least = floor_of_product(base, round(floor * THOUSAND), THOUSAND)",
        "least = floor_of_product(base, round(floor * THOUSAND), THOUSAND) + 1",
        ("test_joint_budgets.py",),
    ),
    # ------------------------------------------------------------------------ masks
    Mutant(
        "masks: a sliding window keeps what no later token sees",
        "kvjax/compression/row_budgets.py",
        "return real_BT & (positions_T > (rows.lengths - window)[:, None])",
        "return real_BT & (positions_T >= (rows.lengths - window)[:, None])",
        ("test_compress.py", "test_scorers.py"),
    ),
    Mutant(
        "masks: the first of the recent tokens is open to eviction",
        "kvjax/compression/row_budgets.py",
        "last_BT = positions_T >= (rows.lengths - rows.recent)[:, None]",
        "last_BT = positions_T > (rows.lengths - rows.recent)[:, None]",
        ("test_compress.py",),
    ),
    # ------------------------------------------------------------------------ slots
    Mutant(
        "slots: another head's keys are gathered",
        "kvjax/cache/packing.py",
        "row_BY1 = (position_BY * heads + head_BY)[..., None]",
        "row_BY1 = found_BY[..., None]",
        ("test_slots.py",),
    ),
    Mutant(
        "slots: counts say what a full layer has dropped",
        "kvjax/cache/packing.py",
        "ends_BK = jnp.minimum(ends_BK, jnp.minimum(room, space_B)[..., None])",
        "ends_BK = jnp.minimum(ends_BK, room)",
        ("test_slots.py", "test_capacity.py"),
    ),
    Mutant(
        "slots: int8 wraps at the largest number of a vector",
        "kvjax/cache/packing.py",
        "scale_BY = jnp.abs(x).max(-1).astype(jnp.float32) / 127",
        "scale_BY = jnp.abs(x).max(-1).astype(jnp.float32) / 128",
        ("test_slots.py",),
    ),
    Mutant(
        "slots: a layer that grows gets the free page after its own",
        "kvjax/cache/slot_moves.py",
        "before_BL[..., None] + number_R - own_BL[..., None]",
        "before_BL[..., None] + number_R - own_BL[..., None] + 1",
        ("test_slots.py", "test_evict.py"),
    ),
    Mutant(
        "slots: what a layer may not use is written to, too",
        "kvjax/cache/slot_layers.py",
        "numbers=jnp.where(mine_BY, number_BY, slots.size),",
        "numbers=number_BY,",
        ("test_evict.py", "test_recompress.py"),
    ),
    Mutant(
        "slots: a saved cache forgets that it keeps a ratio",
        "kvjax/cache/disk.py",
        'keep_ratio=facts["keep_ratio"],',
        "keep_ratio=False,",
        ("test_saved.py",),
    ),
    # ------------------------------------------------------------------------ attend
    Mutant(
        "attend: PrefixKV's frozen point of 25 entries",
        "kvjax/cache/ratio.py",
        "first_BK = jnp.where(kept > FROZEN_POINT, kept - FROZEN_POINT, kept // 2)",
        "first_BK = jnp.where(kept >= FROZEN_POINT, kept - FROZEN_POINT, kept // 2)",
        ("test_cache.py",),
    ),
    Mutant(
        "attend: the ratio of a sliding window counts a token too many",
        "kvjax/cache/ratio.py",
        "jnp.minimum(prompt_B11, max(window - 1, 1))",
        "jnp.minimum(prompt_B11, max(window, 1))",
        ("test_cache.py",),
    ),
    Mutant(
        "attend: the ratio evicts another head's entries of the slots",
        "kvjax/cache/attend.py",
        "before_XK = jnp.cumsum(counts_XK, axis=-1) - counts_XK",
        "before_XK = jnp.cumsum(counts_XK, axis=-1)",
        ("test_cache.py",),
    ),
    Mutant(
        "attend: a tail without holes ends with its shortest row",
        "kvjax/cache/tail.py",
        "cursor=filled_BT.sum(1, dtype=jnp.int32).max(),",
        "cursor=filled_BT.sum(1, dtype=jnp.int32).min(),",
        ("test_turns.py", "test_life.py"),
    ),
    Mutant(
        "attend: a question's tail has no room for the turns before it",
        "kvjax/generation/request.py",
        "slots = doubled(slots + int(cache.tail.cursor) + tokens.shape[1])",
        "slots = doubled(slots + tokens.shape[1])",
        ("test_turns.py",),
    ),
    # ------------------------------------------------------------------------ recompress
    Mutant(
        "recompress: the oldest of the recent tokens may go",
        "kvjax/compression/recompress.py",
        "always_BS = entries.positions >= cache.next_positions[:, None] - recent_B1",
        "always_BS = entries.positions > cache.next_positions[:, None] - recent_B1",
        ("test_evict.py",),
    ),
    Mutant(
        "recompress: what the ratio had masked comes back under a budget",
        "kvjax/compression/recompress.py",
        "masked = cache.keep_ratio and rule.budget is not None and asked",
        "masked = False",
        ("test_turns.py", "test_life.py"),
    ),
    Mutant(
        "recompress: by the ratio the latest go first",
        "kvjax/compression/recompress.py",
        "order = jnp.broadcast_to((2.0**24 - positions_BS)[:, None], held_BKS.shape)",
        "order = jnp.broadcast_to((1.0 + positions_BS)[:, None], held_BKS.shape)",
        ("test_evict.py",),
    ),
    # ------------------------------------------------------------------------ sampling
    Mutant(
        "sampling: top-k keeps one token more",
        "kvjax/generation/sampling.py",
        "jnp.minimum(values.top_k, logits.shape[-1]) - 1, 1, axis=-1",
        "jnp.minimum(values.top_k, logits.shape[-1] - 1), 1, axis=-1",
        ("test_sampling.py",),
    ),
    Mutant(
        "sampling: the penalty makes unlikely tokens likelier",
        "kvjax/generation/sampling.py",
        "jnp.where(logits < 0, logits * penalty, logits / penalty)",
        "logits / penalty",
        ("test_sampling.py",),
    ),
    Mutant(
        "sampling: a row draws from the keys of its column",
        "kvjax/generation/decode.py",
        "keys = jax.vmap(jax.random.fold_in, (0, None))(answer.keys, answer.count)",
        "keys = answer.keys",
        ("test_sampling.py", "test_turns.py", "test_generate.py"),
    ),
    # ------------------------------------------------------------------------ rope
    Mutant(
        "rope: Llama 3.1's band is blended the wrong way round",
        "models/layers.py",
        "return (1 - blend) * frequencies / scaling.factor + blend * frequencies",
        "return blend * frequencies / scaling.factor + (1 - blend) * frequencies",
        ("test_rope.py",),
    ),
    Mutant(
        "rope: linear scaling turns faster",
        "models/layers.py",
        "        return frequencies / scaling.factor",
        "        return frequencies * scaling.factor",
        ("test_rope.py",),
    ),
)


def copied(target: Path):
    """Copy what git tracks, and what it does not ignore, to an empty folder."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        source, copy = ROOT / name, target / name
        if source.is_symlink() or source.is_file():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, copy, follow_symlinks=False)


def planted(tree: Path, mutant: Mutant) -> str:
    """Plant a fault in a copy; the file's text before.

    Raises:
      ValueError: the old text is not there exactly once.
    """
    text = (tree / mutant.file).read_text()
    if (found := text.count(mutant.old)) != 1:
        raise ValueError(f"{mutant.file} holds {mutant.old!r} {found} times, expected once")
    (tree / mutant.file).write_text(text.replace(mutant.old, mutant.new))
    return text


def failing(tree: Path, tests: list[str]) -> str | None:
    """The first of some tests that fails in a copy, or None where all pass.

    Raises:
      RuntimeError: no test was run.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--tb=no", "-m", "not rest"]
    command += ["-p", "no:cacheprovider", *tests]
    # The copy comes before the tree that is installed.
    settings = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        run = subprocess.run(
            command, cwd=tree, env=settings, capture_output=True, text=True, timeout=LIMIT_S
        )
    except subprocess.TimeoutExpired:
        return f"no end within {LIMIT_S} s"
    if run.returncode in (4, 5):
        raise RuntimeError(f"pytest found no test in {tests}: {run.stdout[-500:]}{run.stderr}")
    if not run.returncode:
        return None
    named = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - |$)", run.stdout, re.MULTILINE)
    return named.group(1) if named else f"pytest ends with {run.returncode}"


def verdict(tree: Path, mutant: Mutant, full: bool) -> tuple[bool, str]:
    """Whether the tests notice a fault, and which: one that passes where it is not planted."""
    named = [str(path) for name in mutant.tests for path in (tree / "tests").rglob(name)]
    before = planted(tree, mutant)
    by = failing(tree, named)
    if by is None and full:
        by = failing(tree, ["tests"])
    (tree / mutant.file).write_text(before)
    if by is None:
        return False, "MISSED"
    if "::" in by and failing(tree, [by]):
        return False, f"{by} fails without the fault, too"
    return True, f"caught by {by.removeprefix('tests/')}"


def main() -> int:
    """Plant every fault that was asked for, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*", help="faults whose name holds one of these")
    parser.add_argument("--full", action="store_true", help="all of `make test` if need be")
    chosen = parser.parse_args()
    wanted = [m for m in MUTANTS if not chosen.words or any(w in m.name for w in chosen.words)]
    caught = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        copied(tree)
        for mutant in wanted:
            began = time.monotonic()
            noticed, said = verdict(tree, mutant, chosen.full)
            caught += noticed
            print(f"{mutant.name:64} {said} ({time.monotonic() - began:.0f} s)", flush=True)
    print(f"{caught} of {len(wanted)} caught")
    return int(caught < len(wanted))


if __name__ == "__main__":
    sys.exit(main())
