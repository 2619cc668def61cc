"""Arguments and files as users hand them over: what works, and what is refused in one sentence."""

import codecs
import dataclasses
import inspect
import json
import shutil
from pathlib import Path

import pytest

import kvjax
from kvjax import CompressionConfig, ConfigError
from kvjax.calibrate import calibrate, read_profile
from kvjax.cli.files import read_documents, read_prompts, read_samples, read_text
from kvjax.eval.settings import load_eval_settings
from kvjax.generation.request import Options
from kvjax.inputs.image_processor import ClipImages, load_image_config
from kvjax.inputs.tokenizer import load_tokenizer
from kvjax.models.checkpoints.orbax import CONFIG, load_orbax_config, save_orbax
from kvjax.models.load import load_model, load_model_config
from kvjax.tiny import WEIGHTS

FIXTURES = Path(__file__).parents[1] / "fixtures" / "hf"


@pytest.fixture(scope="module")
def model():
    return load_model(FIXTURES / "llama2-gqa", progress=False)


# --------------------------------------------------------------------------- configs
@pytest.mark.parametrize("config", ["snapkv", None, {"method": "snapkv"}])
@pytest.mark.usefixtures("unchecked")
def test_a_methods_name_is_no_config(model, config):
    """It has no budget; every call that takes a config says what one is."""
    row, message = [5, 6, 7, 8], r"^config=.*expected a CompressionConfig, such as Compress"
    calls = (
        lambda: kvjax.generate(model, row, config, max_new_tokens=1),
        lambda: kvjax.stream(model, row, config, max_new_tokens=1),
        lambda: kvjax.timed_generate(model, row, config, max_new_tokens=1),
        lambda: kvjax.compress_prompt(model, row, config),
        lambda: kvjax.score(model, row, 2, config),
        lambda: calibrate(model, row, config),
        lambda: kvjax.probe_request(config, 16),
    )
    for call in calls:
        with pytest.raises(ConfigError, match=message):
            call()


def test_every_call_takes_the_keywords_of_generate(model):
    """The same names and defaults; what is none of them is refused, not passed over."""
    keywords = inspect.signature(kvjax.generate).parameters
    for field in dataclasses.fields(Options):
        default = keywords[field.name].default
        assert field.default == default or {field.default, default} == {
            dataclasses.MISSING,
            inspect.Parameter.empty,
        }
    own = {"model", "prompts", "config", "return_cache", "mesh"}
    assert {field.name for field in dataclasses.fields(Options)} == set(keywords) - own

    call = {"model": model, "prompts": [5, 6], "max_new_tokens": 1}
    for function in (kvjax.stream, kvjax.timed_generate):
        with pytest.raises(TypeError, match="max_tokens"):
            function(**call, max_tokens=3)
    for wrong in ({"stop": "x"}, {"cache": None}, {"mesh": None}, {"return_cache": True}):
        with pytest.raises(TypeError, match=next(iter(wrong))):
            kvjax.timed_generate(**call, **wrong)


def test_pools_have_peers_spelling():
    config = CompressionConfig.named("snapkv", 8, pooling="avg")
    assert config == CompressionConfig.named("snapkv", 8, pooling="average")
    assert hash(config) == hash(CompressionConfig.named("snapkv", 8, pooling="average"))


@pytest.mark.usefixtures("unchecked")
def test_instructions_in_any_sequence_are_hashable():
    config = CompressionConfig.named("kvzip", 8, repeat=[[5], [6]])
    assert config == CompressionConfig.named("kvzip", 8, repeat=((5,), (6,)))
    hash(config)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("repeat", [[[5]], [5, 6], [[5], [-1]], [["a"], [5]], [[1], [2], [3]], 5])
def test_wrong_instructions_are_named(repeat):
    with pytest.raises(ConfigError, match=r"^repeat=.*expected two sequences of token ids"):
        CompressionConfig.named("kvzip", 8, repeat=repeat)


def test_instructions_outside_the_vocabulary_are_named(model):
    row, config = [5] * 16, CompressionConfig.named("kvzip", 8, repeat=((5,), (80,)))
    for call in (
        lambda: kvjax.generate(model, row, config, max_new_tokens=1),
        lambda: kvjax.compress_prompt(model, row, config),
        lambda: kvjax.score(model, row, 8, config),
    ):
        with pytest.raises(ConfigError, match=r"^repeat=.*expected token ids of 0 to 79, got 80$"):
            call()


def test_ends_outside_the_vocabulary_are_named(model):
    with pytest.raises(ValueError, match=r"^eos_ids has 80, expected token ids of 0 to 79$"):
        kvjax.generate(model, [5], max_new_tokens=1, eos_ids=[7, 80])


# --------------------------------------------------------------------------- byte order marks
def marked(path: Path, text: str) -> Path:
    path.write_bytes(codecs.BOM_UTF8 + text.encode())
    return path


def marked_name(path: Path, text: str) -> str:
    return str(marked(path, text))


def mark_all(folder: Path, *names: str) -> None:
    for name in names:
        marked(folder / name, (folder / name).read_text())


def test_marks_before_users_texts(tmp_path):
    path = tmp_path / "given"
    assert read_text(marked_name(path, "a b")) == "a b"
    assert list(read_prompts(marked_name(path, "5 6\n7")).values()) == [[5, 6], [7]]
    assert list(read_prompts(marked_name(path, "[5, 6]")).values()) == [[5, 6]]
    row = json.dumps({"tokens": [5, 6], "prefix": 1})
    assert list(read_documents(marked_name(path, row)).values()) == [([5, 6], 1)]
    assert list(read_samples(marked_name(path, json.dumps({"prompt": "a"}))).values()) == ["a"]
    assert read_profile(marked(path, "[0.5]")) == (0.5,)
    settings = 'model = "tiny"\ntasks = ["needle"]\nmethods = ["full"]\nbudgets = ["8"]\n'
    assert load_eval_settings(marked(path, settings)).model == "tiny"


def test_marks_before_a_checkpoints_files(tmp_path, model):
    folder = tmp_path / "model"
    shutil.copytree(FIXTURES / "llama2-gqa", folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    mark_all(folder, "config.json", "generation_config.json")
    assert load_model_config(folder).eos_token_ids == (7, 9)
    assert load_model_config(folder).num_layers == model.config.num_layers
    save_orbax(model, tmp_path / "orbax")
    mark_all(tmp_path / "orbax", CONFIG)
    assert load_orbax_config(tmp_path / "orbax") == model.config
    name = "preprocessor_config.json"
    marked(tmp_path / name, '{"image_processor_type": "CLIPImageProcessor"}')
    assert isinstance(load_image_config(tmp_path), ClipImages)


def test_marks_before_a_tokenizers_files(tmp_path):
    """With its chat template and its roles, which tokenizer.json alone does not have."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(WEIGHTS / name, tmp_path)
    marked(tmp_path / "chat_template.jinja", "{{ messages[0].content }}!")
    mark_all(tmp_path, "tokenizer.json", "tokenizer_config.json")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer("note")["input_ids"] == load_tokenizer(WEIGHTS)("note")["input_ids"]
    assert tokenizer.eos_token == "</s>"
    turn = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(turn, tokenize=False) == "hi!"
