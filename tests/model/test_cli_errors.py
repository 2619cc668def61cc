"""Wrong calls of the command line: exit code 2, one sentence on stderr, nothing on stdout."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODEL = str(Path(__file__).parents[1] / "fixtures" / "hf" / "llama2-gqa")


@pytest.fixture
def one(tmp_path) -> list[str]:
    """`kvjax generate` for one prompt of 40 token ids; the context is 256."""
    (tmp_path / "one.txt").write_text(" ".join(map(str, range(3, 43))))
    return ["generate", "--model", MODEL, "--tokens", str(tmp_path / "one.txt")]


def assert_refused(result: tuple[int, str, str], *named: str) -> None:
    code, out, err = result
    assert (code, out) == (2, "")
    assert err.startswith("kvjax: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1
    for name in named:
        assert name in err


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ([], "COMMAND"),
        (["frobnicate"], "frobnicate"),
        (["methods", "--bogus"], "--bogus"),
        (["methods", "extra"], "extra"),
        (["generate"], "--model"),
        (["generate", "--model", MODEL], "--prompt"),
        (["generate", "--model", MODEL, "--prompt", "x", "--tokens", "y"], "not allowed with"),
        (["generate", "--mod", MODEL, "--prompt", "x"], "--model"),
        (["generate", "--model", MODEL, "--prompt", "x"], "has no tokenizer"),
        (["generate", "--model", MODEL, "--prompt", "\udcff"], "--prompt is not valid Unicode"),
        (["generate", "--model", MODEL, "--tokens", "/nowhere"], "/nowhere: No such file"),
        (["generate", "--model", MODEL, "--prompt-file", "/nowhere"], "/nowhere: No such file"),
        (["generate", "--model", "/nowhere", "--prompt", "x"], "/nowhere"),
        (["generate", "--model", str(ROOT / "tests"), "--prompt", "x"], "config.json"),
        (["score", "--model", MODEL], "--tokens"),
        (["score", "--model", MODEL, "--tokens", str(ROOT)], "Is a directory"),
        (["score", "--model", MODEL, "--tokens", "x", "--positions"], "--json"),
        (["score", "--model", MODEL, "--tokens", "x", "--batch", "0"], "--batch: '0'"),
        (["convert", "a"], "OUT"),
        (["convert", "a", "b"], "VOCABULARY is missing"),
        (["convert", "--to", "orbax", "a", "b", "c"], "VOCABULARY b, expected a Hugging Face"),
        (["convert", "/nowhere", "b", "c"], "/nowhere cannot be read"),
    ],
)
def test_wrong_calls(run, flags, named):
    assert_refused(run(*flags), named)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--method", "nope"], "method='nope', expected one of full, snapkv"),
        (["--method", "snapkv"], "budget=None"),
        (["--method", "snapkv", "--budget", "0"], "budget='0'"),
        (["--method", "snapkv", "--budget", "1"], "budget=1, expected at least 2"),
        (["--method", "snapkv", "--budget", "-3"], "budget='-3'"),
        (["--method", "snapkv", "--budget", "nan"], "budget='nan'"),
        (["--method", "snapkv", "--budget", "nan%"], "budget='nan%'"),
        (["--method", "snapkv", "--budget", "0%"], "budget='0%'"),
        (["--method", "snapkv", "--budget", "100.5%"], "budget='100.5%'"),
        (["--budget", "0"], "budget='0'"),  # full ignores a budget, not nonsense
        (["--method", "snapkv", "--budget", "8", "--window", "8"], "window=8"),
        (["--method", "snapkv", "--budget", "25%", "--window", "16"], "window=16"),
        (["--method", "snapkv", "--budget", "8", "--window", "0"], "--window: '0'"),
        (["--method", "snapkv", "--budget", "8", "--kernel", "4"], "kernel=4"),
        (["--method", "snapkv", "--budget", "8", "--pooling", "median"], "median"),
        (["--method", "snapkv", "--budget", "8", "--head-cap", "9"], "head_cap=9"),
        (["--method", "ada-snapkv", "--budget", "8", "--head-cap", "7"], "head_cap=7"),
        (["--method", "ada-snapkv", "--budget", "8", "--floor", "nan"], "floor=nan"),
        (
            ["--method", "snapkv", "--budget", "8", "--layout", "padded", "--quantize", "int8"],
            "quantize='int8', expected None with layout='padded'",
        ),
        (["--dtype", "int8"], "int8"),
        (["--seed", "-1"], "--seed: '-1'"),
        (["--max-new-tokens", "0"], "--max-new-tokens: '0'"),
        (["--max-new-tokens", "217"], "max_new_tokens=217 exceeds the model's context"),
        (["--temperature", "-1"], "temperature=-1.0"),
        (["--top-k", "99999999999"], "--top-k: '99999999999'"),
        (["--top-p", "0"], "top_p=0.0"),
        (["--min-p", "inf"], "min_p=inf"),
        (["--repetition-penalty", "x"], "--repetition-penalty"),
        (["--eos", "80"], "token id 80 is outside the vocabulary"),
        (["--eos", "3", "--ignore-eos"], "not allowed with"),
        (["--stop", "x"], "stop=['x'] needs a tokenizer"),
        (["--chat"], "--chat needs a text"),
        (["--profile", "/nowhere"], "/nowhere: No such file"),
    ],
)
@pytest.mark.parametrize("more", [[], ["--json"]])
def test_wrong_settings(run, one, flags, named, more):
    assert_refused(run(*one, *flags, *more), named)


def test_text_that_cannot_be_used(run, stories):
    flags = ["generate", "--model", stories[2], "--prompt"]
    assert_refused(run(*flags, ""), "prompt 0 is empty")
    assert_refused(run(*flags, "Lily", "--chat"), "chat template")
    assert_refused(run(*flags, "Lily", "--stop", ""), "stop=['']")
    assert_refused(run(*flags, "Lily " * 600), "exceeds the model's context")


def test_a_chat_template_that_fails(run, stories, tmp_path):
    shutil.copytree(stories[2], tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ raise_exception('no users') }}")
    flags = ["generate", "--model", tmp_path / "model", "--prompt", "Lily", "--chat"]
    assert_refused(run(*flags), "chat template", "no users")


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"1 2\n\n3", "line 2 is empty"),
        (b"1 2\n[]", "line 2 is empty"),
        (b"1 2\n3 x", "line 2 is '3 x', expected token ids"),
        (b"1 2\n3 4.5", "line 2 is '3 4.5', expected token ids"),
        (b"[1, 2]\n[3, 4.5]", "line 2 is [3, 4.5], expected a list of token ids"),
        (b"[1, 2]\n[3, true]", "line 2 is [3, True]"),
        (b"[1, 2]\n[3, ", "line 2 is not valid JSON"),
        (b"1 2\n3 80", "line 2: token id 80 is outside the vocabulary, expected 0 to 79"),
        (b"1 2\n3 -1", "line 2: token id -1"),
        (b"1 " * 256, "exceeds the model's context"),
        (b"1 2\n\xff", "not UTF-8"),
    ],
)
def test_malformed_token_files(run, one, tmp_path, content, named):
    (tmp_path / "bad.txt").write_bytes(content)
    assert_refused(run(*one, "--tokens", tmp_path / "bad.txt"), named)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("", "is empty"),
        ("[" * 100_000, "is not valid JSON"),
        ("nonsense", "is not valid JSON"),
        ("[1, 2]", 'expected an object with "tokens" and "prefix"'),
        ('{"tokens": [1, 2]}', 'expected an object with "tokens" and "prefix"'),
        ('{"tokens": "1 2", "prefix": 1}', "\"tokens\" is '1 2'"),
        ('{"tokens": [], "prefix": 1}', '"tokens" is empty'),
        ('{"tokens": [1, 2], "prefix": 0}', '"prefix" is 0'),
        ('{"tokens": [1, 2], "prefix": 2}', '"prefix" is 2'),
        ('{"tokens": [1, 2], "prefix": true}', '"prefix" is True'),
        ('{"tokens": [1, 80], "prefix": 1}', "token id 80 is outside the vocabulary"),
        (json.dumps({"tokens": [1] * 257, "prefix": 9}), "has 257 tokens"),
    ],
)
def test_malformed_documents(run, tmp_path, line, named):
    path = tmp_path / "bad.jsonl"
    good = '{"tokens": [1, 2, 3], "prefix": 2}'
    path.write_text(f"{good}\n{line}\n{good}" if line else "")
    flags = ["score", "--model", MODEL, "--tokens", path, "--json"]
    assert_refused(run(*flags), named, "bad.jsonl line 2" if line else "bad.jsonl")


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("[0.5", "profile.json, expected a JSON list"),
        ("{}", "expected a JSON list"),
        ("[]", "expected a JSON list"),
        ("[0.5, 1.5]", "expected a JSON list of the fraction"),
        ("[0.5, NaN]", "expected a JSON list of the fraction"),
        ("[0.5, true]", "expected a JSON list of the fraction"),
        ("[1, 1]", "at least one layer"),
        ("[0.5, 0.5, 0.5]", "profile has 3 layers, expected 2"),
    ],
)
def test_malformed_profiles(run, one, tmp_path, content, named):
    path = tmp_path / "profile.json"
    path.write_text(content)
    flags = ["--method", "prefixkv", "--profile", path]
    assert_refused(run(*one, *flags), named)
    (tmp_path / "good.jsonl").write_text('{"tokens": [1, 2, 3], "prefix": 2}')
    score = ["score", "--model", MODEL, "--tokens", tmp_path / "good.jsonl"]
    assert_refused(run(*score, *flags), named)


@pytest.mark.slow
def test_in_a_process_of_its_own():
    """Slow: a Python process imports JAX anew."""
    line = [sys.executable, "-m", "kvjax.cli", "generate", "--model", "/nowhere", "--prompt", "x"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(line, env=environment, timeout=300, capture_output=True, text=True)
    assert_refused((done.returncode, done.stdout, done.stderr), "/nowhere")
