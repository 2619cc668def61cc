"""Contexts on disk are whole or absent, wherever a server is killed while it writes one."""

import signal
import subprocess
import sys

import pytest
import served

from kvjax.serve.shelf import Shelf

TEXTS = "w20 w30 w40 w50 w60 w70", "w21 w31 w41 w51 w61 w71"
CHILD = """
import os, signal, sys
sys.path.insert(0, "tests")
import served
from kvjax.cache import disk

def end(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def half(arrays, path, metadata):
    path.write_bytes(b"half of it")
    end()

def replace_and_end(*names):
    replace(*names)
    end()

replace, point = os.replace, sys.argv[2]
with served.engine(contexts_dir=sys.argv[1]) as engine:
    print(engine.add_context({first!r}, method="full"), flush=True)
    if point == "writing":
        disk.save_file = half
    else:
        os.replace = end if point == "written" else replace_and_end
    engine.add_context({second!r}, method="full")
"""


@pytest.fixture(scope="module")
def engine():
    with served.engine() as made:
        yield made


@pytest.mark.parametrize(("point", "whole"), [("writing", 1), ("written", 1), ("replaced", 2)])
def test_killed_while_a_context_is_written(engine, tmp_path, monkeypatch, point, whole):
    """Slow: each server is a process of its own, and compiles what it runs."""
    script = CHILD.format(first=TEXTS[0], second=TEXTS[1])
    command = [sys.executable, "-c", script, str(tmp_path), point]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    shelf = Shelf(engine.model, engine._menu, engine._loop, tmp_path)
    assert shelf.refused == []
    first = ended.stdout.strip()
    found = [one.id for one in shelf.contexts()]
    assert (first in found, len(found), len(list(tmp_path.iterdir()))) == (True, whole, whole)
    monkeypatch.setattr(engine, "_shelf", shelf)
    asked = {"max_new_tokens": 8, "ignore_eos": True}
    for name in found:
        text = TEXTS[name != first]
        (answer,) = engine.generate("so why", context=name, **asked)
        (plain,) = engine.generate(f"{text} so why", method="full", **asked)
        assert answer.tokens == plain.tokens
        engine.drop_context(name)
