"""`kvjax report`: numbers worked out by hand or by another program, and damaged results."""

import argparse
import csv
import io
import json
import math
import random
import re

import numpy as np
import pytest
from results import CONFIG, folder, made_up, row

from kvjax.cli import report as command
from kvjax.eval.report import write_report
from kvjax.eval.report.read import read_results
from kvjax.eval.report.stats import estimates
from kvjax.eval.report.tables import tabulate


def tables_of(path, rows):
    return tabulate(read_results([folder(path, rows)]))


def only(records, **where):
    found = [r for r in records if all(r[name] == value for name, value in where.items())]
    assert len(found) == 1, found
    return found[0]


def asked(document, score, number=0, **changes):
    return row(document=document, ask=f"{document}/{number}", score=score, **changes)


# ---------------------------------------------------------------------------- means, intervals
def test_two_documents_one_right(tmp_path):
    # Of four equally likely draws one has 0 right, two have 1, one has 2: quantiles 0 and 1.
    tables = tables_of(tmp_path / "in", [asked("a", 1.0), asked("b", 0.0)])
    [record] = tables["quality"]
    assert record == {
        "protocol": "seen", "length": None, "measure": "score", "method": "snapkv",
        "budget": "25%", "mean": 0.5, "low": 0.0, "high": 1.0, "n": 2, "documents": 2, "tasks": 1,
        "bytes": 128000, "bytes_share": 0.25, "kept_share": 0.25, "seconds": 0.5,
    }  # fmt: skip


def test_one_document_has_an_interval_of_no_width(tmp_path):
    record = tables_of(tmp_path / "in", [asked("a", 0.25), asked("a", 0.75, 1)])["quality"][0]
    assert (record["mean"], record["low"], record["high"]) == (0.5, 0.5, 0.5)
    assert (record["n"], record["documents"]) == (2, 1)


def test_questions_of_a_document_are_drawn_together(tmp_path):
    rows = [asked("a", 1.0, number) for number in range(3)] + [asked("b", 0.0)]
    record = tables_of(tmp_path / "in", rows)["quality"][0]
    # a twice, a and b (3 of 4 questions right), or b twice.
    assert (record["mean"], record["low"], record["high"]) == (0.75, 0.0, 1.0)


def test_interval_of_a_share_is_binomial():
    values = np.array([[1.0] * 30 + [0.0] * 10])
    [found] = estimates(values, ["t"] * 40, np.arange(40))
    mass = [math.comb(40, k) * 0.75**k * 0.25 ** (40 - k) for k in range(41)]
    summed = np.cumsum(mass)
    low, high = (int(np.searchsorted(summed, share)) for share in (0.025, 0.975))
    assert (low, high) == (24, 35)
    assert found.mean == 0.75
    assert abs(found.low - low / 40) <= 1 / 40
    assert abs(found.high - high / 40) <= 1 / 40


def test_tasks_weigh_the_same_and_are_drawn_apart():
    rng = np.random.default_rng(7)
    scores = {"one": rng.random(12), "other": 0.3 * rng.random(5)}
    values = np.concatenate(list(scores.values()))[None]
    [found] = estimates(values, ["one"] * 12 + ["other"] * 5, np.arange(17))
    draw = random.Random(1)  # another generator, and a loop
    means = sorted(
        sum(sum(draw.choices(list(mine), k=len(mine))) / len(mine) for mine in scores.values()) / 2
        for _ in range(20000)
    )
    assert found.mean == pytest.approx((scores["one"].mean() + scores["other"].mean()) / 2)
    assert found.low == pytest.approx(means[500], abs=0.01)
    assert found.high == pytest.approx(means[19500], abs=0.01)
    assert (found.questions, found.documents, found.strata) == (17, 17, 2)


def test_difference_is_paired(tmp_path):
    # Scores vary much, and the difference is the same everywhere: its interval has no width.
    scores = [0.1, 0.9, 0.3, 0.6]
    rows = [asked(f"d{i}", score) for i, score in enumerate(scores)]
    rows += [asked(f"d{i}", score - 0.1, method="h2o") for i, score in enumerate(scores)]
    rows += [asked("d9", 1.0, method="h2o")]  # nobody else was asked
    tables = tables_of(tmp_path / "in", rows)
    assert tables["base"] == "snapkv"
    record = only(tables["paired"], base="snapkv")
    assert (record["method"], record["mean"], record["n"]) == ("h2o", -0.1, 4)
    assert (record["low"], record["high"]) == (-0.1, -0.1)
    assert only(tables["paired"], base="h2o")["mean"] == 0.1


