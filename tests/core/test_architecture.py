"""The arrows between packages run one way (docs/architecture.md)."""

import ast
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Modules that stand below the config, which knows scorers and allocators by name, and so below the
# rest of their package.
PARTS = ("row_budgets", "scorer_input", "scorers", "slot_bounds", "allocators")
# From the ground up: each may import itself and what stands before it.
ORDER = (
    "methods",
    "exact",
    "sharding",
    "settings",
    "model_interface",
    "kernels",
    "compile_for",
    *PARTS,
    "config",
    "cache",
    "compression",
    "inputs",
    "models",
    "generation",
    "likelihood",
    "calibrate",
    "spelling",
    "serve",
    "figures",
    "__init__",
    "tiny",
    "eval",
    "bench",
    "plan",
    "studies",
    "cli",
)
# And nothing else of that, where less is enough.
ALLOWED = {
    "methods": set(),
    "exact": set(),
    "sharding": set(),
    "settings": set(),
    "model_interface": set(),
    "kernels": set(),
    "row_budgets": {"exact", "methods"},
    "scorer_input": {"methods", "model_interface", "row_budgets"},
    "scorers": {"kernels", "methods", "model_interface", "row_budgets", "scorer_input", "sharding"},
    "slot_bounds": {"exact", "methods", "row_budgets"},
    "allocators": {"exact", "methods", "row_budgets", "slot_bounds"},
    "config": {"allocators", "methods", "row_budgets", "scorers"},
    "compile_for": {"kernels"},
    "cache": {"config", "exact", "kernels", "model_interface", "sharding"},
    "inputs": {"model_interface"},
    "models": {"cache", "inputs", "kernels", "model_interface", "sharding"},
}
# Third parties of the lowest packages.
PACKAGES = {
    "kernels": {"jax", "jaxtyping", "jax_triton", "triton"},
    "methods": set(),
    "config": set(),
}
STANDARD = {"collections", "contextlib", "dataclasses", "functools", "importlib", "inspect"}
STANDARD |= {"math", "operator", "types", "typing"}


def modules() -> list[tuple[str, Path]]:
    """(package, file): the first name below `kvjax`."""
    files = [*ROOT.glob("kvjax/*.py"), *ROOT.glob("kvjax/[!mk]*/**/*.py")]  # not the links
    files += [*ROOT.glob("models/**/*.py"), *ROOT.glob("kernels/**/*.py")]
    found = []
    for file in files:
        parts = file.relative_to(ROOT).with_suffix("").parts
        found.append((package_of(parts[1:] if parts[0] == "kvjax" else parts), file))
    return found


def package_of(names: Sequence[str]) -> str:
    """The place in ORDER of what stands at this path below `kvjax`."""
    below = names[1] if names[0] == "compression" and len(names) > 1 else ""
    return below if below in PARTS else names[0]


def imports(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def ours(names: set[str]) -> set[str]:
    """Packages of kvjax; what stands in its `__init__` counts as that."""
    second = {package_of(name.split(".")[1:]) for name in names if name.startswith("kvjax.")}
    return {name if name in ORDER else "__init__" for name in second}


@pytest.mark.parametrize(
    ("package", "file"), modules(), ids=lambda value: getattr(value, "name", value)
)
def test_imports_follow_the_arrows(package, file):
    names = imports(file)
    for name in names:
        assert name.split(".")[0] not in ("models", "kernels"), f"{file}: import kvjax.{name}"
    assert package in ORDER, f"{file}: give {package} its place in ORDER"
    before = set(ORDER[: ORDER.index(package)])
    assert ours(names) <= ALLOWED.get(package, before) | {package}
    if package in PACKAGES:
        known = PACKAGES[package] | {"kvjax"}
        others = {name.split(".")[0] for name in names} - known
        assert others <= STANDARD, f"{file} imports {others - STANDARD}"


def test_the_walk_sees_every_package():
    assert {package for package, _ in modules()} == set(ORDER)
    for package, allowed in ALLOWED.items():
        assert allowed <= set(ORDER[: ORDER.index(package)])
    attention = ROOT / "models" / "attention.py"
    assert "kvjax.cache.state.Cache" in imports(attention)


def test_the_document_has_the_same_order():
    page = (ROOT / "docs" / "architecture.md").read_text()
    block = re.search(r"this list:\n\n((?: {4}.*\n)+)", page)
    assert block is not None
    assert tuple(block[1].split()) == tuple(name for name in ORDER if name != "__init__")


def test_no_public_name_is_a_module_too():
    """`import kvjax.generate` would give a function where a module is looked for."""
    import kvjax

    below = {path.stem for path in (ROOT / "kvjax").iterdir() if not path.name.startswith("_")}
    assert not below & set(kvjax.__all__)


def test_a_plan_is_renewed_where_code_of_its_programs_changes(tmp_path):
    from kvjax.plan.store import _sources

    package = tmp_path / "kvjax"
    for file in ROOT.glob("kvjax/**/*.py"):
        copy = package / file.relative_to(ROOT / "kvjax")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(file.read_text())
    for name in ("models", "kernels"):  # links, as in a checkout
        for file in ROOT.glob(f"{name}/**/*.py"):
            copy = tmp_path / file.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(file.read_text())
        if not (package / name).exists():
            (package / name).symlink_to(tmp_path / name)
    before = _sources(package)
    changed = "config.py cache/attend.py compression/scorers.py generation/prefill.py"
    changed += " models/decoder.py models/vision/clip.py kernels/decode_attention/tpu.py"
    for name in changed.split():
        text = (package / name).read_text()
        (package / name).write_text(text + "\n# changed\n")
        assert _sources(package) != before, name
        (package / name).write_text(text)
    assert _sources(package) == before
