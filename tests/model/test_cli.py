"""The command line: what it prints, and what it says of a wrong call."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import kvjax
import kvjax.tiny
from kvjax import METHODS, CompressionConfig, Sampling
from kvjax.cli import main
from kvjax.cli.parser import build_parser
from kvjax.cli.settings import compression, recompression
from kvjax.inputs.prompts import bucket
from kvjax.inputs.tokenizer import load_tokenizer
from kvjax.likelihood import batches
from kvjax.models.checkpoints.weights import load_decoder

ROOT = Path(__file__).resolve().parents[2]
MODEL = str(
    Path(__file__).parents[1] / "fixtures" / "hf" / "llama2-gqa"
)  # 2 layers, 2 KV heads of 8
NEW = 4
HEAD = 2 * 8 * 4  # bytes of an entry: key and value of 8 floats


@pytest.fixture(scope="module")
def model():
    return load_decoder(MODEL, progress=False)


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    return [3 + (7 * place) % 70 for place in range(40)]


@pytest.fixture
def one(tmp_path, prompt) -> list[str]:
    """`kvjax generate` for one prompt of token ids."""
    (tmp_path / "one.txt").write_text(" ".join(map(str, prompt)))
    flags = ["--model", MODEL, "--tokens", str(tmp_path / "one.txt"), "--max-new-tokens", str(NEW)]
    return ["generate", *flags]


def command(*arguments, **settings) -> subprocess.CompletedProcess:
    """The same in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-m", "kvjax.cli", *map(str, arguments)]
    return subprocess.run(line, env=environment, timeout=300, **settings)


# ------------------------------------------------------------------------- methods, help
def test_methods_are_listed(run):
    code, out, err = run("methods")
    head, *rows = out.splitlines()
    assert (code, err) == (0, "")
    assert head.split()[:4] == ["NAME", "SCORER", "LAYERS", "HEADS"]
    assert head.split()[4:] == ["ALWAYS", "KEPT", "READS", "QUESTION", "PREFILLS", "PAPER"]
    assert [row.split()[:4] for row in rows] == [
        [name, method.scorer, method.layers, method.heads] for name, method in METHODS.items()
    ]
    assert all(row.endswith(METHODS[row.split()[0]].paper) for row in rows)

    def column(name: str, following: str) -> dict[str, str]:
        cut = slice(head.index(name), head.index(following))
        return {row.split()[0]: row[cut].strip() for row in rows}

    kept = column("ALWAYS", "READS")
    assert kept["streaming-llm"] == "first 4, last 1"
    assert kept["h2o"] == "last half of the budget"
    question, prefills = column("QUESTION", "PREFILLS"), column("PREFILLS", "PAPER")
    assert (question["snapkv"], question["ada-kvzip"]) == ("must be seen", "may come later")
    assert (prefills["snapkv"], prefills["ada-kvzip"]) == ("1", "2 to 3")


def test_methods_as_json(run):
    _, out, _ = run("methods", "--json")
    table = json.loads(out)
    assert list(table) == list(METHODS)
    assert table["prefixkv"]["heads"] == "shared"
    assert table["prefixkv"]["keep_ratio"] is True
    assert table["snapkv"]["always_kept"] == "the window"
    assert table["snapkv"]["needs"]["question"] is True
    assert table["h2o"]["needs"]["all_queries"] is True


@pytest.mark.parametrize("flags", [["--version"], ["--help"], ["generate", "--help"]])
def test_help_and_version(capsys, flags):
    with pytest.raises(SystemExit) as stop:
        main(flags)
    assert stop.value.code == 0
    expected = f"kvjax {kvjax.__version__}" if flags == ["--version"] else "usage: kvjax"
    assert capsys.readouterr().out.startswith(expected)


