"""Images from the command line and what is wrong with them, on a small random LLaVA."""

import base64
import io
import json
import re
from functools import partial

import numpy as np
import pytest
from PIL import Image
from vision_model import write_llava

import kvjax
from kvjax import tiny
from kvjax.inputs.chat import chat_text
from kvjax.inputs.prompts import encoded
from kvjax.inputs.tokenizer import load_tokenizer
from kvjax.models.checkpoints.export import save_decoder
from kvjax.models.checkpoints.orbax import save_orbax

TEXT = "a crow cleans a green bridge ."
FEATURES = 16
BLACK = np.zeros((5, 5, 3), np.uint8)
SNAP = kvjax.CompressionConfig.named("snapkv", budget=12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_llava(tmp_path_factory.mktemp("llava") / "model")


@pytest.fixture(scope="module")
def loaded(folder):
    return kvjax.load(folder, progress=False)


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    rng = np.random.default_rng(1)
    path = tmp_path_factory.mktemp("pictures") / "noise.png"
    Image.fromarray(rng.integers(0, 255, (40, 60, 3), np.uint8)).save(path)
    return path


def compressed(model, tokenizer, picture):
    text = f"<image> {TEXT}"
    return kvjax.compress_prompt(model, text, SNAP, tokenizer=tokenizer, images=picture)


def test_generate_takes_files_pictures_and_arrays(loaded, picture):
    model, tokenizer = loaded
    call = {"max_new_tokens": 3, "tokenizer": tokenizer, "eos_ids": ()}
    with Image.open(picture) as opened:
        kinds = [str(picture), picture, np.array(opened), opened.copy()]
    found = [kvjax.generate(model, f"<image> {TEXT}", SNAP, images=[k], **call) for k in kinds]
    assert all(out.log_probs == found[0].log_probs for out in found)
    flat = kvjax.generate(model, f"<image> {TEXT}", SNAP, images=picture, **call)
    assert flat.log_probs == found[0].log_probs


def test_command_puts_the_image_in_front(run, folder, picture, loaded):
    model, tokenizer = loaded
    arguments = ("generate", "--model", folder, "--prompt", TEXT, "--image", picture, "--json")
    method = ("--method", "snapkv", "--budget", 12, "--max-new-tokens", 3, "--ignore-eos")
    code, out, _ = run(*arguments, *method)
    said = json.loads(out)
    own = tokenizer(f"<image>\n{TEXT}")["input_ids"]
    assert code == 0
    assert said["prompt_tokens"] == [len(own) + FEATURES - 1]
    call = {"max_new_tokens": 3, "tokenizer": tokenizer, "eos_ids": ()}
    out = kvjax.generate(model, own, SNAP, images=[picture], **call)
    assert said["tokens"] == out.tokens
    code, marked, _ = run(*arguments[:4], f"<image>\n{TEXT}", *arguments[5:], *method)
    assert code == 0
    assert json.loads(marked)["tokens"] == out.tokens


@pytest.mark.parametrize("text", [TEXT, f"{TEXT} <image> {TEXT}"])
def test_chat_templates_are_told_of_images(loaded, text):
    _, tokenizer = loaded
    call = partial(chat_text, text, tokenizer, images=1, placeholder="<image>")
    row = encoded(call(), tokenizer, special=False)
    marked = text if "<image>" in text else f"<image>{text}"
    assert row == tokenizer(marked, add_special_tokens=False)["input_ids"]
    with pytest.MonkeyPatch.context() as patch:  # a template for text alone
        patch.setattr(tokenizer, "chat_template", "[{{ messages[0]['content'] }}]")
        row = encoded(call(), tokenizer, special=False)
    assert row == tokenizer(f"[{marked}]", add_special_tokens=False)["input_ids"]


def test_turns_with_an_image_are_followed(loaded, picture):
    """The cache counts the image as its one token, and the answer to a question as ever."""
    model, tokenizer = loaded
    parts = [{"type": "image"}, {"type": "text", "text": f" {TEXT}"}]
    turns = [{"role": "user", "content": parts}]
    question = {"role": "user", "content": [{"type": "text", "text": f" {TEXT}"}]}
    cache = kvjax.compress_prompt(
        model, config=SNAP, messages=turns, images=picture, tokenizer=tokenizer
    )
    [history] = cache.history
    assert history.tokens.count(model.vision_config.image_token_id) == 1
    assert cache.next_positions.tolist() == [len(history.tokens) + FEATURES - 1]
    call = {"cache": cache, "max_new_tokens": 3, "tokenizer": tokenizer, "eos_ids": ()}
    found = [kvjax.generate(model, messages=m, **call) for m in ([question], [*turns, question])]
    rest = tokenizer(f" {TEXT}", add_special_tokens=False)["input_ids"]
    assert found[0].tokens == found[1].tokens == kvjax.generate(model, rest, **call).tokens


@pytest.mark.slow
def test_score_and_calibrate_see_images(run, folder, picture, loaded, tmp_path):
    """Slow: two commands with a tower are compiled."""
    model, tokenizer = loaded
    row = tokenizer(f"<image> {TEXT} {TEXT}")["input_ids"]
    copy = tmp_path / "beside.png"
    copy.write_bytes(picture.read_bytes())
    lines = [
        {"tokens": row, "prefix": 6, "images": ["beside.png"]},
        {"tokens": [t for t in row if t != model.vision_config.image_token_id], "prefix": 5},
    ]
    file = tmp_path / "texts.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    code, out, error = run("score", "--model", folder, "--tokens", file, "--json")
    assert code == 0, error
    seen, unseen = map(json.loads, out.splitlines())
    assert seen["kept"] == unseen["kept"] + FEATURES * 4
    [alone] = kvjax.score(model, row, 6, images=[picture])
    np.testing.assert_allclose(seen["nll"], alone.nll, atol=1e-4)
    prompts, profile = tmp_path / "prompts.jsonl", tmp_path / "profile.json"
    lines = [{"prompt": TEXT, "images": ["beside.png"]}, {"prompt": f"{TEXT} <image>"} | lines[1]]
    del lines[1]["tokens"]
    lines[1]["images"] = ["beside.png"]
    prompts.write_text("\n".join(map(json.dumps, lines)))
    call = ("--prompts", prompts, "--budget", "50%", "-o", profile, "--json")
    code, out, error = run("calibrate", "--model", folder, *call)
    assert code == 0, error
    assert json.loads(out)["tokens"] >= 2 * (FEATURES + len(row) // 2)
    assert len(json.loads(profile.read_text())) == 2


WRONG = {
    "none.png": None,
    "torn.png": b"\x89PNG\r\n\x1a\n torn",
    "text.png": b"no picture",
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_files_are_named(run, folder, tmp_path, name):
    path = tmp_path / name
    if WRONG[name] is not None:
        path.write_bytes(WRONG[name])
    code, out, error = run("generate", "--model", folder, "--prompt", TEXT, "--image", path)
    assert (code, out) == (2, "")
    assert f"image {path} cannot be read" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("prompt", "images", "said"),
    [
        (TEXT, [np.zeros((0, 5, 3), np.uint8)], "image 0 of prompt 0: image must be of at least"),
        (TEXT, [np.zeros((5, 5), np.uint8)], "image 0 of prompt 0: image must be a uint8 array"),
        (TEXT, [BLACK], "prompt 0 has 0 tokens .* and 1 images"),
        ("<image> <image>", [BLACK], "0 has 2 tokens .* and 1 images"),
        (f"<image> {TEXT}", None, "prompt 0 has 1 tokens that stand for an image .* and 0 images"),
        (
            "<image>" * 130,
            [BLACK] * 130,
            "prompt of 2081 tokens .* exceeds",
        ),
        (
            [TEXT, TEXT],
            [BLACK] * 2,
            "images has 2 entries, expected a list",
        ),
        ([TEXT, TEXT], [[]], "images has 1 entries, expected a list of images for each of the 2"),
    ],
)
def test_wrong_calls_are_named(loaded, prompt, images, said):
    model, tokenizer = loaded
    with pytest.raises(ValueError, match=said):
        kvjax.generate(model, prompt, images=images, max_new_tokens=2, tokenizer=tokenizer)


def test_what_is_not_there_is_said(loaded, picture, tmp_path):
    model, tokenizer = loaded
    text_model, _ = tiny.load()
    with pytest.raises(ValueError, match="images are given to a Qwen3ForCausalLM"):
        kvjax.generate(text_model, [5, 6], images=[picture], max_new_tokens=2)
    cache = kvjax.compress_prompt(
        model, f"<image> {TEXT}", SNAP, tokenizer=tokenizer, images=picture
    )
    question = {"cache": cache, "max_new_tokens": 2, "tokenizer": tokenizer}
    with pytest.raises(ValueError, match="images beside a cache are not read"):
        kvjax.generate(model, "<image>", images=[picture], **question)
    with pytest.raises(ValueError, match=r"1 tokens that stand for an image .* and 0 images"):
        kvjax.generate(model, "<image>", **question)
    with pytest.raises(ValueError, match="model is a Llava, whose tower is not written"):
        save_orbax(model, tmp_path / "orbax")
    with pytest.raises(ValueError, match="model is a Llava, whose tower is not written"):
        save_decoder(model, tmp_path / "hf", {})
    assert not list(tmp_path.iterdir())


def test_a_saved_cache_answers_as_before(loaded, picture, tmp_path):
    model, tokenizer = loaded
    cache = kvjax.compress_prompt(
        model, f"<image> {TEXT}", SNAP, tokenizer=tokenizer, images=picture
    )
    path = kvjax.save_cache(tmp_path / "cache", cache, model, SNAP)
    call = {"max_new_tokens": 3, "tokenizer": tokenizer, "eos_ids": ()}
    first, second = (
        kvjax.generate(model, TEXT, cache=held, **call)
        for held in (cache, kvjax.load_cache(path, model))
    )
    assert first.log_probs == second.log_probs


def test_other_architectures_stay_an_error(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["LlavaNextForConditionalGeneration"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="architectures must be a list of one of Llama"):
        kvjax.load(tmp_path)


@pytest.mark.slow
def test_a_photograph_and_a_published_profile(shared_data, tmp_path):
    """576 features of LLaVA-1.5 beside 50 tokens of text; its first two layers' profile.

    All 32 layers of it keep 10,035 entries (tests/core/test_budgets.py).

    Slow: 576 features of a photograph.
    """
    folder = write_llava(tmp_path / "model", size=336)
    model, tokenizer = kvjax.load(folder, progress=False)
    photo = shared_data / "images" / "astronaut.png"
    published = shared_data / "prefixkv_confs" / "prefixkv_llava-v1.5-7b_0.5.json"
    retained = tuple(1 - share for share in json.loads(published.read_text())[:2])
    row = tokenizer(f"<image> {TEXT}")["input_ids"]
    row += row[-1:] * (51 - len(row))
    config = kvjax.CompressionConfig.named("prefixkv", profile=retained)
    out = kvjax.generate(model, row, config, images=photo, max_new_tokens=4, eos_ids=())
    assert out.kept.shape == (1, 2, 2)
    assert out.kept.sum() == 2 * round(626 * sum(retained))
    assert (np.abs(out.kept[0] - 626 * np.array(retained)[:, None]) < 1).all()
    assert len(out.tokens[0]) == 4
    other = kvjax.generate(
        model, row, config, images=shared_data / "images" / "coffee.png", max_new_tokens=4,
        eos_ids=(),
    )  # fmt: skip
    assert other.log_probs != out.log_probs


def test_the_page_shows_the_patches(run, folder, picture, tmp_path):
    page = tmp_path / "page.html"
    call = ("--image", picture, "--methods", "snapkv", "--budget", "50%", "-o", page, "--json")
    code, _, error = run("inspect", "--model", folder, "--prompt", TEXT, *call)
    assert code == 0, error
    found = re.search(r'id="data">(.*?)</script>', page.read_text(encoding="utf-8"), re.S)
    data = json.loads(found[1])
    [image] = data["images"]
    assert (image["rows"], image["columns"]) == (4, 4)
    assert data["tokens"][image["first"] :][:FEATURES] == ["▪"] * FEATURES
    assert data["tokens"].count("▪") == FEATURES
    with Image.open(io.BytesIO(base64.b64decode(image["src"].split(",")[1]))) as shown:
        assert shown.size == (56, 56)
        drawn = np.array(shown).astype(int)
    with Image.open(picture) as source:  # resized to 56 by 84, its middle cut out
        wanted = np.array(source.resize((84, 56), Image.Resampling.BICUBIC))[:, 14:70].astype(int)
    assert np.abs(drawn - wanted).max() <= 1


def test_a_template_in_a_processors_file_is_read(folder, tmp_path):
    for name in ("tokenizer.json", "config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    template = settings.pop("chat_template")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load_tokenizer(tmp_path).chat_template is None
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert load_tokenizer(tmp_path).chat_template == template
