"""`kvjax eval`: every example once, whatever happens on the way."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import kvjax
from kvjax import tiny
from kvjax.eval import runner
from kvjax.eval.journal import key_of, read_rows
from kvjax.eval.pod import Workers
from kvjax.eval.questions import as_tokens, batches, questions_of, waves
from kvjax.eval.reader import Reader
from kvjax.eval.runner import evaluate
from kvjax.eval.settings import EvalSettings, load_eval_settings
from kvjax.eval.tasks import TASKS, Ask, Document, TaskSettings

SETTINGS = EvalSettings(
    model="tiny",
    tasks=("tiny/multikey",),
    methods=("full", "ada-kvzip"),
    budgets=("50%",),
    lengths=(144,),
    protocols=("seen", "unseen"),
    count=3,
    batch=2,
    questions=2,
)


@pytest.fixture(scope="module")
def loaded():
    return tiny.load()


def run(settings, out, loaded, **changes):
    model, tokenizer = loaded
    return evaluate(
        settings, out, repr(settings), model=model, tokenizer=tokenizer, progress=False, **changes
    )


def by_key(*folders) -> dict:
    """Rows without what a clock says."""
    return {key_of(row): row | {"seconds": None} for row in read_rows(folders)}


@pytest.fixture(scope="module")
def whole(loaded, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    # 3 documents of 2 questions, 2 configs, 2 protocols.
    assert run(SETTINGS, out, loaded) == {"run": 24, "found": 0, "failed": 0}
    return out


def test_rows_are_what_generate_gives(whole, loaded):
    model, tokenizer = loaded
    rows = by_key(whole)
    given = TaskSettings(tokenizer=tokenizer, length=144, count=3, questions=2)
    document = list(TASKS["tiny/multikey"].documents(given))[1]
    ask = document.asks[1]
    context, rest = as_tokens(document, ask, tokenizer, False)
    assert [*context, *rest] == tokenizer(document.context + ask.question)["input_ids"]
    config = kvjax.CompressionConfig.named("ada-kvzip", 0.5)
    call = {"max_new_tokens": ask.new_tokens, "tokenizer": tokenizer}
    cache = kvjax.compress_prompt(model, [list(context)], config, tokenizer=tokenizer)
    unseen = kvjax.generate(model, [list(rest)], cache=cache, **call)
    seen = kvjax.generate(model, [[*context, *rest]], config, **call)
    for protocol, out in (("seen", seen), ("unseen", unseen)):
        place = ("tiny/multikey", 144, protocol, "ada-kvzip", "50%", document.id, ask.id)
        row = rows[place]
        assert row["prediction"] == tokenizer.decode(out.tokens[0], skip_special_tokens=True)
        assert row["kept_LK"] == out.kept[0].tolist()
        assert row["kept"] == pytest.approx(np.mean(out.kept[0]))
        assert row["bytes"] == out.cache_bytes
        assert row["full_bytes"] == out.full_cache_bytes
        assert row["score"] == float(row["prediction"] == ask.answers[0])
        assert row["prompt_tokens"] == len(context) + len(rest)
    scores = [row["score"] for row in rows.values() if row["method"] == "full"]
    assert np.mean(scores) > 0.7


def test_a_second_run_finds_everything(whole, loaded):
    before = (whole / "results-00000.jsonl").read_bytes()
    assert run(SETTINGS, whole, loaded) == {"run": 0, "found": 24, "failed": 0}
    assert (whole / "results-00000.jsonl").read_bytes() == before


def test_two_workers_and_a_lost_file_come_to_the_same(whole, loaded, tmp_path):
    out = tmp_path / "out"
    first = run(SETTINGS, out, loaded, workers=Workers(0, 2))
    assert first == {"run": 16, "found": 0, "failed": 0}
    assert run(SETTINGS, out, loaded, workers=Workers(1, 2))["run"] == 8
    assert by_key(out) == by_key(whole)
    # The second one's machine burnt down; one process alone finishes its part.
    path = out / "results-00001.jsonl"
    path.write_bytes(path.read_bytes()[:900])
    kept = len(list(read_rows([out])))
    assert run(SETTINGS, out, loaded) == {"run": 24 - kept, "found": kept, "failed": 0}
    assert by_key(out) == by_key(whole)


def test_an_example_that_fails_is_recorded_and_no_other(whole, loaded, tmp_path, monkeypatch):
    real = kvjax.generate

    def failing(model, prompts, *rest, **call):
        whole = isinstance(prompts, kvjax.PrefilledPrompts)
        if any(len(row) == 128 for row in (prompts.inputs.rows if whole else prompts)):
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory\nand so on")
        return real(model, prompts, *rest, **call)

    rows = by_key(whole)
    lengths = [row["prompt_tokens"] for row in rows.values()]
    assert set(lengths) == {128}
    monkeypatch.setattr(runner.kvjax, "generate", failing)
    counts = run(SETTINGS, tmp_path / "out", loaded)
    assert counts == {"run": 24, "found": 0, "failed": 12}  # those whose question is seen
    for key, row in by_key(tmp_path / "out").items():
        if row["protocol"] == "seen":
            assert row["error"] == "RESOURCE_EXHAUSTED: out of memory"
            assert row["score"] is None
        else:
            assert row == rows[key]


def test_what_does_not_fit_is_read_ahead_no_more_and_shorter_ones_are(loaded, monkeypatch):
    model, _ = loaded
    configs = [kvjax.CompressionConfig.named(name, 24) for name in ("snapkv", "key-diff")]
    real = kvjax.prefill_prompts

    def failing(model, prompts, *rest, **call):
        if len(prompts[0]) > 32:
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return real(model, prompts, *rest, **call)

    monkeypatch.setattr("kvjax.eval.reader.kvjax.prefill_prompts", failing)
    reader, long, short = Reader(model, configs), [[5] * 60], [[5] * 30]
    with pytest.raises(RuntimeError):
        reader.read(long, None, configs[0], 1)
    assert reader.read(long, None, configs[1], 1) is None
    assert isinstance(reader.read(short, None, configs[0], 1), kvjax.PrefilledPrompts)


def test_a_batch_is_prefilled_once_for_all_methods(loaded, tmp_path, monkeypatch):
    real, calls = kvjax.prefill_prompts, []

    def counted(model, prompts, configs, **rest):
        calls.append(len(configs))
        return real(model, prompts, configs, **rest)

    monkeypatch.setattr(kvjax, "prefill_prompts", counted)
    settings = dataclasses.replace(
        SETTINGS, methods=("snapkv", "ada-kvzip", "key-diff"), budgets=("50%", "25%"), count=2
    )
    assert run(settings, tmp_path / "once", loaded)["failed"] == 0
    # One batch of two documents: two waves of questions that are seen, the documents, unseen.
    assert calls == [6, 6, 6]
    apart = dataclasses.replace(settings, prefill_once=False)
    assert run(apart, tmp_path / "apart", loaded)["failed"] == 0
    assert calls == [6, 6, 6]
    once, each = by_key(tmp_path / "once"), by_key(tmp_path / "apart")
    assert once.keys() == each.keys()
    for key, row in once.items():
        assert row["log_prob"] == pytest.approx(each[key]["log_prob"], abs=1e-3)
        assert row | {"log_prob": 0} == each[key] | {"log_prob": 0}


def test_configs_of_one_prefill_follow_each_other(loaded, tmp_path, monkeypatch):
    """However the methods are listed, a batch is read once for each group of them."""
    real, calls = kvjax.prefill_prompts, []

    def counted(model, prompts, configs, **rest):
        calls.append(sorted({config.sinks for config in configs}))
        return real(model, prompts, configs, **rest)

    monkeypatch.setattr(kvjax, "prefill_prompts", counted)
    methods = (
        "expected-attention:sinks=4",
        "expected-attention:sinks=8",
        "ada-expected-attention:sinks=4",
    )
    settings = dataclasses.replace(
        SETTINGS, methods=methods, budgets=("50%", "25%"), protocols=("unseen",), count=2
    )
    assert run(settings, tmp_path / "out", loaded)["failed"] == 0
    assert calls == [[4], [8]]


def test_perplexity_is_that_of_score(loaded, tmp_path):
    model, tokenizer = loaded
    documents = TASKS["tiny/single"].documents(
        TaskSettings(tokenizer=tokenizer, length=400, count=1)
    )
    text = next(iter(documents)).context
    (tmp_path / "text.txt").write_text(text)
    settings = EvalSettings(
        model="tiny", tasks=("perplexity", "rouge"), methods=("full", "h2o"), budgets=("32",),
        lengths=(128,), continuation=16, count=2, batch=2, data=str(tmp_path / "text.txt"),
    )  # fmt: skip
    assert run(settings, tmp_path / "out", loaded)["failed"] == 0
    rows = by_key(tmp_path / "out")
    given = TaskSettings(
        tokenizer=tokenizer, length=128, count=2, continuation=16, data=settings.data
    )
    for document in TASKS["perplexity"].documents(given):
        ask = document.asks[0]
        context, rest = as_tokens(document, ask, tokenizer, False)
        config = kvjax.CompressionConfig.named("h2o", 32)
        (scored,) = kvjax.score(model, [[*context, *rest]], len(context), config)
        row = rows["perplexity", 128, "unseen", "h2o", "32", document.id, ask.id]
        assert row["nll"] == pytest.approx(np.mean(scored.nll), abs=1e-5)
        assert row["kept"] == 32
        assert row["bytes"] == 32 * model.config.num_layers * model.config.num_kv_heads * 2 * 32 * 4
    # The full cache agrees with its own answer; another need not.
    own = [row["score"] for row in rows.values() if row["task"] == "rouge"]
    full = [row for row in rows.values() if row["task"] == "rouge" and row["method"] == "full"]
    assert [row["score"] for row in full] == pytest.approx([1.0, 1.0])
    assert all(row["answers"] == [row["prediction"]] for row in full)
    assert min(own) < 1


def test_batches_hold_one_bucket_and_waves_one_question_each():
    def document(name, size, asks):
        made = tuple(
            Ask(id=f"{name}/{i}", question="", answers=("x",), new_tokens=new, metric="exact")
            for i, new in enumerate(asks)
        )
        whole = Document(id=name, task="t", context="", asks=made)
        return [runner.Question("t", 64, whole, ask, (1,) * size, (2,), size) for ask in made]

    four = [document("a", 10, [4, 4]), document("b", 40, [4]), document("c", 16, [4, 8, 4])]
    found = list(batches([question for mine in four for question in mine], 2))
    assert [[mine[0].document.id for mine in batch] for batch in found] == [["a", "c"], ["b"]]
    asked = [[q and q.ask.id for q in wave] for wave in waves(found[0])]
    assert asked == [["a/0", "c/0"], ["a/1", "c/1"], [None, "c/2"]]


@pytest.mark.parametrize(("size", "steps"), [(2262, 32), (2263, 20)])
def test_answers_are_drawn_to_a_bucket_where_the_context_has_room(loaded, size, steps):
    """Tasks with answers of 17 and of 20 tokens share one program."""
    model, tokenizer = loaded
    assert model.config.max_position_embeddings == 2304
    asks = [Ask(id="a", question="", answers=(), new_tokens=n, metric="exact") for n in (17, 20)]
    whole = Document(id="d", task="t", context="", asks=tuple(asks))
    asked = [runner.Question("t", 64, whole, ask, (1,), (2,) * 10, size) for ask in asks]
    one = runner._Run(model, tokenizer, runner.FULL, "full", "seen", SETTINGS, Reader(model, []))
    assert one._steps(asked) == steps


def test_a_document_is_compressed_for_all_that_will_be_asked_of_it(loaded, monkeypatch):
    """Each row for its own longest question with its answer: frequencies may go by it."""
    model, tokenizer = loaded
    asks = [Ask(id="a", question="", answers=(), new_tokens=n, metric="exact") for n in (17, 20)]
    whole = Document(id="d", task="t", context="", asks=tuple(asks))

    def question(ask, rest):
        return runner.Question("t", 64, whole, ask, (1, 2), (2,) * rest, 2)

    batch = [[question(asks[0], 9), question(asks[1], 4)], [question(asks[0], 3)]]
    compress, told = kvjax.compress_prompt, []

    def compress_prompt(*arguments, **named):
        told.append(named["max_new_tokens"])
        return compress(*arguments, **named)

    monkeypatch.setattr(kvjax, "compress_prompt", compress_prompt)
    one = runner._Run(model, tokenizer, runner.FULL, "full", "unseen", SETTINGS, Reader(model, []))
    one._generate(batch, [mine[0] for mine in batch])
    assert told == [[26, 20]]


def test_chat_templates_enclose_context_and_question(loaded):
    class Chat:
        """Words to lengths; a template that adds words around."""

        chat_template = "<user> ..."

        def __call__(self, text, add_special_tokens):
            return {"input_ids": [99] * add_special_tokens + [len(word) for word in text.split()]}

        def apply_chat_template(self, turns, tokenize, add_generation_prompt):
            return f"<user> {turns[0]['content']} <end> <assistant> "

    ask = Ask(id="q", question=" why ?", answers=("x",), new_tokens=1, metric="exact", lead="As")
    document = Document(id="d", task="t", context="once upon", asks=(ask,))
    assert as_tokens(document, ask, Chat(), True) == ((6, 4, 4), (3, 1, 5, 11, 2))
    assert as_tokens(document, ask, Chat(), False) == ((99, 4, 4), (3, 3))


class Trimming:
    """Characters to their code points, BOS 1; a template that trims, as Llama 3's does."""

    chat_template = "{{ messages[0].content | trim }}"

    def __call__(self, text, add_special_tokens, verbose=True):
        return {"input_ids": [1] * add_special_tokens + [ord(letter) for letter in text]}

    def apply_chat_template(self, turns, tokenize, add_generation_prompt):
        return f"<u>{turns[0]['content'].strip()}<e>"


