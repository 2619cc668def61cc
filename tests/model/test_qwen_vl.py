"""Qwen2.5-VL: logits equal Hugging Face's, and images go the whole way (fixtures/README.md)."""

import dataclasses
import json
import re
import shutil
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from vision_model import forced

import kvjax
from kvjax.inputs.images import qwen_patches
from kvjax.inputs.multimodal import by_prompt, prepare_inputs, with_placeholders
from kvjax.inputs.prompts import pad
from kvjax.models.load import load_model
from kvjax.models.vision.qwen_vl import load_qwen_config

FIXTURES = Path(__file__).parents[1] / "fixtures" / "vl"
TOLERANCE = 1e-4  # the fixtures' own cached and uncached passes differ by up to 1e-5
START, IMAGE = 96, 98  # the fixtures' tokens before an image and of its features
ROWS, WIDTH, PATCHES, STEPS = 3, 64, 240, 8  # one shape for every set of prompts
FULL = kvjax.CompressionConfig.named("full")


@pytest.fixture(scope="module", params=["qwen25vl", "qwen25vl-new"])
def case(request):
    folder = FIXTURES / request.param
    return load_model(folder, progress=False), np.load(folder / "expected.npz")


@pytest.fixture(scope="module")
def model():
    return load_model(FIXTURES / "qwen25vl", progress=False)


@pytest.fixture(scope="module")
def expected():
    return np.load(FIXTURES / "qwen25vl" / "expected.npz")


def rows_of(expected, name):
    """Rows without padding, one token an image, and every row's images."""
    left = iter([expected[f"image_{index}"] for index in range(3)])
    rows, images = [], []
    masked = zip(expected[f"{name}_tokens"], expected[f"{name}_mask"], strict=True)
    for (tokens, mask), count in zip(masked, expected[f"{name}_images"], strict=True):
        real = tokens[mask > 0]
        first = np.insert(real[:-1], 0, -1) == START
        rows.append(real[(real != IMAGE) | first].tolist())
        images.append([next(left) for _ in range(count)])
    return rows, images


