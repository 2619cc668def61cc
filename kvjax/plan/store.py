"""Keep compilations on disk: a long plan that was stopped goes on from there."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import kvjax
from kvjax.plan.program import Ask, Compiled

_COMPILERS = ("jax", "libtpu", "jax-cuda13-plugin", "jax-triton", "triton")
# What programs are made of, beside the modules that lie in no package.
_PACKAGES = ("cache", "compression", "generation", "inputs", "kernels", "models")


class Store:
    """A compiler that keeps what it found in a folder, by the ask, the compilers and the code."""

    def __init__(self, compiler: Callable[[Ask], Compiled], folder: str | Path):
        self._compiler = compiler
        self._folder = Path(folder)
        self._common = repr((_versions(), _sources(Path(kvjax.__file__).parent)))

    def _file(self, ask: Ask) -> Path:
        key = hashlib.sha256((repr(ask) + self._common).encode()).hexdigest()[:24]
        return self._folder / f"{key}.json"

    def holds(self, ask: Ask) -> bool:
        """Whether it was compiled before."""
        return self._file(ask).is_file()

    def __call__(self, ask: Ask) -> Compiled:
        file = self._file(ask)
        if file.is_file():
            keys = json.loads(file.read_text())
            lists = {name: tuple(keys[name]) for name in ("kernels", "layers")}
            return Compiled(**(keys | lists | {"step": tuple(map(tuple, keys["step"]))}))
        found = self._compiler(ask)
        self._folder.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        part.write_text(json.dumps(dataclasses.asdict(found)))
        part.replace(file)
        return found


def _versions() -> list[str]:
    found = []
    for name in _COMPILERS:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"no {name}")
    return found


def _sources(root: Path) -> str:
    """A digest of the code that programs are made of, in the package at `root`."""
    files = [*root.glob("*.py"), *(f for name in _PACKAGES for f in root.glob(f"{name}/**/*.py"))]
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(file.read_bytes())
    return digest.hexdigest()
