"""What the documents say is there: trees, paths, names; and names that were retired are gone."""

import ast
import fnmatch
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from mutants import MUTANTS

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("tests/fixtures/*.md")])
CODE = sorted(
    [
        *ROOT.glob("kvjax/*.py"),
        *ROOT.glob("kvjax/[!mk]*/**/*.py"),  # not the links
        *ROOT.glob("models/**/*.py"),
        *ROOT.glob("kernels/**/*.py"),
    ]
)
TESTS = sorted(ROOT.glob("tests/**/*.py"))
IGNORED = [line.strip("/") for line in (ROOT / ".gitignore").read_text().split()]
# Words that once meant several things, or nothing at first reading.
RETIRED = {"look", "looked", "see", "seen", "known", "dealt", "settled", "dead", "loose", "loosen"}


# ---------------------------------------------------------------------------- trees
def children(folder: Path) -> set[str]:
    """What a tree lists of a folder: other folders, with a slash behind, and modules."""
    found = set()
    for path in folder.iterdir():
        hidden = path.name.startswith((".", "__")) or path.is_symlink()
        if hidden or any(fnmatch.fnmatch(path.name, pattern) for pattern in IGNORED):
            continue
        if path.is_dir():
            found.add(f"{path.name}/")
        elif path.suffix == ".py":
            found.add(path.name)
    return found