# ------------------------------------------------------------------------- flags
def test_method_flags_reach_the_config(tmp_path):
    profile = tmp_path / "profile.json"
    profile.write_text("[0.5, 0.75, 0, 1]")

    def config(*flags):
        return compression(
            build_parser().parse_args(["generate", "--model", "m", "--prompt", "x", *flags])
        )

    assert config() == CompressionConfig.named("full")
    assert config("--budget", "7") == CompressionConfig.named("full")  # for scripts that sweep
    scoring = ["--window", "9", "--pooling", "average", "--kernel", "5", "--group", "max"]
    assert config(
        *["--method", "ada-snapkv", "--budget", "64", "--floor", "0.5", "--head-cap", "80"],
        *[*scoring, "--reduce", "sum"],
    ) == CompressionConfig.named(
        "ada-snapkv", 64, window=9, pooling="average", kernel=5, group="max", reduce="sum",
        floor=0.5, head_cap=80,
    )  # fmt: skip
    assert config("--method", "pyramidkv", "--budget", "12.5%", "--beta", "3") == (
        CompressionConfig.named("pyramidkv", 0.125, beta=3)
    )
    kept = ["--sinks", "6", "--recent", "9", "--chunk", "5"]
    assert config("--method", "knorm", "--budget", "64", *kept) == (
        CompressionConfig.named("knorm", 64, sinks=6, recent=9, chunk=5)
    )
    halved = config("--method", "snapkv", "--budget", "64", "--recent", "half")
    assert halved == CompressionConfig.named("snapkv", 64, recent="half")
    stored = config("--method", "prefixkv", "--profile", str(profile))
    assert stored == CompressionConfig.named("prefixkv", profile=(0.5, 0.25, 1.0, 0.0))


def test_flags_of_compression_while_decoding():
    def rule(*flags):
        return recompression(
            build_parser().parse_args(["generate", "--model", "m", "--prompt", "x", *flags])
        )

    assert rule() is None
    assert rule("--recompress-every", "64") == kvjax.Recompress(every=64)
    flags = ["--recompress-budget", "256", "--recompress-scorer", "key-diff"]
    expected = kvjax.Recompress(every=64, budget=256, scorer="key-diff")
    assert rule("--recompress-every", "64", *flags) == expected
    flags = [*flags[:2], "--recompress-scorer", "squared-sum", "--recompress-layers", "global"]
    expected = kvjax.Recompress(every=64, budget=256, scorer="squared-sum", layers="global")
    assert rule("--recompress-every", "64", *flags) == expected
    with pytest.raises(ValueError, match=r"^--recompress-budget needs --recompress-every N$"):
        rule(*flags)


# ------------------------------------------------------------------------- generate
@pytest.mark.slow
def test_compression_while_decoding(run, one, model, prompt):
    """Slow: the same answer as a stream, as JSON and by `generate`: three kinds of programs."""
    flags = [*one, "--method", "ada-snapkv", "--budget", 8, "--recompress-every", 2]
    flags += ["--recompress-budget", 12]
    code, streamed, _ = run(*flags)
    assert code == 0
    _, out, _ = run(*flags, "--json")
    report = json.loads(out.splitlines()[-1])
    rule = kvjax.Recompress(every=2, budget=12)
    config = CompressionConfig.named("ada-snapkv", 8)
    expected = kvjax.generate(model, [prompt], config, max_new_tokens=NEW, recompress=rule)
    assert report["tokens"] == expected.tokens == [[int(token) for token in streamed.split()]]
    # 12 entries of 2 heads in 2 pages of 16 slots, for 2 layers.
    assert report["cache_bytes"] == expected.cache_bytes == 2 * 32 * HEAD
    assert report["recompress"] == {
        "every": 2, "budget": 12, "scorer": "window", "window": None, "sinks": 4,
        "layers": "uniform", "heads": "ada", "floor": 0.2,
    }  # fmt: skip


