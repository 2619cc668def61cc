"""lm-evaluation-harness with kvjax as its model, on tasks of our own: no network."""

import importlib
import json

import numpy as np
import pytest
import served

import kvjax
from kvjax import CompressionConfig
from kvjax.serve import Engine
from kvjax.tiny import WEIGHTS
from kvjax.tiny.questions import questions
from kvjax.tiny.vocabulary import text

lm_eval = pytest.importorskip("lm_eval", reason="needs lm_eval (kvjax[eval])")
Instance = importlib.import_module("lm_eval.api.instance").Instance
TaskManager = importlib.import_module("lm_eval.tasks").TaskManager
Harness = importlib.import_module("kvjax.eval.lm_eval_model").Harness

BUDGET = 0.25
CHOICE = """\
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
metric_list: [{{metric: acc}}]
"""
ANSWER = """\
task: tiny_answer
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: [" ."], max_gen_toks: 6, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture(scope="module")
def harness():
    return Harness("tiny", "ada-snapkv", "25%", batch_size=4)


@pytest.fixture(scope="module")
def rows():
    """Questions, their answers' first words, and other words to choose from."""
    found = []
    for item in questions("multikey", 144, 6, seed=3):
        words = text(item.answer).split()
        found.append(
            {
                "prompt": text([*item.document, *item.question][1:]),  # the tokenizer writes BOS
                "answer": " ".join(words),
                "choices": [words[0], "red", "fox"],
                "gold": 0,
            }
        )
    return found


@pytest.fixture(scope="module")
def server(harness):
    """The address of a server of the same model and method."""
    methods = {"ada-snapkv": CompressionConfig.named("ada-snapkv", BUDGET)}
    with Engine(
        harness.model, harness.tokenizer, methods, cache_bytes=2**22, rows=4, buckets=(192,),
        max_new_tokens=8, warm_up=False,
    ) as engine, served.listening(served.app(engine)) as found:  # fmt: skip
        yield found


def tasks(folder, rows, **forms):
    """A manager of these tasks alone."""
    data = folder / "rows.json"
    data.write_text("\n".join(map(json.dumps, rows)))
    for name, form in forms.items():
        (folder / f"{name}.yaml").write_text(form.format(file=data))
    return TaskManager(include_path=str(folder), include_defaults=False)


def tokens_of(harness, text):
    return harness.tokenizer(text)["input_ids"]


def ask(kind, *arguments):
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def test_likelihood_is_read_from_the_compressed_cache(harness, rows):
    """Even of one word: the context's last token is the first to run against what is kept."""
    requests = [
        ask("loglikelihood", row["prompt"], " " + word) for row in rows for word in row["choices"]
    ]
    found = harness.loglikelihood(requests, disable_tqdm=True)
    config = CompressionConfig.named("ada-snapkv", BUDGET)
    for (total, greedy), request in zip(found[:4], requests[:4], strict=True):
        tokens = tokens_of(harness, "".join(request.args))
        [one] = kvjax.score(harness.model, [tokens], len(tokens) - 2, config)
        assert len(one.nll) == 2
        assert total == pytest.approx(-one.nll[1], abs=1e-4)
        assert greedy == (one.top1[1] == tokens[-1])
        [whole] = kvjax.score(harness.model, [tokens], len(tokens) - 1, config)
        assert abs(whole.nll[0] - one.nll[1]) > 1e-4  # the prefill's is another number


def test_no_continuation_is_certain(harness, rows):
    """Neither the context's last token nor another request's tokens stand for it."""
    prompt, word = rows[0]["prompt"], " " + rows[0]["choices"][0]
    context, one = tokens_of(harness, prompt), tokens_of(harness, prompt + word)[-1:]
    requests = [(("", ""), [1], []), ((prompt, word), context, one), ((prompt, ""), context, [])]
    found = harness._loglikelihood_tokens(requests, disable_tqdm=True)
    assert found[0] == found[2] == (0.0, True)
    assert found[1] == harness._loglikelihood_tokens(requests[1:2], disable_tqdm=True)[0]
    assert found[1][0] < 0