def test_every_budget_is_compared_with_the_one_of_the_full_cache(tmp_path):
    rows = [asked("a", 1.0, method="full", budget="100%")]
    rows += [asked("a", 0.5, budget="25%"), asked("a", 0.75, budget="1024")]
    paired = tables_of(tmp_path / "in", rows)["paired"]
    found = {r["budget"]: r["mean"] for r in paired if r["base"] == "full"}
    assert found == {"1024": -0.25, "25%": -0.5}
    assert not [r for r in paired if r["base"] == "snapkv"]


def test_lengths_together_and_apart(tmp_path):
    rows = [asked("a", 1.0), asked("a", 0.0, length=4096), asked("b", 0.5, length=4096)]
    quality = tables_of(tmp_path / "in", rows)["quality"]
    assert {r["length"]: r["mean"] for r in quality} == {None: 0.5, 1024: 1.0, 4096: 0.25}
    # Texts of different lengths are different texts, whatever they are called.
    assert only(quality, length=None)["documents"] == 3


def test_nll_is_apart_from_scores(tmp_path):
    rows = [asked("a", 0.5), asked("b", None, task="perplexity", nll=2.25)]
    tables = tables_of(tmp_path / "in", rows)
    assert tables["measures"] == ["score", "nll"]
    assert {r["measure"]: r["mean"] for r in tables["quality"]} == {"score": 0.5, "nll": 2.25}
    assert {r["task"] for r in tables["cells"]} == {"perplexity", "ruler/niah_single_1"}


def test_needles_and_shares(tmp_path):
    rows = [
        asked("a", 1.0, facts={"depth": 0.5}, prompt_tokens=100, kept_LK=[[10, 30], [20, 20]]),
        asked("b", 0.5, facts={"depth": 0.5}, prompt_tokens=200, kept_LK=[[100, 20], [0, 80]]),
        asked("c", 0.0, facts={"depth": 1}, kept_LK=[[5]]),
    ]
    tables = tables_of(tmp_path / "in", rows)
    assert [(r["depth"], r["mean"], r["n"]) for r in tables["needles"]] == [
        (0.5, 0.75, 2),
        (1, 0, 1),
    ]
    [share] = tables["shares"]
    assert share["share"] == [[0.3, 0.2], [0.1, 0.3]]
    assert tables["notes"] == ["1 answers have kept_LK of another shape and are in no mean of it"]


def test_many_depths_are_rounded(tmp_path):
    rows = [asked(f"d{i}", 1.0, facts={"depth": i / 100}) for i in range(100)]
    depths = [r["depth"] for r in tables_of(tmp_path / "in", rows)["needles"]]
    assert depths == [place / 10 for place in range(11)]


# ---------------------------------------------------------------------------- files
def test_csv_rows(tmp_path):
    rows = [asked("a", 1.0), asked("b", 0.0), asked("a", 0.5, method="h2o", kept_LK=None)]
    out = write_report([folder(tmp_path / "in", rows)], tmp_path / "out")
    lines = (tmp_path / "out" / "report.csv").read_text().splitlines()
    task = "ruler/niah_single_1"
    assert lines[0].startswith(
        "section,protocol,length,measure,task,method,budget,base,layer,head,"
    )
    assert lines[1:8] == [
        "quality,seen,,score,,snapkv,25%,,,,,0.5,0.0,1.0,2,2,0.25,128000,0.25",
        "quality,seen,,score,,h2o,25%,,,,,0.5,0.5,0.5,1,1,0.25,128000,",
        f"task,seen,,score,{task},snapkv,25%,,,,,0.5,0.0,1.0,2,2,,,",
        f"task,seen,,score,{task},h2o,25%,,,,,0.5,0.5,0.5,1,1,,,",
        "paired,seen,,score,,h2o,25%,snapkv,,,,-0.5,-0.5,-0.5,1,1,,,",
        "paired,seen,,score,,snapkv,25%,h2o,,,,0.5,0.5,0.5,1,1,,,",
        "share,seen,,,,snapkv,25%,,0,0,,0.25,,,2,,,,",
    ]
    assert len(lines) == 7 + 8  # and a line for each of 4 layers of 2 heads
    assert out["rows"] == 3
    assert out["methods"] == ["snapkv", "h2o"]