def padded(model, expected, name):
    """Tokens, lengths and images of a set of prompts, of one shape whichever set it is.

    A single prompt stands in every row.
    """
    rows, images = rows_of(expected, name)
    inputs = prepare_inputs(model, rows, by_prompt(images, rows, model))
    every = [image for row in images for image in row]
    laid_out = model.lay_out(*qwen_patches(every, model.image_config), total=PATCHES)
    tokens, lengths = pad(inputs.rows, WIDTH)
    seen = dataclasses.replace(inputs, pixels=laid_out).images(tokens)
    tokens, lengths, places, rotary = jax.tree.map(
        lambda x: np.repeat(x, ROWS // len(rows), axis=0),
        (tokens, lengths, seen.places, seen.rotary),
    )
    return tokens, lengths, seen.replace(places=places, rotary=rotary)


@pytest.mark.parametrize("name", ["one", "two", "batch"])
def test_logits_are_hugging_faces(case, name):
    model, expected = case
    tokens, lengths, images = padded(model, expected, name)
    rows = len(expected[f"{name}_tokens"])
    steps = np.repeat(expected[f"{name}_step_tokens"], ROWS // rows, axis=1)
    held = forced(model, tokens, lengths, images, steps)
    prompt, last, later = map(np.asarray, held)
    real = np.concatenate([prompt[row, : lengths[row]] for row in range(rows)])
    np.testing.assert_allclose(real, expected[f"{name}_logits"], atol=TOLERANCE, rtol=0)
    ends = np.cumsum(lengths[:rows]) - 1
    close = partial(np.testing.assert_allclose, atol=TOLERANCE, rtol=0)
    close(last[:rows], expected[f"{name}_logits"][ends])
    close(later[:, :rows], expected[f"{name}_step_logits"])


def test_an_answer_is_what_greedy_steps_make(model, expected):
    """`generate` through the whole engine: a batch of rows with one, no and two images."""
    rows, images = rows_of(expected, "batch")
    out = kvjax.generate(model, rows, images=images, max_new_tokens=4, eos_ids=())
    drawn = np.asarray(out.tokens).T
    steps = np.pad(drawn, [(0, STEPS - len(drawn)), (0, 0)])
    _, last, later = forced(model, *padded(model, expected, "batch"), steps)
    np.testing.assert_array_equal(np.asarray(last).argmax(-1), drawn[0])
    np.testing.assert_array_equal(np.asarray(later)[:3].argmax(-1), drawn[1:])


def test_a_compressed_answer(model, expected):
    """KVzip repeats the prompt, features and all; the first token comes from the whole of it."""
    rows, images = rows_of(expected, "two")
    config = kvjax.CompressionConfig.named("ada-kvzip", budget=24)
    out = kvjax.generate(model, rows, config, images=images, max_new_tokens=3, eos_ids=())
    assert int(np.asarray(out.kept).sum()) == 24 * 2 * 2  # layers, KV heads
    assert int(out.tokens[0][0]) == expected["two_logits"][-1].argmax()


def test_a_cache_goes_on_at_the_shifted_positions(model, expected):
    """A document with two images is asked what transformers was fed after it."""
    rows, images = rows_of(expected, "two")
    cache = kvjax.compress_prompt(model, rows, FULL, images=images)
    np.testing.assert_array_equal(cache.next_positions, expected["two_mask"].sum(-1))
    np.testing.assert_array_equal(cache.rotary_shift, expected["two_shift"])
    question = expected["two_step_tokens"].T.tolist()
    out = kvjax.generate(model, question, cache=cache, max_new_tokens=1, eos_ids=())
    logits = jax.nn.log_softmax(expected["two_step_logits"][-1, 0])
    assert int(out.tokens[0][0]) == logits.argmax()
    np.testing.assert_allclose(out.log_probs[0][0], logits.max(), atol=TOLERANCE)


def test_score_sees_images(model, expected):
    """NLL of what follows an image, from transformers' logits."""
    [row], images = rows_of(expected, "one")
    prefix = row.index(IMAGE) + 2
    [scored] = kvjax.score(model, row, prefix, images=images)
    rest = row[prefix:]
    logits = expected["one_logits"][-len(rest) - 1 : -1]
    log_probs = np.asarray(jax.nn.log_softmax(logits))
    np.testing.assert_allclose(
        scored.nll, -log_probs[np.arange(len(rest)), rest], atol=TOLERANCE, rtol=0
    )
    assert scored.top1 == logits.argmax(-1).tolist()


# ---------------------------------------------------------------------------- the command
@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The checkpoint with a tokenizer whose words are w0 to w95, and its first image."""
    folder = tmp_path_factory.mktemp("qwen") / "model"
    shutil.copytree(FIXTURES / "qwen25vl", folder)
    marks = {START: "<start>", START + 1: "<end>", IMAGE: "<image>", IMAGE + 1: "<video>"}
    tokenizer = Tokenizer(WordLevel({marks.get(i, f"w{i}"): i for i in range(100)}, "w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in marks.values()])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}  # by its type it would be Qwen2's
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    picture = np.load(folder / "expected.npz")["image_0"]
    Image.fromarray(picture).save(folder / "image.png")
    return folder


@pytest.mark.slow
def test_the_command_answers_about_an_image(run, folder, expected):
    """Transformers' likeliest token; where the text names no place, the image is in front.

    Slow: a tower and two answers are compiled.
    """
    [row], _ = rows_of(expected, "one")
    words = [{START: "<start>", START + 1: "<end>", IMAGE: "<image>"}.get(t, f"w{t}") for t in row]
    call = ("generate", "--model", folder, "--image", folder / "image.png", "--json")
    call = (*call, "--ignore-eos", "--max-new-tokens", 2)
    code, out, error = run(*call, "--prompt", " ".join(words))
    assert code == 0, error
    said = json.loads(out)
    assert said["prompt_tokens"] == [expected["one_tokens"].shape[1]]
    assert said["tokens"][0][0] == expected["one_logits"][-1].argmax()
    code, out, error = run(*call, "--prompt", "w5 w6", "--method", "snapkv", "--budget", 12)
    assert code == 0, error
    features = int((expected["one_tokens"] == IMAGE).sum())
    assert json.loads(out)["prompt_tokens"] == [features + 4]


@pytest.mark.slow
def test_the_page_shows_the_patches(run, folder, expected, tmp_path):
    """Slow: a tower and a compressed prompt are compiled."""
    page = tmp_path / "page.html"
    call = ("--image", folder / "image.png", "--methods", "snapkv", "--budget", "50%", "-o", page)
    code, _, error = run("inspect", "--model", folder, "--prompt", "w5 w6 w7", *call)
    assert code == 0, error
    found = re.search(r'id="data">(.*?)</script>', page.read_text(encoding="utf-8"), re.S)
    data = json.loads(found[1])
    [image] = data["images"]
    _, rows, columns = expected["grids"][0] // 2  # patches are merged two by two
    assert (image["rows"], image["columns"]) == (rows, columns)
    assert data["tokens"][image["first"] :][: rows * columns] == ["▪"] * (rows * columns)
    assert data["tokens"].count("▪") == rows * columns


class Words:
    """A tokenizer of three words."""

    def convert_ids_to_tokens(self, ids):
        return [{96: "<start>", 97: "<end>", IMAGE: "<image>"}[token] for token in ids]


def test_placeholders_stand_between_their_marks(model):
    text = with_placeholders(model, Words(), "what?", 2)
    assert text == "<start><image><end><start><image><end>what?"
    assert with_placeholders(model, Words(), text, 2) == text


def test_configs_of_both_spellings_agree():
    (old, tower), (new, other) = (
        load_qwen_config(FIXTURES / name) for name in ("qwen25vl", "qwen25vl-new")
    )
    assert old.mrope_section == (1, 2, 3)
    assert dataclasses.replace(new, tie_word_embeddings=False) == old
    assert tower == other
    assert tower.around == (96, 97)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling.rope_type must be"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1, 2]}}, "mrope_section must be"),
        ({"image_token_id": 200}, "image_token_id must be a token of the vocabulary"),
        ({"vision_config": 3}, "vision_config must be an object"),
        ({"quantization_config": {}}, "quantization_config must be absent"),
    ],
)
def test_wrong_configs_are_rejected(keys, message, tmp_path):
    whole = json.loads((FIXTURES / "qwen25vl" / "config.json").read_text()) | keys
    (tmp_path / "config.json").write_text(json.dumps(whole))
    with pytest.raises(ValueError, match=message):
        load_qwen_config(tmp_path)


def test_an_image_processor_of_another_kind_is_rejected(tmp_path):
    shutil.copytree(FIXTURES / "qwen25vl", tmp_path / "mixed")
    settings = FIXTURES / "llava-old" / "preprocessor_config.json"
    shutil.copy(settings, tmp_path / "mixed" / settings.name)
    with pytest.raises(ValueError, match="image_processor_type must be one of Qwen2VL"):
        load_model(tmp_path / "mixed", progress=False)