@pytest.mark.slow
def test_json_and_streamed_tokens_agree(run, one, model, prompt):
    """Slow: a whole answer and a stream are compiled."""
    flags = [*one, "--method", "ada-snapkv", "--budget", 8]
    code, streamed, err = run(*flags)
    assert code == 0
    assert err == (
        "method=ada-snapkv budget=8 window=4 reduce=mean pooling=max kernel=7 group=mean"
        " floor=0.2\n"
    )
    code, out, _ = run(*flags, "--json")
    assert code == 0
    report = json.loads(out.splitlines()[-1])
    config = CompressionConfig.named("ada-snapkv", 8)
    expected = kvjax.generate(model, [prompt], config, max_new_tokens=NEW)
    assert report["tokens"] == expected.tokens == [[int(token) for token in streamed.split()]]
    assert streamed == " ".join(streamed.split()) + "\n"
    assert report["text"] is None  # the fixture has no tokenizer
    np.testing.assert_allclose(report["log_probs"], expected.log_probs, atol=1e-5)
    assert report["kept"] == expected.kept.tolist()
    assert np.shape(report["kept"]) == (1, 2, 2)
    assert np.sum(report["kept"], axis=-1).tolist() == [[16, 16]]
    assert report["entry_bytes"] == 8 * 2 * 2 * HEAD
    assert report["cache_bytes"] == expected.cache_bytes
    assert report["entry_bytes"] <= report["cache_bytes"] < report["full_cache_bytes"]
    assert report["full_cache_bytes"] == bucket(40) * 2 * 2 * HEAD
    phases = [report[f"{name}_seconds"] for name in ("prefill", "compress", "decode", "compile")]
    assert min(phases) > 0
    assert report["tokens_per_second"] == pytest.approx((NEW - 1) / report["decode_seconds"])
    assert report["compilations"] == 3
    assert report["prompt_tokens"] == [40]
    settings = {"method": "ada-snapkv", "budget": 8, "window": 4, "pooling": "max", "kernel": 7}
    settings |= {"floor": 0.2, "head_cap": None, "seed": 0, "dtype": "float32", "temperature": 0}
    assert {name: report[name] for name in settings} == settings


def test_bytes_follow_the_dtype_and_every_row_has_its_share(run, one, tmp_path, prompt):
    (tmp_path / "two.txt").write_text(f"{json.dumps(prompt)}\n{json.dumps(prompt[:20])}\n")
    flags = ["--tokens", tmp_path / "two.txt", "--method", "random", "--budget", "50%"]
    _, out, err = run(*one, *flags, "--dtype", "bfloat16", "--json")
    report = json.loads(out)
    assert report["kept"] == [[[20, 20]] * 2, [[10, 10]] * 2]
    assert report["entry_bytes"] == (20 + 10) * 2 * 2 * HEAD // 2
    assert report["full_cache_bytes"] == 2 * bucket(40) * 2 * 2 * HEAD // 2
    assert report["prompt_tokens"] == [40, 20]
    assert (report["budget"], report["window"]) == (0.5, 10)
    assert err == "method=random budget=50% window=5..10\n"


def test_every_form_of_token_ids(run, one, tmp_path, model, prompt):
    rows = [prompt[:9], prompt[9:16], prompt[16:22]]
    lines = ["  ".join(map(str, rows[0])), ", ".join(map(str, rows[1])), json.dumps(rows[2])]
    (tmp_path / "three.txt").write_text("\r\n".join(lines) + "\n\n")
    code, out, _ = run(*one, "--tokens", tmp_path / "three.txt", "--budget", "9", "--ignore-eos")
    assert code == 0
    expected = [[], [], []]
    for step in kvjax.stream(model, rows, max_new_tokens=NEW, eos_ids=()):
        for row in range(3):
            expected[row] += step.tokens[row]
    assert [[int(token) for token in line.split()] for line in out.splitlines()] == expected


def test_answer_flags(run, one, model, prompt):
    hot = [*one, "--temperature", "5", "--top-k", "60"]
    rules = {"sampling": Sampling(temperature=5.0, top_k=60), "max_new_tokens": NEW}
    drawn = []
    for seed in (1, 2):
        _, out, _ = run(*hot, "--seed", seed, "--ignore-eos")
        steps = kvjax.stream(model, [prompt], seed=seed, eos_ids=(), **rules)
        drawn.append([token for step in steps for token in step.tokens[0]])
        assert out == " ".join(map(str, drawn[-1])) + "\n"
    assert drawn[0] != drawn[1]
    ends = ["--eos", drawn[0][1], "--eos", 79]
    assert run(*hot, "--seed", 1, *ends)[1] == f"{drawn[0][0]} {drawn[0][1]}\n"


@pytest.mark.slow
def test_texts(run, stories, tmp_path):
    """Slow: the bundled story model is converted and compiled."""
    model, tokenizer, directory = stories
    texts = ["Once upon a time", "Lily"]
    expected = kvjax.generate(model, texts, tokenizer=tokenizer, max_new_tokens=8)
    flags = ["generate", "--model", directory, "--max-new-tokens", 8]
    _, out, _ = run(*flags, "--prompt", texts[0], "--prompt", texts[1])
    assert out == "\n---\n".join(expected.text) + "\n"
    (tmp_path / "prompt.txt").write_bytes(b"Lily\r\nand\n")  # the whole file, line ends included
    _, from_file, _ = run(*flags, "--prompt-file", tmp_path / "prompt.txt")
    assert from_file == run(*flags, "--prompt", "Lily\r\nand\n")[1] != ""


