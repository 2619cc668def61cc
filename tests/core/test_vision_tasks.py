"""Pictures in evaluations: the files of PrefixKV's authors, and what methods keep of them."""

import json

import numpy as np
import pytest
from PIL import Image
from vision_model import write_llava

import kvjax
from kvjax import CompressionConfig
from kvjax.eval.journal import read_rows
from kvjax.eval.questions import as_tokens
from kvjax.eval.runner import evaluate
from kvjax.eval.settings import EvalSettings
from kvjax.eval.tasks import TASKS, TaskSettings

QUESTION = "the old fox sees a red lamp near our river"
ANSWER = "a small queen paints the quiet garden often"
FEATURES = 16  # of a picture
CONVERSATION = [
    {"from": "human", "value": f"<image>\n{QUESTION}"},
    {"from": "gpt", "value": ANSWER},
]
FORMS = {
    "detail_1k.json": [{"id": "1", "image": "coco/a.png", "conversations": CONVERSATION}],
    "mm-vet.json": {"v1_0": {"imagename": "b.png", "question": QUESTION, "answer": ANSWER}},
    "questions.jsonl": {"question_id": 7, "image": "b.png", "text": QUESTION},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two pictures and a file of each form, each in a folder of its own."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for name, value in FORMS.items():
        place = root / name.split(".")[0]
        for picture in ("coco/a.png", "images/b.png"):
            (place / picture).parent.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 256, (40, 60, 3), np.uint8)
            Image.fromarray(pixels).save(place / picture)
        (place / name).write_text(json.dumps(value))
    answers = json.dumps({"question_id": 7, "text": ANSWER})
    (root / "questions" / "answers_gpt4.jsonl").write_text(answers)
    return root


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return kvjax.load(write_llava(tmp_path_factory.mktemp("model") / "llava"), progress=False)


@pytest.mark.parametrize(
    ("name", "picture", "prompt"),
    [
        ("detail_1k", "coco/a.png", f"<image>\n{QUESTION}"),
        ("mm-vet", "images/b.png", f"{QUESTION}\n<image>"),
        ("questions", "images/b.png", f"<image>\n{QUESTION}"),
    ],
)
@pytest.mark.parametrize("task", ["vision/perplexity", "vision/rouge"])
def test_files_are_read(folder, name, picture, prompt, task):
    [document] = TASKS[task].documents(TaskSettings(data=folder / name))
    assert document.context == prompt
    assert document.images == (str(folder / name / picture),)
    [ask] = document.asks
    assert (ask.question, ask.answers) == ("", (ANSWER,))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": "none.png", "text": QUESTION}, "line 1: picture none.png is neither in"),
        ({"image": "b.png"}, 'line 1: "text" is None, expected a text'),
        ({"image": "b.png", "text": "<image> again"}, "has 2 times <image>, expected it once"),
        ({"image": "b.png", "text": ""}, "line 1 has no answer, expected one"),
        ({"image": "b.png", "conversations": []}, "conversations has no question and answer"),
    ],
)
def test_broken_rows_are_named(folder, tmp_path, row, message):
    (tmp_path / "images").symlink_to(folder / "mm-vet" / "images")
    (tmp_path / "questions.jsonl").write_text(json.dumps(row))
    task = "vision/perplexity" if "no answer" in message else "vision/rouge"
    with pytest.raises(ValueError, match=message):
        list(TASKS[task].documents(TaskSettings(data=tmp_path)))


def test_chat_templates_are_told_of_pictures(folder, loaded):
    model, tokenizer = loaded
    [document] = TASKS["vision/perplexity"].documents(TaskSettings(data=folder / "detail_1k"))
    context, rest = as_tokens(document, document.asks[0], tokenizer, True, model)
    said = tokenizer(f"<image>{QUESTION}", add_special_tokens=False)["input_ids"]
    assert list(context) == said
    assert list(rest) == tokenizer(ANSWER, add_special_tokens=False)["input_ids"]


@pytest.mark.slow
def test_methods_are_compared_on_pictures(folder, loaded, tmp_path):
    """Online, from a profile, and with even layers: as much in all, the likelihood of `score`.

    Slow: four methods on two tasks, each a program with a vision tower.
    """
    model, tokenizer = loaded
    profile = tmp_path / "llava_0.5.json"
    profile.write_text("[0.25, 0.75]")  # evicted
    offline = f"prefixkv:profile={tmp_path}/llava_{{evicted}}.json"
    settings = EvalSettings(
        model="llava",
        tasks=("vision/perplexity", "vision/rouge"),
        methods=("full", "prefixkv", "prefixkv:layers=uniform", offline),
        budgets=("50%",),
        protocols=("seen",),
        count=1,
        batch=1,
        continuation=4,
        data=str(folder / "detail_1k"),
    )
    evaluate(settings, tmp_path / "out", "x", model=model, tokenizer=tokenizer, progress=False)
    rows = {(row["task"], row["method"]): row for row in read_rows([tmp_path / "out"])}
    assert len(rows) == 8
    assert [row["error"] for row in rows.values()] == [None] * 8
    prompt = tokenizer(f"<image>\n{QUESTION}")["input_ids"]
    size = len(prompt) - 1 + FEATURES
    picture = folder / "detail_1k" / "coco" / "a.png"
    for method in settings.methods[1:]:
        scored, answered = (rows[task, method] for task in settings.tasks)
        assert scored["prompt_tokens"] == size + len(tokenizer(ANSWER)["input_ids"]) - 1
        assert scored["kept"] == answered["kept"] == pytest.approx(size // 2, abs=1)
        assert 0 <= answered["score"] <= 1
    kept = {
        method: np.array(rows["vision/rouge", method]["kept_LK"]) for method in settings.methods
    }
    assert (kept["prefixkv:layers=uniform"] == size // 2).all()
    assert abs(kept[offline][0] - 3 * kept[offline][1]).max() <= 3
    tokens = [*prompt, *tokenizer(ANSWER, add_special_tokens=False)["input_ids"]]
    config = CompressionConfig.named("prefixkv", 0.5)
    [one] = kvjax.score(model, tokens, len(prompt), config, images=[picture])
    assert rows["vision/perplexity", "prefixkv"]["nll"] == pytest.approx(np.mean(one.nll), abs=1e-4)
    assert rows["vision/rouge", "full"]["score"] == pytest.approx(1.0)  # its own answer


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("prefixkv:layer=uniform", "has 'layer=uniform', expected NAME=VALUE of a setting"),
        ("snapkv:kernel=4", "kernel=4, expected an odd integer"),
        ("prefixkv:profile=/nowhere.json", "/nowhere.json cannot be read"),
    ],
)
def test_a_wrong_setting_of_a_method_is_named(entry, message):
    with pytest.raises(ValueError, match=message):
        EvalSettings(model="tiny", tasks=("needle",), methods=(entry,), budgets=("25%",))