def test_a_long_context_loses_its_beginning(rows):
    short = Harness("tiny", "snapkv", "25%", batch_size=2, max_length=64)
    prompt, word = rows[0]["prompt"], " " + rows[0]["choices"][0]
    [(total, _)] = short.loglikelihood([ask("loglikelihood", prompt, word)], disable_tqdm=True)
    tokens = tokens_of(short, prompt + word)[-64:]
    [one] = kvjax.score(short.model, [tokens], 62, short.config)
    assert total == pytest.approx(-one.nll[1], abs=1e-4)


def test_a_text_is_scored_half_a_window_after_another(rows):
    short = Harness("tiny", "snapkv", "25%", batch_size=2, max_length=64)
    text = rows[0]["prompt"]
    tokens = tokens_of(short, text)[1:]  # without BOS
    assert 64 < len(tokens) < 160
    expected = sum(kvjax.score(short.model, [[1, *tokens[:32]]], 1)[0].nll)
    for start in range(32, len(tokens), 32):
        part = tokens[start - 32 : start + 32]
        expected += sum(kvjax.score(short.model, [part], 32, short.config)[0].nll)
    found = short.loglikelihood_rolling([ask("loglikelihood_rolling", text)], disable_tqdm=True)
    assert found == [pytest.approx(-expected, abs=1e-3)]


def test_tasks_run_under_compression(harness, rows, tmp_path):
    """One with choices and one with answers, from lm_eval's own evaluator."""
    manager = tasks(tmp_path, rows, tiny_choice=CHOICE, tiny_answer=ANSWER)
    done = lm_eval.simple_evaluate(
        harness, tasks=["tiny_choice", "tiny_answer"], task_manager=manager, bootstrap_iters=0
    )
    config = CompressionConfig.named("ada-snapkv", BUDGET)
    prompts = [tokens_of(harness, row["prompt"]) for row in rows]
    out = kvjax.generate(
        harness.model, prompts, config, max_new_tokens=6, tokenizer=harness.tokenizer, stop=" ."
    )
    right = [text == row["answer"] for text, row in zip(out.text, rows, strict=True)]
    results = done["results"]
    assert results["tiny_answer"]["exact_match,none"] == pytest.approx(np.mean(right))
    assert results["tiny_choice"]["acc,none"] > 0.6  # by chance a third


@pytest.mark.parametrize("backend", ["None", "huggingface"])
def test_a_server_gives_the_same_answers(harness, server, rows, tmp_path, backend):
    """lm_eval's own client of OpenAI's protocol, which sends texts or token ids, four at once."""
    pytest.importorskip("tenacity", reason="needs tenacity, as lm_eval's clients do")
    asked = importlib.import_module("lm_eval.models.openai_completions").LocalCompletionsAPI(
        base_url=f"{server}/v1/completions", model=served.NAME, tokenizer_backend=backend,
        tokenizer=str(WEIGHTS), tokenized_requests=backend != "None", num_concurrent=4,
        add_bos_token=True, max_retries=1,
    )  # fmt: skip
    manager = tasks(tmp_path, rows, tiny_answer=ANSWER)
    found = []
    for model in (harness, asked):
        done = lm_eval.simple_evaluate(
            model, tasks=["tiny_answer"], task_manager=manager, bootstrap_iters=0
        )
        samples = sorted(done["samples"]["tiny_answer"], key=lambda sample: sample["doc_id"])
        found.append([sample["filtered_resps"] for sample in samples])
    assert found[0] == found[1]
    assert len({str(answer) for answer in found[0]}) > 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": "auto"}, "batch_size='auto', expected an integer"),
        ({"max_length": 3}, "max_length=3, expected 4 to the model's"),
        ({"method": "snap"}, "method='snap', expected one of"),
    ],
)
def test_a_wrong_setting_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        Harness(**({"pretrained": "tiny", "method": "snapkv", "budget": "25%"} | change))


def test_generation_that_is_not_there_is_named(harness):
    request = ask("generate_until", "note", {"num_beams": 4})
    with pytest.raises(ValueError, match="generation_kwargs has 'num_beams', expected some of"):
        harness.generate_until([request], disable_tqdm=True)