def tree(page: str) -> dict[Path, set[str]]:
    """Folder -> names of the tree on a page; the lines below a folder are indented by two."""
    block = re.search(r"## The tree\n\n```\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert block is not None, f"{page} has no tree"
    listed: dict[Path, set[str]] = {ROOT: set()}
    above = [ROOT]
    for line in block[1].splitlines():
        name, _, told = line.strip().partition(" ")
        assert told.strip(), f"{page}: {name} is not explained"
        depth = (len(line) - len(line.lstrip())) // 2
        del above[depth + 1 :]
        folder = above[depth]
        listed.setdefault(folder, set()).add(name)
        above.append(folder / name)
    return listed


@pytest.mark.parametrize("page", ["README.md", "docs/architecture.md"])
def test_a_tree_is_what_the_folders_hold(page):
    for folder, names in tree(page).items():
        if folder == ROOT and page != "README.md":  # the code alone
            assert names == {"kvjax/", "models/", "kernels/"}
        else:
            assert names == children(folder), folder


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 150


# ---------------------------------------------------------------------------- paths and names
_FILES = {
    path.relative_to(ROOT).as_posix()
    for folder in ("kvjax", "models", "kernels", "tests", "docs", "configs")
    for path in (ROOT / folder).rglob("*")
}
_PATH = re.compile(r"(?<![\w/.-])(?:kvjax|models|kernels|tests|docs|configs)/[\w./-]*\w")
_MODULE = re.compile(r"`([\w/]+\.py)(?:::\w+)?`")
_DOTTED = re.compile(r"(?<![\w/.-])kvjax((?:\.[A-Za-z_]\w*)+)")
_SHORT = re.compile(r"`(\w+)\.(?!(?:py|md|txt|png|toml|jsonl?)\b)([A-Za-z]\w+)[`(]")
_TARGET = re.compile(r"(?:`| {4})make ([a-z-]+)")


def members(body: list[ast.stmt]) -> dict[str, ast.stmt]:
    """Names that a module or a class defines, or imports."""
    found: dict[str, ast.stmt] = {}
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.ImportFrom | ast.Import):
            found |= {alias.asname or alias.name: node for alias in node.names}
        elif isinstance(node, ast.Assign):
            found |= {x.id: node for x in node.targets if isinstance(x, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found[node.target.id] = node
    return found


def exists(names: list[str]) -> bool:
    """Whether `kvjax.` and these names lead to a module, or to something in one."""
    path = ROOT / "kvjax"
    while names and ((path / names[0]).is_dir() or (path / f"{names[0]}.py").is_file()):
        path, names = path / names[0], names[1:]
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    body = ast.parse(file.read_text()).body
    while names:
        node = members(body).get(names[0])
        if node is None:
            return False
        if not isinstance(node, ast.ClassDef):
            return isinstance(node, ast.ImportFrom) or len(names) == 1
        body, names = node.body, names[1:]
    return True


def prose(file: Path) -> str:
    """A page; of a module its docstrings and comments."""
    text = file.read_text()
    if file.suffix == ".md":
        return text
    nodes = [n for n in ast.walk(ast.parse(text)) if isinstance(n, _DOCUMENTED)]
    told = [ast.get_docstring(node) or "" for node in nodes]
    return "\n".join([*told, *re.findall(r"#.*", text)])


_DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef


def missing(file: Path) -> Iterator[str]:
    """What a page, or a module's docstrings and comments, name that is not there."""
    text = prose(file)
    yield from (path for path in _PATH.findall(text) if not (ROOT / path).exists())
    for path in _MODULE.findall(text):
        if not any(f"/{name}".endswith(f"/{path}") for name in _FILES):
            yield path
    for name in _DOTTED.findall(text):
        if not exists(name.split(".")[1:]):
            yield f"kvjax{name}"


def test_what_is_named_exists():
    found = {file: list(missing(file)) for file in [*PAGES, *CODE, *TESTS]}
    assert {str(file): names for file, names in found.items() if names} == {}


def test_short_names_of_pages_exist():
    """`exact.kth_largest` is of a module named `exact`, `Cache.counts` of a class."""
    defined: dict[str, set[str]] = {}
    for file in CODE:
        body = ast.parse(file.read_text()).body
        defined.setdefault(file.stem, set()).update(members(body))
        for name, node in members(body).items():
            if isinstance(node, ast.ClassDef):
                defined.setdefault(name, set()).update(members(node.body))
    for page in PAGES:
        for owner, name in _SHORT.findall(prose(page)):
            assert name in defined.get(owner, {name}), f"{page}: {owner}.{name}"


def test_links_and_targets_lead_somewhere():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    targets |= {"gpu-check", "tpu-check"}  # one rule for both
    for page in PAGES:
        text = page.read_text()
        for link in re.findall(r"\]\(([^)#\s]+)\)", text):
            assert link.startswith("http") or (page.parent / link).exists(), f"{page}: {link}"
        assert set(_TARGET.findall(text)) <= targets, page


def test_what_does_not_exist_is_noticed():
    assert exists(["generate"])
    assert exists(["cache", "state", "Cache", "counts"])
    assert exists(["models", "decoder", "DecoderLayer", "prefill"])
    assert not exists(["pool"])
    assert not exists(["cache", "state", "Cache", "pools"])
    assert not exists(["compression", "compress", "nothing"])
    assert _DOTTED.findall("`kvjax.cache.state`, and kvjax.load().") == [".cache.state", ".load"]
    assert _PATH.findall("in tests/core/x.py; ~/.cache/kvjax/tests") == ["tests/core/x.py"]


# ---------------------------------------------------------------------------- words
def words(name: str) -> set[str]:
    """The words of a snake_case or CamelCase name."""
    return {word.lower() for word in re.split(r"_|(?<=[a-z])(?=[A-Z])", name)}


def retired(file: Path) -> Iterator[str]:
    """Modules, classes, functions and arguments that bear a retired word."""
    names = [file.stem]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.arg):
            names.append(node.arg)
    return (name for name in names if words(name) & RETIRED)


def test_retired_names_stay_away():
    found = {file.relative_to(ROOT).as_posix(): set(retired(file)) for file in CODE}
    assert {file: names for file, names in found.items() if names} == {}


def test_retired_names_are_noticed(tmp_path):
    file = tmp_path / "loose.py"
    file.write_text("class LookedUp:\n    def known_rows(self, dead=None, *, seen): ...\n")
    assert set(retired(file)) == {"loose", "LookedUp", "known_rows", "dead", "seen"}


def test_a_module_says_what_it_is_for():
    for file in CODE:
        told = ast.get_docstring(ast.parse(file.read_text()))
        assert told, f"{file} has no docstring"
        assert told.split("\n\n")[0].endswith((".", ":")), file


def test_models_of_images_have_one_name():
    """Say: vision-language model."""
    for file in [*PAGES, *CODE, *TESTS]:
        assert not re.search(r"(model|decoder|one)s?\s+that\s+sees?\b", prose(file)), file


def test_a_slow_test_says_why():
    silent = set()
    for file in TESTS:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef) and any(
                ast.unparse(mark).startswith("pytest.mark.slow") for mark in node.decorator_list
            ):
                silent |= {file.name} if "Slow: " not in (ast.get_docstring(node) or "") else set()
    assert silent == set()


# ---------------------------------------------------------------------------- planted faults
@pytest.mark.parametrize("fault", MUTANTS, ids=lambda fault: fault.name)
def test_planted_faults_fit_the_code(fault):
    """What `make mutants` replaces stands in the file once, and its tests are there."""
    assert (ROOT / fault.file).read_text().count(fault.old) == 1
    assert fault.old != fault.new
    for name in fault.tests:
        assert len(list(ROOT.glob(f"tests/**/{name}"))) == 1