def test_chat(run, stories, tmp_path):
    model, _, directory = stories
    shutil.copytree(directory, tmp_path / "model")
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% endfor %}"
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    tokenizer = load_tokenizer(tmp_path / "model")
    flags = ["--prompt", "Lily", "--chat", "--max-new-tokens", 8]
    code, out, _ = run("generate", "--model", tmp_path / "model", *flags)
    turn = tokenizer("user: Lily", add_special_tokens=False)["input_ids"]
    steps = kvjax.stream(model, [turn], tokenizer=tokenizer, max_new_tokens=8)
    assert (code, out) == (0, "".join(step.text[0] for step in steps))
    assert out != ""


def test_instructions_and_template_arguments(run, stories, tmp_path):
    model, _, directory = stories
    shutil.copytree(directory, tmp_path / "model")
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{{ end }}"
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    tokenizer = load_tokenizer(tmp_path / "model")
    flags = ["--model", tmp_path / "model", "--prompt", "Lily", "--max-new-tokens", 8]
    more = ["--system", "Be kind.", "--template-arg", "end=Then"]
    code, out, _ = run("generate", *flags, "--chat", *more)
    said = "system: Be kind.\nuser: Lily\nThen"
    turns = tokenizer(said, add_special_tokens=False)["input_ids"]
    steps = kvjax.stream(model, [turns], tokenizer=tokenizer, max_new_tokens=8)
    assert (code, out) == (0, "".join(step.text[0] for step in steps))
    for given, name in ((more, "--system"), (more[2:], "--template-arg")):
        message = f"kvjax: {name} needs --chat, which it goes with\n"
        assert run("generate", *flags, *given) == (2, "", message)


def test_stop_strings_leave_no_phases(run, stories):
    _, tokenizer, directory = stories
    flags = ["generate", "--model", directory, "--prompt", "Once upon a time", "--stop", "girl"]
    _, out, _ = run(*flags, "--stop", "zebra", "--max-new-tokens", 16, "--json")
    report = json.loads(out)
    assert report["text"][0].endswith("little ")
    assert tokenizer.decode(report["tokens"][0]).endswith("girl")
    assert len(report["log_probs"][0]) == len(report["tokens"][0]) < 16
    for name in ("prefill_seconds", "compress_seconds", "decode_seconds", "compile_seconds"):
        assert report[name] is None
    assert report["tokens_per_second"] is None
    assert run(*flags, "--max-new-tokens", 16)[1] == report["text"][0]


def test_the_golden_text(stories, shared_data, tmp_path):
    (tmp_path / "bos.txt").write_text("1\n")
    flags = ["--model", stories[2], "--tokens", tmp_path / "bos.txt", "--method", "full"]
    done = command("generate", *flags, "--max-new-tokens", 200, capture_output=True)
    golden = (shared_data / "stories260K" / "golden_200_steps.txt").read_bytes()
    assert done.stdout == golden
    assert (done.returncode, done.stderr) == (0, b"method=full\n")


# ------------------------------------------------------------------------- score
@pytest.fixture(scope="module")
def documents() -> list[dict]:
    """Two buckets of prefixes and of what follows, mixed."""
    rng = np.random.default_rng(0)
    sizes = [(40, 30), (70, 45), (41, 29), (71, 46), (42, 31), (39, 26)]
    return [{"tokens": rng.integers(3, 80, n).tolist(), "prefix": prefix} for n, prefix in sizes]


@pytest.fixture
def documents_file(documents, tmp_path) -> Path:
    path = tmp_path / "documents.jsonl"
    path.write_text("".join(f"{json.dumps(document)}\n" for document in documents))
    return path