@pytest.mark.parametrize(
    ("context", "question", "expected"),
    [
        ("one \n", "", ("<u>one", "<e>")),
        (" one \n", "two ", ("<u>one \n", "two<e>")),
        ("o\x1fne\ue000", " t\x1fo", ("<u>o\x1fne\ue000", " t\x1fo<e>")),
    ],
)
def test_a_turn_is_divided_whatever_template_and_text_hold(context, question, expected):
    """A template that trims takes white space at the end of a context, and no mark with it."""
    ask = Ask(id="q", question=question, answers=("x",), new_tokens=1, metric="rouge-l")
    document = Document(id="d", task="t", context=context, asks=(ask,))
    found = as_tokens(document, ask, Trimming(), True)
    assert tuple("".join(map(chr, part)) for part in found) == expected


@pytest.mark.parametrize(("name", "chat"), [("lcc", False), ("trec", False), ("qasper", True)])
def test_longbench_keeps_its_few_shot_and_code_tasks_plain(tmp_path, name, chat):
    row = {"input": "Which?", "context": "The context.", "answers": ["A"], "all_classes": ["A"]}
    (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
    settings = EvalSettings(
        model="tiny", tasks=(f"longbench/{name}",), methods=("full",), budgets=(), chat=True,
        lengths=(4096,), data=str(tmp_path),
    )  # fmt: skip
    [question] = questions_of(settings, None, Trimming(), Workers(0, 1))
    text = "".join(map(chr, [*question.context, *question.rest]))
    assert text.startswith("<u>") == text.endswith("<e>") == chat
    assert (text[0] == "\x01") != chat  # BOS is the template's own affair


def test_killed_and_run_again(whole, tmp_path):
    """SIGKILL in the middle of the command; what it wrote stays, and no row is lost or doubled."""
    config, out = tmp_path / "e.toml", tmp_path / "out"
    config.write_text(
        'model = "tiny"\ntasks = ["tiny/multikey"]\nmethods = ["full", "ada-kvzip"]\n'
        'budgets = ["50%"]\nlengths = [144]\nprotocols = ["seen", "unseen"]\ncount = 3\nbatch = 2\n'
        "questions = 2\n"
    )
    line = [sys.executable, "-m", "kvjax.cli", "eval", "--config", config, "--out", out, "--json"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    path, quiet = out / "results-00000.jsonl", subprocess.DEVNULL
    with subprocess.Popen(line, env=environment, stdout=quiet, stderr=quiet) as first:
        deadline = time.monotonic() + 240
        while not (path.exists() and path.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(first.pid, signal.SIGKILL)
    before = path.read_bytes()
    assert 0 < before.count(b"\n") < 24
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=300)
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["run"] == 24 - counts["found"] < 24
    assert path.read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    assert path.read_bytes().count(b"\n") == 24
    assert by_key(out) == by_key(whole)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ('tasks = ["ruler/nope"]', "tasks has 'ruler/nope', expected some of"),
        ('methods = ["snapvk"]', "methods, budgets: method='snapvk', expected one of"),
        ('budgets = ["250%"]', "methods, budgets: budget"),
        ("batch = 0", "batch = 0, expected at least 1"),
        ("max_context = -1", "max_context = -1, expected at least 0"),
        ("lengths = [5]", r"lengths = \[5\], expected tokens of at least 64"),
        ('protocol = ["seen"]', "unknown key protocol, expected model, tasks"),
        ('count = "many"', "count = 'many', expected one int"),
    ],
)
def test_wrong_settings_are_named(tmp_path, changes, message):
    base = {"model": '"tiny"', "tasks": '["tiny/single"]'}
    base |= {"methods": '["snapkv"]', "budgets": '["8"]'}
    name, value = changes.split(" = ")
    config = tmp_path / "e.toml"
    lines = {**base, name: value}
    config.write_text("".join(f"{key} = {text}\n" for key, text in lines.items()))
    with pytest.raises(ValueError, match=message):
        load_eval_settings(config)


def test_the_shipped_settings_are_valid():
    for path in (Path(__file__).parents[2] / "configs" / "eval").glob("*.toml"):
        assert load_eval_settings(path).configs()
