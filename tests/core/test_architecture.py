"""The arrows between modules run one way (docs/architecture.md)."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# What compression may build on.
BELOW = {"config", "methods", "integers", "pool", "cache", "probe", "kernels", "seen", "sharding"}
BELOW |= {"attend", "split", "precision"}
IMAGES = {"image_config", "images"}
COMPRESSION = {"rows", "scores", "budgets", "capacity", "compress", "loose", "recompress"}
ENGINE = {"stages", "programs", "prompts", "request", "sampling", "text", "generate", "likelihood"}
ENGINE |= {"origin", "calibrate", "reconstruction", "placeholders", "timed"}
LOADING = {"models", "tokenizer", "load", "convert"}

# Who may import which parts of kvjax; each may import itself.
ALLOWED = {
    "kernels": set(),
    "methods": set(),
    "config": {"methods"},
    "integers": set(),
    "pool": set(),
    "probe": set(),
    "sharding": set(),
    "precision": set(),
    "cache": {"pool", "sharding"},
    "attend": {"cache", "pool", "kernels", "integers"},
    "split": {"attend", "cache", "pool", "kernels", "sharding"},
    "extend": {"attend", "cache", "precision"},
    "saved": {"cache", "origin", "pool", "config"},
    "seen": set(),
    "image_config": set(),
    "images": {"image_config"},
    "models": {"cache", "kernels", "probe", "seen", "sharding", "split"},
    **dict.fromkeys(COMPRESSION, BELOW | COMPRESSION),
    **dict.fromkeys(
        ENGINE, BELOW | COMPRESSION | ENGINE | IMAGES
    ),  # the model comes as an argument
    "origin": {"cache"},
    "tokenizer": set(),
    "toml": set(),
    "convert": set(),
    "load": {"models", "tokenizer", "image_config"},
}
# What sits on top may import everything; nothing else imports it.
TOP = {"__init__", "ahead", "cli", "eval", "bench", "demo", "plan", "tiny"}
# Third parties of the lowest layers.
PACKAGES = {
    "kernels": {"jax", "jaxtyping", "jax_triton", "triton"},
    "methods": set(),
    "config": set(),
}


def modules() -> list[tuple[str, Path]]:
    """(part, file): the part is the first name below `kvjax`."""
    files = [*ROOT.glob("kvjax/*.py"), *ROOT.glob("kvjax/[!mk]*/**/*.py")]  # not the links
    files += [*ROOT.glob("models/**/*.py"), *ROOT.glob("kernels/**/*.py")]
    found = []
    for file in files:
        parts = file.relative_to(ROOT).with_suffix("").parts
        found.append((parts[1] if parts[0] == "kvjax" else parts[0], file))
    return found


def imports(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize(
    ("part", "file"), modules(), ids=lambda value: getattr(value, "name", value)
)
def test_imports_follow_the_arrows(part, file):
    names = imports(file)
    for name in names:
        assert name.split(".")[0] not in ("models", "kernels"), f"{file}: import kvjax.{name}"
    if part in TOP:
        return
    assert part in ALLOWED, f"{file}: give {part} its place in ALLOWED"
    ours = {name.split(".")[1] for name in names if name.startswith("kvjax.")}
    assert ours <= ALLOWED[part] | {part}
    if part in PACKAGES:
        known = PACKAGES[part] | {"kvjax"}
        others = {name.split(".")[0] for name in names} - known
        assert others <= STANDARD, f"{file} imports {others - STANDARD}"


STANDARD = {"collections", "dataclasses", "functools", "math", "types", "typing"}
STANDARD |= {"contextlib", "importlib", "inspect", "operator"}


def test_the_walk_sees_every_part():
    parts = {part for part, _ in modules()}
    assert parts >= set(ALLOWED) | TOP
    attention = ROOT / "models" / "attention.py"
    assert "kvjax.cache.Cache" in imports(attention)
