"""Compilations on disk: a long plan that was stopped goes on from what is there."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import kvjax
from kvjax.plan.program import Ask, Compiled

_COMPILERS = ("jax", "libtpu", "jax-cuda13-plugin", "jax-triton", "triton")


def remembered(
    compiler: Callable[[Ask], Compiled], folder: str | Path
) -> Callable[[Ask], Compiled]:
    """A compiler that keeps what it found in a folder, by the ask, the compilers and the code."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    common = repr((_versions(), _sources()))

    def look(ask: Ask) -> Compiled:
        key = hashlib.sha256((repr(ask) + common).encode()).hexdigest()[:24]
        file = folder / f"{key}.json"
        if file.is_file():
            keys = json.loads(file.read_text())
            lists = {"kernels": tuple(keys["kernels"]), "step": tuple(map(tuple, keys["step"]))}
            return Compiled(**(keys | lists))
        found = compiler(ask)
        part = file.with_suffix(".part")
        part.write_text(json.dumps(dataclasses.asdict(found)))
        part.replace(file)
        return found

    return look


def _versions() -> list[str]:
    found = []
    for name in _COMPILERS:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"no {name}")
    return found


def _sources() -> str:
    """A digest of the code that programs are made of."""
    root = Path(kvjax.__file__).parent
    files = [*root.glob("*.py"), *root.glob("models/*.py"), *root.glob("kernels/**/*.py")]
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(file.read_bytes())
    return digest.hexdigest()
