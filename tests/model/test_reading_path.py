"""How much there is to read of one call: the files in which a function runs."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import CodeType

import jax
import pytest

import kvjax
from kvjax import CompressionConfig, tiny

ROOT = Path(__file__).resolve().parents[2]
# What one answer comes to today, in files and lines, and of these the engine's own, without models
# and kernels. Lower them with the code: 24 files of 4,300 lines are wanted, 13 and 3,000 its own.
MOST = (37, 7470)
MOST_OF_THE_ENGINE = (24, 5780)


def files_that_run(call: Callable[[], object]) -> dict[Path, int]:
    """Lines of each file of the repository in which a function starts during `call`."""
    found: set[str] = set()
    monitoring, tool = sys.monitoring, sys.monitoring.PROFILER_ID

    def started(code: CodeType, _: int) -> object:
        if code.co_name != "<module>":  # an import runs nothing of a call
            found.add(code.co_filename)
        return monitoring.DISABLE

    monitoring.use_tool_id(tool, "reading path")
    monitoring.register_callback(tool, monitoring.events.PY_START, started)
    monitoring.set_events(tool, monitoring.events.PY_START)
    try:
        call()
    finally:
        monitoring.set_events(tool, monitoring.events.NO_EVENTS)
        monitoring.free_tool_id(tool)
        monitoring.restart_events()
    paths = {Path(name).resolve() for name in found if not name.startswith("<")}
    ours = {path for path in paths if path.is_relative_to(ROOT) and ".venv" not in path.parts}
    ours = {path for path in ours if not path.is_relative_to(ROOT / "tests")}
    return {path.relative_to(ROOT): len(path.read_text().splitlines()) for path in sorted(ours)}


@pytest.fixture(scope="module")
def read() -> dict[Path, int]:
    """Files and lines of an answer of the bundled model from token ids, nothing compiled before."""
    model = kvjax.load(tiny.WEIGHTS, progress=False)[0]
    config = CompressionConfig.named("ada-snapkv", budget=16, layout="packed")
    jax.clear_caches()
    return files_that_run(lambda: kvjax.generate(model, [*range(5, 69)], config, max_new_tokens=4))


def test_an_answer_is_read_in_few_files(read):
    told = "\n".join(f"{lines:5} {path}" for path, lines in read.items())
    assert len(read) <= MOST[0], told
    assert sum(read.values()) <= MOST[1], told
    own = {path: lines for path, lines in read.items() if path.parts[0] == "kvjax"}
    assert len(own) <= MOST_OF_THE_ENGINE[0], told
    assert sum(own.values()) <= MOST_OF_THE_ENGINE[1], told


def test_the_count_sees_functions_and_not_imports(read):
    """Of the call, its compression, model and kernel; what is only imported does not count."""
    names = {str(path) for path in read}
    assert {"kvjax/generation/generate.py", "kvjax/compression/scorers.py"} <= names
    assert {"models/decoder.py", "kernels/decode_attention/__init__.py"} <= names
    assert not {"kvjax/likelihood.py", "kvjax/inputs/tokenizer.py", "kvjax/__init__.py"} & names
