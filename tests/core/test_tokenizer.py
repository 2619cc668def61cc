"""load_tokenizer: which files it reads, and what it says of damaged ones."""

import json
import logging
import os
import subprocess
import sys

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from kvjax.inputs.tokenizer import load_tokenizer


@pytest.fixture
def folder(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2, "</s>": 3}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def settings(folder, **keys):
    (folder / "tokenizer_config.json").write_text(json.dumps(keys))


def refusal(folder) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        load_tokenizer(folder)
    assert type(caught.value) is ValueError
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_tokenizer_json_alone(folder):
    assert load_tokenizer(folder)("b a c").input_ids == [1, 0, 2]
    assert load_tokenizer(str(folder)).decode([0, 1]) == "a b"


def test_settings_are_read(folder):
    settings(folder, tokenizer_class="PreTrainedTokenizerFast", eos_token="</s>")
    (folder / "chat_template.jinja").write_text("{% for m in messages %}a{% endfor %}")
    tokenizer = load_tokenizer(folder)
    assert tokenizer.eos_token_id == 3
    messages = [{"role": "user", "content": ""}] * 2
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "aa"


def test_falls_back_to_tokenizer_json(folder):
    # A tokenizer that is code in the folder: the code is not run, nor is anyone asked about it.
    settings(folder, auto_map={"AutoTokenizer": ["custom.Custom", None]}, tokenizer_class="Custom")
    (folder / "custom.py").write_text("raise SystemExit('ran')")
    assert load_tokenizer(folder)("b a").input_ids == [1, 0]


def test_none_without_tokenizer_files(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert load_tokenizer(tmp_path) is None


def test_missing_folder(tmp_path):
    message = refusal(tmp_path / "absent")
    assert message == f"directory must be an existing folder, got '{tmp_path / 'absent'}'"


@pytest.mark.parametrize("text", ["{}", "{nope", "", '{"version": "1.0", "model": {"type": "X"}}'])
@pytest.mark.parametrize("configured", [False, True])
def test_damaged_tokenizer_json(folder, text, configured):
    if configured:
        settings(folder, tokenizer_class="PreTrainedTokenizerFast")
    (folder / "tokenizer.json").write_text(text)
    assert refusal(folder).startswith(
        f"{folder / 'tokenizer.json'} is not a valid tokenizer.json ("
    )


def test_damaged_settings(folder):
    (folder / "tokenizer_config.json").write_text("{nope")
    assert refusal(folder).startswith(f"{folder / 'tokenizer_config.json'} is not valid JSON (")


def test_settings_without_a_vocabulary(tmp_path):
    settings(tmp_path, tokenizer_class="LlamaTokenizer")
    (tmp_path / "tokenizer.model").write_bytes(b"\0\1")
    assert refusal(tmp_path).startswith(f"{tmp_path} has no tokenizer.json and cannot be read")


def test_says_nothing_of_torch_and_leaves_no_setting_behind(folder):
    """In a fresh process: the advice is given where transformers is first imported."""
    program = (
        "import os, sys; from kvjax.inputs.tokenizer import load_tokenizer; "
        "assert 'transformers' not in sys.modules; load_tokenizer(sys.argv[1]); "
        "import transformers; print(dict(os.environ).get('TRANSFORMERS_NO_ADVISORY_WARNINGS'), "
        "transformers.logging.get_verbosity())"
    )
    environment = {name: value for name, value in os.environ.items() if "TRANSFORMERS" not in name}
    environment |= {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.split() == ["None", str(logging.WARNING)]
    assert done.stderr == ""
