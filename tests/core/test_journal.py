"""Results on disk survive a kill: nothing lost, doubled or half-written."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from kvjax.eval.journal import CONFIG, KEY, Journal, key_of, read_rows

SETTINGS = "model = 'tiny'\n"


def row(number: int, **changes) -> dict:
    made = dict.fromkeys(KEY, "x") | {"length": 64, "document": number, "score": number / 10}
    return made | changes


def test_rows_are_written_once_and_read_back(tmp_path):
    with Journal(tmp_path / "out", SETTINGS) as journal:
        journal.write([row(1), row(2)])
        journal.write([row(2, score=9), row(3, prediction="héllo\n")])
    text = (tmp_path / "out" / "results-00000.jsonl").read_text(encoding="utf-8")
    assert [json.loads(line)["document"] for line in text.splitlines()] == [1, 2, 3]
    assert "héllo" in text
    assert list(read_rows([tmp_path / "out"])) == [row(1), row(2), row(3, prediction="héllo\n")]
    assert (tmp_path / "out" / CONFIG).read_text() == SETTINGS


def test_a_half_written_line_is_dropped_and_written_again(tmp_path):
    with Journal(tmp_path, SETTINGS) as journal:
        journal.write([row(1), row(2)])
    path = tmp_path / "results-00000.jsonl"
    whole = path.read_bytes()
    for cut in (1, 5, len(json.dumps(row(2)))):
        path.write_bytes(whole[:-cut])
        assert [found["document"] for found in read_rows([tmp_path])] == [1]
        with Journal(tmp_path, SETTINGS) as journal:
            assert journal.done == {key_of(row(1))}
            journal.write([row(1), row(2)])
        assert path.read_bytes() == whole


def test_what_another_process_finished_is_not_run_again(tmp_path):
    with Journal(tmp_path, SETTINGS, 0) as first, Journal(tmp_path, SETTINGS, 1) as second:
        first.write([row(1)])
        second.write([row(2)])
    with Journal(tmp_path, SETTINGS, 0) as again:
        assert again.done == {key_of(row(1)), key_of(row(2))}
    assert [found["document"] for found in read_rows([tmp_path])] == [1, 2]


WRITER = """
import sys
from kvjax.eval.journal import KEY, Journal
row = dict.fromkeys(KEY, "x")
with Journal(sys.argv[1], "model = 'tiny'\\n") as journal:
    for number in range(100_000):
        journal.write([row | {"document": number, "text": "y" * 5000}])
        print(number, flush=True)
"""


def test_sigkill_loses_no_row_that_was_reported(tmp_path):
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    reported = [int(writer.stdout.readline()) for _ in range(20)]
    time.sleep(0.05)
    os.kill(writer.pid, signal.SIGKILL)
    reported += [int(line) for line in writer.stdout.read().splitlines()]
    writer.stdout.close()
    writer.wait()
    found = [found["document"] for found in read_rows([tmp_path / "out"])]
    assert found == list(range(len(found)))
    assert len(found) >= reported[-1] + 1 >= 20


def test_a_folder_of_other_settings_is_left_alone(tmp_path):
    with Journal(tmp_path / "out", SETTINGS) as journal:
        journal.write([row(1)])
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(
        ValueError, match=r"holds results of other settings .*, expected a new folder"
    ):
        Journal(tmp_path / "out", "model = 'other'\n")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("dear")
    with pytest.raises(ValueError, match="has other files in it, expected a new folder"):
        Journal(tmp_path, SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ValueError, match=r"^--out .*file/out cannot be written \(Not a directory\)"
    ):
        Journal(tmp_path / "file" / "out", SETTINGS)


def test_damaged_lines_are_named(tmp_path):
    with Journal(tmp_path, SETTINGS) as journal:
        journal.write([row(1)])
    with (tmp_path / "results-00000.jsonl").open("a") as file:
        file.write('{"task": 1}\n')
    with pytest.raises(ValueError, match="line 2 is damaged, expected a row"):
        list(read_rows([tmp_path]))
    with pytest.raises(ValueError, match=f"has no {CONFIG}, expected a folder that `kvjax eval`"):
        list(read_rows([tmp_path / "none"]))