def test_markdown_row(tmp_path):
    rows = [asked("a", 1.0), asked("b", 0.0)]
    write_report([folder(tmp_path / "in", rows)], tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    cell = "50.0 [0.0, 100.0] n=2"
    assert f"| `snapkv` | 25% | 25.0 % | {cell} | {cell} |\n" in text
    assert '- `snapkv` 25% seen, b/0: "1234567", expected "1234567"\n' in text


def test_all_files_have_the_same_numbers(tmp_path):
    write_report([folder(tmp_path / "in", made_up(documents=4))], tmp_path / "out")
    text, table, page = (
        (tmp_path / "out" / f"report.{kind}").read_text() for kind in ("md", "csv", "html")
    )
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    data = json.loads(found[1])
    lines = list(csv.DictReader(io.StringIO(table)))
    sections = {"quality": "quality", "cells": "task", "paired": "paired", "needles": "needle"}
    for name, section in sections.items():
        mine = [line for line in lines if line["section"] == section]
        assert [str(r["mean"]) for r in data[name]] == [line["mean"] for line in mine]
        assert len(mine) > 10
    for r in data["quality"]:
        scale, digits = (100, 1) if r["measure"] == "score" else (1, 4)
        numbers = [f"{scale * r[name]:.{digits}f}" for name in ("mean", "low", "high")]
        assert "{} [{}, {}]".format(*numbers) in text
    assert sum(line["section"] == "share" for line in lines) == 8 * len(data["shares"])


def test_strings_cannot_leave_their_element(tmp_path):
    bad = "</script><script>alert(1)</script> <!-- %DATA% %SCRIPT% \u2028"
    rows = [asked("a", 0.0, prediction=bad, answers=[bad], task=bad, method=bad)]
    rows += [asked("b", None, error=bad)]
    write_report([folder(tmp_path / "in", rows)], tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("</script>") == 2
    assert "<!--" not in page
    assert "alert(1)<" not in page


def test_pages_ask_for_nothing_from_outside(tmp_path):
    write_report([folder(tmp_path / "in", made_up(documents=2))], tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    assert set(re.findall(r"https?://[^\"' ]+", page)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<link[^>]+stylesheet|<script[^>]+src|@import|fetch\(", page)


def test_same_results_same_files(tmp_path):
    rows = made_up(documents=3)
    whole = folder(tmp_path / "whole", rows)
    parts = folder(tmp_path / "whole2", rows[1::2])
    folder(tmp_path / "whole2", rows[0::2], "results-00001.jsonl")
    for name, source in (("a", whole), ("b", whole), ("c", parts)):
        write_report([source], tmp_path / name)
    for kind in ("html", "md", "csv"):
        first, again, shared = (
            (tmp_path / name / f"report.{kind}").read_text() for name in ("a", "b", "c")
        )
        assert first == again
        if kind == "csv":
            assert first == shared


# ---------------------------------------------------------------------------- what is not whole
def test_half_written_line_and_duplicates(tmp_path):
    source = folder(tmp_path / "in", [asked("a", 0.0), asked("b", 0.5), asked("a", 1.0)])
    with open(source / "results-00000.jsonl", "a") as file:
        file.write('{"task": "ruler/vt", "len')
    tables = tabulate(read_results([source]))
    assert tables["quality"][0]["mean"] == 0.75  # the last line of a key counts
    assert tables["notes"] == [
        "1 half-written last lines were left out",
        "1 lines were replaced by a later one with the same key",
    ]
    assert tables["counts"] == {
        "folders": 1, "files": 1, "rows": 2, "failed": 0, "duplicates": 1, "half_written": 1,
    }  # fmt: skip


def test_failed_rows_are_in_no_mean(tmp_path):
    empty = dict.fromkeys(("score", "kept", "kept_LK", "bytes", "full_bytes", "prediction"))
    rows = [asked("a", 1.0), row(document="b", ask="b/0", **empty) | {"error": "too long"}]
    tables = tables_of(tmp_path / "in", rows)
    assert tables["quality"][0]["mean"] == 1.0
    assert tables["notes"] == ["1 answers failed and are in no mean"]
    assert tables["errors"] == [
        {
            "protocol": "seen", "method": "snapkv", "budget": "25%", "length": 1024,
            "task": "ruler/niah_single_1", "ask": "b/0", "error": "too long",
        }
    ]  # fmt: skip


@pytest.mark.parametrize("rows", [[], [asked("a", None, error="no")], [asked("a", None)]])
def test_nothing_to_average(tmp_path, rows):
    written = write_report([folder(tmp_path / "in", rows)], tmp_path / "out")
    assert written["rows"] == len(rows)
    assert tabulate(read_results([tmp_path / "in"]))["quality"] == []


def test_missing_tasks_and_sizes(tmp_path):
    bare = {"bytes": None, "full_bytes": 0, "kept_LK": None, "prompt_tokens": None, "facts": None}
    rows = [
        asked("a", 1.0),
        asked("a", 0.0, task="ruler/vt"),
        asked("a", 1.0, method="h2o", **bare),
    ]
    tables = tables_of(tmp_path / "in", rows)
    assert {r["method"]: r["tasks"] for r in tables["quality"]} == {"snapkv": 2, "h2o": 1}
    assert only(tables["quality"], method="h2o")["bytes_share"] is None
    # Only what both answered is compared.
    assert only(tables["paired"], base="snapkv")["mean"] == 0.0
    write_report([tmp_path / "in"], tmp_path / "out")


def test_wrong_answers_are_a_few_of_each(tmp_path):
    rows = [asked(f"d{i}", 0.0, method=name) for i in range(9) for name in ("h2o", "snapkv")]
    wrong = tables_of(tmp_path / "in", [*rows, asked("x", 0.5)])["wrong"]
    assert [r["method"] for r in wrong].count("h2o") == 3
    assert len(wrong) == 6


def test_models_of_two_folders_are_told_apart(tmp_path):
    one = folder(tmp_path / "one", [asked("a", 1.0)])
    two = folder(tmp_path / "two", [asked("a", 0.0)])
    (two / "config.toml").write_text(CONFIG.replace('"tiny"', '"models/llama"'))
    tables = tabulate(read_results([one, two]))
    assert tables["methods"] == ["snapkv (model=llama)", "snapkv (model=tiny)"]
    assert tables["counts"]["duplicates"] == 0


def test_seeds_of_two_folders_are_other_documents(tmp_path):
    one = folder(tmp_path / "one", [asked("a", 1.0)])
    two = folder(tmp_path / "two", [asked("a", 0.0)])
    (two / "config.toml").write_text(CONFIG + "seed = 1\n")
    [record] = tabulate(read_results([one, two, one]))["quality"]
    assert (record["method"], record["mean"], record["documents"]) == ("snapkv", 0.5, 2)


def test_budgets_and_methods_are_in_order(tmp_path):
    budgets = ("100%", "2048", "9%", "256", "12.5%")
    rows = [
        asked("a", 1.0, method=name, budget=b) for name in ("new", "h2o", "full") for b in budgets
    ]
    tables = tables_of(tmp_path / "in", rows)
    assert tables["budgets"] == ["256", "2048", "9%", "12.5%", "100%"]
    assert tables["methods"] == ["full", "h2o", "new"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"score": 1.5}, "score is 1.5, expected a number from 0 to 1"),
        ({"score": "good"}, "score is 'good', expected a number from 0 to 1"),
        ({"nll": float("nan")}, "nll is nan, expected a number of at least 0"),
        ({"method": None}, "method is None, expected a text"),
        ({"length": None}, "length is None, expected a number of at least 0"),
        ({"bytes": -1}, "bytes is -1, expected a number of at least 0"),
        ({"kept_LK": [[1, 2], [3]]}, "kept_LK is damaged, expected a list of integers"),
    ],
)
def test_a_wrong_value_is_named(tmp_path, change, said):
    source = folder(tmp_path / "in", [asked("a", 1.0), asked("b", 1.0) | change])
    with pytest.raises(ValueError, match=re.escape(f"results-00000.jsonl: line 2: {said}")):
        read_results([source])


def test_a_damaged_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match="folders is empty, expected at least one"):
        read_results([])
    (tmp_path / "bare").mkdir()
    with pytest.raises(ValueError, match=r"bare has no config.toml, expected a folder"):
        read_results([tmp_path / "bare"])
    source = folder(tmp_path / "in", [asked("a", 1.0)])
    with open(source / "results-00000.jsonl", "a") as file:
        file.write("half\n[1]\n")
    with pytest.raises(ValueError, match="line 2 is damaged, expected a JSON object"):
        read_results([source])
    (source / "config.toml").write_text("model = ")
    with pytest.raises(ValueError, match=r"config.toml is not valid TOML \("):
        read_results([source])


# ---------------------------------------------------------------------------- the command
def call(*arguments):
    parser = argparse.ArgumentParser()
    command.add_flags(parser)
    command.run(parser.parse_args([str(argument) for argument in arguments]))


def test_command(tmp_path, capsys):
    source = folder(tmp_path / "in", made_up(documents=2, lengths=(1024,)))
    call(source, "-o", tmp_path / "new" / "out", "--json")
    said = json.loads(capsys.readouterr().out)
    assert said["rows"] == 2 * 13 * 4 * 2
    assert said["lengths"] == [1024]
    for name in ("html", "markdown", "csv"):
        assert (tmp_path / "new" / "out").joinpath(said[name]).is_file()
    call(source, "-o", tmp_path / "new" / "out")
    said = capsys.readouterr().out
    assert said.startswith(f"{tmp_path / 'new' / 'out' / 'report.html'}: 208 answers, ")
    assert said.endswith(" failed, 5 methods, 4 tasks\n")