@pytest.mark.slow
def test_score_keeps_the_order_and_the_values(run, documents, documents_file, model):
    """Slow: texts of several lengths, by the command and by `score`."""
    flags = ["score", "--model", MODEL, "--tokens", documents_file, "--method", "snapkv"]
    flags += ["--budget", "8", "--batch", "2"]
    code, out, err = run(*flags, "--positions", "--json")
    assert code == 0
    assert err.startswith("method=snapkv budget=8 window=4 ")
    assert "6/6" in err
    expected = kvjax.score(
        model,
        [document["tokens"] for document in documents],
        [document["prefix"] for document in documents],
        CompressionConfig.named("snapkv", 8),
        positions=True,
    )
    lines = [json.loads(line) for line in out.splitlines()]
    assert len(lines) == len(documents)
    for line, one, document in zip(lines, expected, documents, strict=True):
        assert len(line["nll"]) == len(document["tokens"]) - document["prefix"]
        np.testing.assert_allclose(line["nll"], one.nll, atol=1e-4)
        assert line["kept"] == one.kept == 8 * 2 * 2
        assert line["top1"] == one.top1
        assert line["positions"] == one.positions
    _, bare, _ = run(*flags, "--json")
    assert bare == "".join(
        json.dumps({name: line[name] for name in ("nll", "kept", "top1")}) + "\n" for line in lines
    )
    _, summary, _ = run(*flags)
    losses = np.concatenate([line["nll"] for line in lines])
    assert summary == (
        f"documents 6, tokens {len(losses)}, mean NLL {losses.mean():.6f},"
        f" perplexity {np.exp(losses.mean()):.4f}, mean kept 32.0\n"
    )


@pytest.mark.parametrize("size", [1, 2, 3, 16])
def test_batches_share_programs(documents, size):
    pairs = [(document["tokens"], document["prefix"]) for document in documents]
    made = list(batches(pairs, size))
    assert sorted({index for batch, _ in made for index in batch}) == list(range(len(pairs)))
    assert max(len(batch) for batch, _ in made) <= size
    for batch, (prefix, rest) in made:
        for index in batch:
            tokens, own = pairs[index]
            assert prefix / 2 < own <= prefix
            assert rest / 2 < len(tokens) - own <= rest
    octaves = {((p - 1).bit_length(), (len(t) - p - 1).bit_length()) for t, p in pairs}
    assert len({(pad_to, len(batch)) for batch, pad_to in made}) == len(octaves)


# ------------------------------------------------------------------------- convert
def test_convert_round_trip(run, stories, shared_data, tmp_path):
    source = shared_data / "stories260K"
    flags = ["convert", source / "stories260K.bin", source / "tok512.bin", tmp_path / "out"]
    assert run(*flags) == (0, f"{tmp_path / 'out'}\n", "")
    made = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert made == {path.name: path.read_bytes() for path in stories[2].iterdir()}
    code, out, err = run(*flags)
    assert (code, out) == (2, "")
    assert "not empty" in err


@pytest.mark.parametrize("split", [(), ("--split", "2")])
def test_convert_to_orbax(run, tmp_path, split, model):
    source = tmp_path / "source"
    shutil.copytree(MODEL, source)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(kvjax.tiny.WEIGHTS / file, source / file)
    flags = ["convert", "--to", "orbax", source, tmp_path / "out", "--dtype", "float32", *split]
    assert run(*flags)[:2] == (0, f"{tmp_path / 'out'}\n")
    loaded, tokenizer = kvjax.load(tmp_path / "out")
    np.testing.assert_array_equal(loaded.embed.table_VD[...], model.embed.table_VD[...])
    assert tokenizer("note")["input_ids"] == load_tokenizer(source)("note")["input_ids"]
    code, out, err = run(*flags)
    assert (code, out) == (2, "")
    assert "not empty" in err
    (source / "model.safetensors").unlink()
    assert run("convert", "--to", "orbax", source, tmp_path / "other")[0] == 2
    assert not (tmp_path / "other").exists()


# ------------------------------------------------------------------------- ends
def test_a_reader_that_has_gone():
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb") as stdout:
        done = command("methods", stdout=stdout, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (141, b"")


def test_an_interrupt_is_quiet_and_a_bug_is_not(run, monkeypatch):
    def end_with(error):
        def command(arguments):
            raise error

        monkeypatch.setattr("kvjax.cli.commands.methods", command)

    end_with(KeyboardInterrupt)
    assert run("methods") == (130, "", "")
    end_with(ValueError("two\nlines"))
    assert run("methods") == (2, "", "kvjax: two lines\n")
    end_with(RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        run("methods")
