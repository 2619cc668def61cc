"""`kvjax inspect`: what is on the page is what the heads kept."""

import argparse
import base64
import json
import re

import numpy as np
import pytest

import kvjax
from kvjax import tiny
from kvjax.cli import inspect as command
from kvjax.eval.report.inspect import pack_mask, pieces, write_inspection
from kvjax.inputs.tokenizer import load_tokenizer

TEXT = "note bami sena zini . a crow cleans a green bridge . some bright farmer holds our mirror . "


def data_of(path):
    page = path.read_text(encoding="utf-8")
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    return json.loads(found[1])


def unpacked(data, place):
    """The mask of a method, bit by bit."""
    raw = base64.b64decode(data["methods"][place]["mask"])
    tokens, stride = len(data["tokens"]), -(-len(data["tokens"]) // 8)
    assert len(raw) == data["layers"] * data["heads"] * stride
    bits = [
        [raw[pair * stride + token // 8] >> token % 8 & 1 for token in range(tokens)]
        for pair in range(data["layers"] * data["heads"])
    ]
    return np.array(bits, bool).reshape(data["layers"], data["heads"], tokens)


def call(*arguments):
    parser = argparse.ArgumentParser()
    command.add_flags(parser)
    command.run(parser.parse_args([str(argument) for argument in arguments]))


def test_bits():
    mask = np.zeros((1, 2, 10), bool)
    mask[0, 0, [0, 9]] = True
    mask[0, 1, [1, 2]] = True
    assert base64.b64decode(pack_mask(mask)) == bytes([1, 2, 6, 0])


def test_page_holds_the_masks(tmp_path):
    rng = np.random.default_rng(3)
    kept = {name: rng.random((3, 2, 21)) < 0.4 for name in ("snapkv", "kvzip")}
    words = [f" w{place}" for place in range(20)] + ["</script>\n"]
    path = write_inspection(tmp_path / "new" / "page.html", words, kept, "A <title>", {"budget": 5})
    data = data_of(path)
    assert data["tokens"] == words
    assert data["facts"] == {"budget": "5"}
    assert [method["name"] for method in data["methods"]] == ["snapkv", "kvzip"]
    for place, mask in enumerate(kept.values()):
        assert np.array_equal(unpacked(data, place), mask)
    page = path.read_text()
    assert "<title>A &lt;title&gt;</title>" in page
    assert page.count("</script>") == 2


@pytest.mark.parametrize(
    ("tokens", "shapes", "said"),
    [
        ([], [(1, 1, 0)], "tokens has 0 entries and kept 1, expected at least one of each"),
        (["a"], [], "tokens has 1 entries and kept 0, expected at least one of each"),
        (["a"], [(1, 1, 2)], r"kept\['0'\] has shape \(1, 1, 2\), expected .* \(1, 1, 1\)"),
        (["a"], [(2, 1, 1), (1, 1, 1)], r"kept\['1'\] has shape \(1, 1, 1\), .* \(2, 1, 1\)"),
        (["a"], [(0, 1, 1)], r"kept\['0'\] has shape \(0, 1, 1\)"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, tokens, shapes, said):
    kept = {str(place): np.zeros(shape, bool) for place, shape in enumerate(shapes)}
    with pytest.raises(ValueError, match=said):
        write_inspection(tmp_path / "page.html", tokens, kept)


def test_pieces_join_to_the_prompt():
    tokenizer = load_tokenizer(tiny.WEIGHTS)
    ids = tokenizer(TEXT)["input_ids"]
    found = pieces(ids, tokenizer)
    assert len(found) == len(ids)
    assert found[0] == "<s>"
    assert "".join(found[1:]) == tokenizer.decode(ids, skip_special_tokens=True)


def test_command_shows_what_the_cache_holds(tmp_path, capsys):
    prompt, out = TEXT * 4, tmp_path / "page.html"
    (tmp_path / "prompt.txt").write_text(prompt)
    given = ("--prompt-file", tmp_path / "prompt.txt", "--methods", "ada-snapkv, full", "-o", out)
    call(*given, "--budget", "20%", "--json")
    captured = capsys.readouterr()
    said, data = json.loads(captured.out), data_of(out)
    model, tokenizer = tiny.load()
    row = tokenizer(prompt)["input_ids"]
    assert said["tokens"] == len(data["tokens"]) == len(row)
    assert said["kept"] == {"ada-snapkv": len(row) // 5, "full": len(row)}
    config = kvjax.CompressionConfig.named("ada-snapkv", 0.2)
    counts = np.asarray(kvjax.compress_prompt(model, row, config).counts[0])
    assert np.array_equal(unpacked(data, 0).sum(-1), counts)
    assert unpacked(data, 1).all()
    assert data["facts"]["budget"] == "20%"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--prompt", "a", "--methods", ","), "--methods ',' is empty, expected some of full"),
        (("--prompt", "a", "--methods", "snap"), "method='snap', expected one of full"),
        (("--prompt", "a", "--budget", "0%"), "budget='0%', expected a number of entries"),
        (("--prompt", "a " * 3000), "--prompt has 3001 tokens, expected at most the model's"),
        (("--prompt", ""), "prompt 0 is empty, expected at least one token"),
        (("--prompt", "a", "--chat"), "chat=True, expected a tokenizer with a chat template"),
    ],
)
def test_wrong_arguments(tmp_path, arguments, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        call(*arguments, "-o", tmp_path / "page.html")
