"""ModelConfig: what it reads from config.json, and the message of every refusal."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import transformers

from kvjax.models.config import ModelConfig, load_config
from kvjax.models.rope_scaling import DynamicNtk, RopeScaling, Yarn, scaling_of

FIXTURES = sorted(Path(__file__).parents[1].glob("fixtures/hf/*/config.json"))

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
ORIGINAL = "original_max_position_embeddings"
FULL, SLIDING = "full_attention", "sliding_attention"
SLIDING_ON = {"sliding_window": 8, "use_sliding_window": True}
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
NAMES = {family: f"{family.capitalize()}ForCausalLM" for family in FAMILIES}


def mapping(family: str = "llama", *, without: tuple[str, ...] = (), **changes) -> dict:
    merged = LLAMA | {"model_type": family, "architectures": [NAMES[family]]} | changes
    return {key: value for key, value in merged.items() if key not in without}


def write(folder: Path, name: str = "config.json", **keys) -> Path:
    (folder / name).write_text(json.dumps(keys))
    return folder


def refusal(call, *args, **kwargs) -> str:
    """The message of the ValueError that a call ends in: one line, whatever it says."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        call(*args, **kwargs)
    assert type(caught.value) is ValueError
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_llama():
    assert ModelConfig.from_hf(LLAMA) == ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=100,
        hidden_size=32,
        intermediate_size=48,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling=None,
        max_position_embeddings=512,
        sliding_windows=(None,) * 4,
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        qk_norm=False,
        tie_word_embeddings=False,
        hidden_act="silu",
        bos_token_id=1,
        eos_token_ids=(2,),
    )


def test_is_frozen_hashable_and_groups_heads():
    config = ModelConfig.from_hf(LLAMA)
    assert config.group_size == 2
    assert hash(config) == hash(ModelConfig.from_hf(dict(LLAMA)))
    assert hash(ModelConfig.from_hf(mapping(rope_scaling=LLAMA3_ROPE))) != hash(config)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.vocab_size = 7


@pytest.mark.parametrize("family", NAMES)
def test_missing_keys_have_the_defaults_of_transformers(family):
    theirs = transformers.CONFIG_MAPPING[family]()
    ours = ModelConfig.from_hf({"model_type": family})
    eos = () if theirs.eos_token_id is None else (theirs.eos_token_id,)
    window = getattr(theirs, "sliding_window", None)
    assert ours == ModelConfig(
        architecture=NAMES[family],
        vocab_size=theirs.vocab_size,
        hidden_size=theirs.hidden_size,
        intermediate_size=theirs.intermediate_size,
        num_layers=theirs.num_hidden_layers,
        num_heads=theirs.num_attention_heads,
        num_kv_heads=theirs.num_key_value_heads,
        head_dim=getattr(theirs, "head_dim", theirs.hidden_size // theirs.num_attention_heads),
        rms_norm_eps=theirs.rms_norm_eps,
        rope_theta=theirs.rope_parameters["rope_theta"],
        max_position_embeddings=theirs.max_position_embeddings,
        sliding_windows=(window,) * theirs.num_hidden_layers,
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        tie_word_embeddings=theirs.tie_word_embeddings,
        bos_token_id=theirs.bos_token_id,
        eos_token_ids=eos,
    )
    assert ModelConfig.from_hf(theirs.to_dict() | {"architectures": [NAMES[family]]}) == ours


def test_heads_that_older_files_leave_out():
    older = mapping(without=("num_key_value_heads", "head_dim"))
    assert ModelConfig.from_hf(older).num_kv_heads == 4
    assert ModelConfig.from_hf(older | {"num_key_value_heads": None}).num_kv_heads == 4
    assert ModelConfig.from_hf(older | {"head_dim": None}).head_dim == 8
    assert ModelConfig.from_hf(older | {"head_dim": 20}).head_dim == 20
    assert ModelConfig.from_hf(mapping("qwen3")).head_dim == 128  # Qwen3Config's own default


def test_family_from_model_type_where_architectures_is_missing():
    for family, name in NAMES.items():
        assert ModelConfig.from_hf(mapping(family, without=("architectures",))).architecture == name
        assert ModelConfig.from_hf(mapping(family, architectures=None)).architecture == name
        assert ModelConfig.from_hf(mapping(family, without=("model_type",))).architecture == name


@pytest.mark.parametrize(
    ("family", "attention_bias", "qkv_bias", "o_bias"),
    [
        ("llama", False, False, False),
        ("llama", True, True, True),
        ("mistral", True, False, False),
        ("qwen2", False, True, False),
        ("qwen3", False, False, False),
        ("qwen3", True, True, True),
    ],
)
def test_biases(family, attention_bias, qkv_bias, o_bias):
    config = ModelConfig.from_hf(mapping(family, attention_bias=attention_bias, mlp_bias=True))
    assert (config.qkv_bias, config.o_bias) == (qkv_bias, o_bias)
    assert config.mlp_bias == (family == "llama")
    assert config.qk_norm == (family == "qwen3")


def test_tied_embeddings_and_end_of_sequence_ids():
    assert ModelConfig.from_hf(mapping(tie_word_embeddings=True)).tie_word_embeddings
    several = ModelConfig.from_hf(mapping(eos_token_id=[5, 6], bos_token_id=None))
    assert (several.bos_token_id, several.eos_token_ids) == (None, (5, 6))
    assert ModelConfig.from_hf(mapping(eos_token_id=None)).eos_token_ids == ()


@pytest.mark.parametrize(
    ("family", "changes", "windows"),
    [
        ("llama", {"sliding_window": 8}, (None,) * 4),
        ("mistral", {"sliding_window": None}, (None,) * 4),
        ("mistral", {"sliding_window": 8}, (8,) * 4),
        ("mistral", {"sliding_window": 8, "layer_types": [SLIDING] * 4}, (8,) * 4),
        ("mistral", {}, (4096,) * 4),
        ("qwen2", {"sliding_window": 8}, (None,) * 4),
        ("qwen2", {"sliding_window": 8, "use_sliding_window": False}, (None,) * 4),
        ("qwen2", SLIDING_ON, (None,) * 4),  # max_window_layers is 28
        ("qwen2", SLIDING_ON | {"max_window_layers": 3}, (None, None, None, 8)),
        ("qwen3", SLIDING_ON | {"max_window_layers": 0}, (8,) * 4),
        ("qwen3", SLIDING_ON | {"layer_types": [FULL, SLIDING] * 2}, (None, 8, None, 8)),
        ("qwen2", {"sliding_window": None, "use_sliding_window": True}, (None,) * 4),
    ],
)
def test_sliding_windows(family, changes, windows):
    config = ModelConfig.from_hf(mapping(family, **changes))
    assert config.sliding_windows == windows
    if "layer_types" not in changes and family != "llama":
        theirs = transformers.CONFIG_MAPPING[family](num_hidden_layers=4, **changes)
        kinds = getattr(theirs, "layer_types", ["sliding_attention"] * 4)
        sliding = [kind == "sliding_attention" and theirs.sliding_window for kind in kinds]
        assert windows == tuple(window or None for window in sliding)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": LLAMA3_ROPE},
        {"rope_scaling": LLAMA3_ROPE | {"type": "default"}},  # rope_type is the newer key
        {"rope_scaling": {"type": "llama3"} | {k: LLAMA3_ROPE[k] for k in list(LLAMA3_ROPE)[1:]}},
        {"rope_parameters": LLAMA3_ROPE | {"rope_theta": 500000.0}, "rope_theta": 7.0},
        {"rope_parameters": LLAMA3_ROPE},
        {"rope_parameters": {"full_attention": LLAMA3_ROPE}},
        {"rope_parameters": {"full_attention": LLAMA3_ROPE, "sliding_attention": LLAMA3_ROPE}},
    ],
)
def test_llama3_rope_in_every_spelling(changes):
    config = ModelConfig.from_hf(mapping(**changes))
    assert config.rope_theta == 500000.0
    assert config.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    assert config.max_position_embeddings == 512


def test_other_rope_kinds():
    linear = ModelConfig.from_hf(mapping(rope_scaling={"type": "linear", "factor": 4}))
    assert linear.rope_scaling == RopeScaling("linear", 4.0)
    assert linear.max_position_embeddings == 4 * 512  # llama3's states the whole length
    halves = ModelConfig.from_hf(mapping(rope_scaling={"type": "linear", "factor": 2.5}))
    assert halves.max_position_embeddings == 1280
    for plain in (None, {}, {"rope_type": "default"}, {"type": "default"}, {"rope_theta": 500000}):
        config = ModelConfig.from_hf(mapping(rope_scaling=plain, partial_rotary_factor=1.0))
        assert (config.rope_theta, config.rope_scaling) == (500000.0, None)
    newer = mapping(
        rope_parameters={"rope_theta": 77, "rope_type": "default"}, without=("rope_theta",)
    )
    assert ModelConfig.from_hf(newer).rope_theta == 77.0
    assert ModelConfig.from_hf(mapping(without=("rope_theta",))).rope_theta == 10000.0


def test_llama3_original_length_falls_back_as_in_transformers():
    short = {key: LLAMA3_ROPE[key] for key in list(LLAMA3_ROPE)[:-1]}
    config = ModelConfig.from_hf(mapping(rope_scaling=short))
    assert config.rope_scaling.original_max_position_embeddings == 512
    config = ModelConfig.from_hf(mapping(rope_scaling=short, original_max_position_embeddings=64))
    assert config.rope_scaling.original_max_position_embeddings == 64


def scaled(**changes):
    """The scaling of a config.json, and the context that goes with it."""
    config = ModelConfig.from_hf(mapping(**changes))
    return config.rope_scaling, config.context


LN4 = 1.3862944


@pytest.mark.parametrize(
    ("given", "attention", "context"),
    [
        ({}, 0.1 * LN4 + 1, 2048),  # as Qwen2.5 is told to be changed: the file states 512
        ({ORIGINAL: 128}, 0.1 * LN4 + 1, 512),  # as DeepSeek: the whole length is stated
        ({ORIGINAL: 200}, 0.1 * LN4 + 1, 800),
        ({"attention_factor": 1.25}, 1.25, 2048),
        ({"mscale": 2.0, "mscale_all_dim": 0.5}, (0.2 * LN4 + 1) / (0.05 * LN4 + 1), 2048),
        ({"mscale": 2.0, "mscale_all_dim": 0}, 0.1 * LN4 + 1, 2048),
        ({"mscale": 2.0}, 0.1 * LN4 + 1, 2048),
        ({"factor": 0.5}, 1.0, 512),
        ({"factor": None, ORIGINAL: 128}, 0.1 * LN4 + 1, 512),
    ],
)
def test_yarn(given, attention, context):
    """The attention factor is worked out by hand; what is stated comes before what is inferred."""
    scaling, found = scaled(rope_scaling={"type": "yarn", "factor": 4.0} | given)
    assert found == context
    assert scaling.attention_factor == pytest.approx(attention, rel=1e-6)
    original = given.get(ORIGINAL, 512)
    assert scaling == Yarn(
        factor=given.get("factor") or 4.0,
        original_max_position_embeddings=original,
        attention_factor=scaling.attention_factor,
    )


def test_yarn_with_every_setting():
    given = {"beta_fast": 16, "beta_slow": 2, "truncate": False, "attention_factor": 1}
    scaling, _ = scaled(rope_parameters={"rope_type": "yarn", "factor": 2, ORIGINAL: 64} | given)
    numbers = {"factor": 2.0, "attention_factor": 1.0, "beta_fast": 16.0, "beta_slow": 2.0}
    assert scaling == Yarn(**numbers, truncate=False, original_max_position_embeddings=64)
    nulls = dict.fromkeys(("beta_fast", "beta_slow", "attention_factor", "mscale"))
    again, _ = scaled(rope_scaling={"type": "yarn", "factor": 4.0} | nulls)
    assert again == scaled(rope_scaling={"type": "yarn", "factor": 4.0})[0]


def test_dynamic():
    """Its original length is the one stated, as in transformers, whatever else the file names."""
    for extra in ({}, {ORIGINAL: 64}):
        scaling, context = scaled(rope_scaling={"type": "dynamic", "factor": 2.5} | extra)
        assert scaling == DynamicNtk(factor=2.5, original_max_position_embeddings=512)
        assert context == 1280


SETS = {"short_factor": [1, 1.5, 2, 3], "long_factor": [2, 3, 4, 5.5]}


# sqrt(1 + ln 4 / ln 128); a factor that is stated, of 2, comes before 512 / 128.
@pytest.mark.parametrize(
    ("given", "original", "attention", "context"),
    [
        ({ORIGINAL: 128}, 128, 1.1338934, 512),
        ({ORIGINAL: 128, "factor": 2.0}, 128, 1.0690450, 512),
        ({ORIGINAL: 128, "factor": 8.0}, 128, 1.1952286, 1024),
        ({ORIGINAL: 128, "attention_factor": 1.5}, 128, 1.5, 512),
        ({}, 512, 1.0, 512),
    ],
)
def test_longrope(given, original, attention, context):
    scaling, found = scaled(rope_scaling={"type": "longrope"} | SETS | given)
    assert found == context
    assert scaling.attention_factor == pytest.approx(attention, rel=1e-6)
    assert (scaling.short_factor, scaling.long_factor) == ((1, 1.5, 2, 3), (2, 3, 4, 5.5))
    assert scaling.original_max_position_embeddings == original
    # Phi-3 has the original length beside the scaling, which comes first.
    beside = {ORIGINAL: original, "rope_scaling": {"type": "longrope"} | SETS | given}
    assert scaled(**beside)[0] == scaling


@pytest.mark.parametrize(
    "given",
    [
        {"type": "linear", "factor": 2.0},
        {"type": "yarn", "factor": 4.0},
        {"type": "dynamic", "factor": 4.0},
        {"type": "longrope", ORIGINAL: 128} | SETS,
    ],
)
def test_scalings_can_be_hashed_written_and_read(given):
    config = ModelConfig.from_hf(mapping(rope_scaling=given))
    assert hash(config) != hash(ModelConfig.from_hf(LLAMA))
    fields = json.loads(json.dumps(dataclasses.asdict(config.rope_scaling)))
    assert scaling_of(fields) == config.rope_scaling
    assert config.rope_by_length == (given["type"] in ("dynamic", "longrope"))


SIZES = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
    "num_key_value_heads head_dim max_position_embeddings"
)
NUMBERS = [(key, value) for key in SIZES.split() for value in (0, -3, 2.0, "8", True, [4])] + [
    (key, value) for key in ("rms_norm_eps", "rope_theta") for value in (0, -1.0, "1e-5", True)
]


@pytest.mark.parametrize(("key", "value"), [*NUMBERS, ("rms_norm_eps", float("nan"))])
def test_every_number_is_checked_under_its_key(key, value):
    message = refusal(ModelConfig.from_hf, mapping(**{key: value}))
    assert re.match(rf"{key} must be a positive .*, got {re.escape(repr(value))}$", message)


YARN = {"type": "yarn", "factor": 2.0}
REFUSED = [
    ({"hidden_act": "gelu"}, "hidden_act must be 'silu', got 'gelu'"),
    ({"hidden_act": None}, "hidden_act must be 'silu', got None"),
    ({"attention_bias": "no"}, "attention_bias must be true or false, got 'no'"),
    ({"mlp_bias": 1}, "mlp_bias must be true or false, got 1"),
    ({"tie_word_embeddings": None}, "tie_word_embeddings must be true or false, got None"),
    ({"bos_token_id": "<s>"}, "bos_token_id must be a token id (an integer >= 0), got '<s>'"),
    ({"eos_token_id": [2, -1]}, "eos_token_id must be a token id (an integer >= 0), got -1"),
    ({"eos_token_id": 2.0}, "eos_token_id must be a token id (an integer >= 0), got 2.0"),
    ({"num_key_value_heads": 3}, "num_heads (num_attention_heads) must be a multiple"),
    ({"num_attention_heads": 3}, "hidden_size must be a multiple of num_attention_heads = 3"),
    ({"head_dim": 7}, "head_dim must be even, got 7"),
    ({"architectures": ["GPT2LMHeadModel"]}, "architectures must be a list of one of LlamaFor"),
    ({"architectures": []}, "architectures must be a list of one of LlamaForCausalLM, Mistral"),
    ({"architectures": [["x"]]}, "architectures must be a list of one of LlamaForCausalLM"),
    ({"model_type": "mixtral"}, "model_type must be 'llama' (architectures is ['LlamaForCausal"),
    ({"model_type": "gemma", "architectures": None}, "model_type must be one of llama, mistral"),
    ({"model_type": None, "architectures": None}, "model_type must be one of llama, mistral"),
    ({"quantization_config": {"bits": 4}}, "quantization_config must be absent"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1, got 0.5"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor must be 1, got"),
    ({"rope_scaling": "linear"}, "rope_scaling must be an object or null, got 'linear'"),
    ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor must be a positive finite"),
    ({"rope_scaling": LLAMA3_ROPE | {"low_freq_factor": 4.0}}, "high_freq_factor must be more"),
    ({"rope_scaling": LLAMA3_ROPE | {ORIGINAL: 0}}, f"{ORIGINAL} must be a positive integer"),
    ({"rope_scaling": {"type": "yarn"}}, "rope_scaling.factor must be a positive finite"),
    (
        {"rope_scaling": YARN | {"beta_fast": 0.5}},
        "beta_fast must be at least beta_slow =",
    ),
    (
        {"rope_scaling": YARN | {"truncate": 1}},
        "rope_scaling.truncate must be true or",
    ),
    ({"rope_scaling": YARN | {"mscale": -1}}, "rope_scaling.mscale must be a positive finite"),
    ({"rope_scaling": YARN | {ORIGINAL: 1.5}}, f"{ORIGINAL} must be a positive integer, got 1.5"),
    ({"rope_scaling": {"type": "dynamic"}}, "rope_scaling.factor must be a positive finite"),
    (
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "head_dim": 2},
        "head_dim must be more than 2 (rope_type is 'dynamic'), got 2",
    ),
    ({"rope_scaling": {"type": "longrope"}}, "rope_scaling.short_factor must be a list of numbers"),
    (
        {"rope_scaling": {"type": "longrope", "short_factor": [1, 2], "long_factor": [1, 2]}},
        "short_factor must be a list of head_dim / 2 = 4 numbers, got (1.0, 2.0)",
    ),
    (
        {"rope_scaling": {"type": "longrope", "short_factor": [1, 2], "long_factor": [1]}},
        "long_factor must be as long as short_factor (2), got (1.0,)",
    ),
    ({"rope_parameters": {FULL: {"rope_theta": 1e6}, SLIDING: {}}}, "rope_parameters must be the"),
]
REFUSED_WINDOWS = [
    ("mistral", {"sliding_window": 0}, "sliding_window must be a positive integer, got 0"),
    ("mistral", {"layer_types": [FULL, SLIDING] * 2}, "layer_types must be 'sliding_attention' in"),
    ("qwen2", {"use_sliding_window": 1}, "use_sliding_window must be true or false, got 1"),
    ("qwen2", {"max_window_layers": -1}, "max_window_layers must be an integer >= 0, got -1"),
    ("qwen2", {"layer_types": [FULL]}, "layer_types must be a list of 4 names, one a layer, got"),
    ("qwen3", {"layer_types": ["chunked"] * 4}, "layer_types must be 'full_attention' or"),
    ("qwen3", {"layer_types": [SLIDING] * 4}, "sliding_window must be a positive integer, and ena"),
]


@pytest.mark.parametrize(
    ("family", "changes", "message"), [*(("llama", *case) for case in REFUSED), *REFUSED_WINDOWS]
)
def test_refusals_name_the_key_its_value_and_what_is_expected(family, changes, message):
    refused = refusal(ModelConfig.from_hf, mapping(family, **changes))
    assert refused.startswith(message)
    assert ", got " in refused


@pytest.mark.parametrize("kind", ["su", "mrope", "proportional"])
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_rope_scalings_that_are_not_implemented(kind, key):
    message = refusal(ModelConfig.from_hf, mapping(**{key: {"rope_type": kind, "factor": 2.0}}))
    known = "'default', 'linear', 'llama3', 'yarn', 'dynamic' or 'longrope'"
    assert message == f"{key}.rope_type must be {known}, got {kind!r}"


def test_long_values_are_cut_in_messages():
    message = refusal(ModelConfig.from_hf, mapping("qwen2", layer_types=["full_attention"] * 500))
    assert len(message) < 400
    assert message.endswith("...")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("architecture", "Llama", "architecture must be one of LlamaForCausalLM, Mistral"),
        ("num_layers", 0, "num_layers must be a positive integer, got 0"),
        ("num_kv_heads", 3, "num_heads (num_attention_heads) must be a multiple of num_kv_heads"),
        ("head_dim", 9, "head_dim must be even, got 9"),
        ("rope_theta", -1.0, "rope_theta must be a positive finite number, got -1.0"),
        ("hidden_act", "relu", "hidden_act must be 'silu', got 'relu'"),
        ("eos_token_ids", (-1,), "eos_token_ids must be a token id (an integer >= 0), got -1"),
        ("bos_token_id", -1, "bos_token_id must be a token id (an integer >= 0), got -1"),
        ("sliding_windows", (4,), "sliding_windows must be one entry for each of the 4 layers"),
        ("sliding_windows", (0,) * 4, "sliding_windows must be a positive integer, got 0"),
    ],
)
def test_direct_construction_is_checked_too(field, value, message):
    config = ModelConfig.from_hf(LLAMA)
    assert refusal(dataclasses.replace, config, **{field: value}).startswith(message)


def test_rope_scaling_is_checked():
    assert refusal(RopeScaling, "linear", -2.0).startswith("factor must be a positive")
    assert refusal(RopeScaling, "llama3", 2.0, 4.0, 1.0).startswith("high_freq_factor must be more")


def test_load_config(tmp_path):
    assert load_config(write(tmp_path, **LLAMA)) == ModelConfig.from_hf(LLAMA)
    assert load_config(str(tmp_path)) == ModelConfig.from_hf(LLAMA)


def test_generation_config_takes_precedence_where_it_says_something(tmp_path):
    write(tmp_path, **LLAMA)
    write(tmp_path, "generation_config.json", bos_token_id=7, eos_token_id=[8, 9, 10])
    assert load_config(tmp_path).eos_token_ids == (8, 9, 10)
    assert load_config(tmp_path).bos_token_id == 7
    write(tmp_path, "generation_config.json", bos_token_id=None, temperature=0.6)
    assert load_config(tmp_path) == ModelConfig.from_hf(LLAMA)


def test_what_a_checkpoint_says_of_sampling_is_kept(tmp_path):
    write(tmp_path, **LLAMA)
    assert load_config(tmp_path).stated_sampling == ()
    neutral = {"top_p": 1.0, "min_p": None, "num_beams": 1, "bad_words_ids": [], "max_length": 9}
    said = {"temperature": 0.6, "do_sample": True, "suppress_tokens": [3, 4]}
    write(tmp_path, "generation_config.json", **neutral, **said)
    config = load_config(tmp_path)
    expected = (("do_sample", True), ("temperature", 0.6), ("suppress_tokens", "[3, 4]"))
    assert config.stated_sampling == expected


def test_neither_limit_nor_suggestion_is_part_of_what_a_model_is(tmp_path):
    """A cache's origin goes by `repr`, compiled programs by equality and hash."""
    plain = ModelConfig.from_hf(LLAMA)
    other = dataclasses.replace(plain, max_context=64, stated_sampling=(("top_k", 5),))
    assert (repr(other), other, hash(other)) == (repr(plain), plain, hash(plain))
    assert (plain.context, other.context) == (512, 64)
    refused = refusal(dataclasses.replace, plain, max_context=0)
    assert refused == "max_context must be a positive integer, got 0"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.json", None, "cannot be read (No such file or directory)"),
        ("config.json", "{nope", "not valid JSON ("),
        ("config.json", b"\xff\xfe{}", "not valid JSON ("),
        ("config.json", "[1, 2]", "the file must be a JSON object, got [1, 2]"),
        ("config.json", "{}", "model_type must be one of"),
        ("config.json", '{"model_type": "llama"}', "vocab_size is missing, expected a positive"),
        ("config.json", json.dumps(LLAMA | {"hidden_size": 0}), "hidden_size must be"),
        ("generation_config.json", "{nope", "not valid JSON ("),
        ("generation_config.json", '{"eos_token_id": "</s>"}', "eos_token_id must be a token id"),
    ],
)
def test_load_config_names_the_file(tmp_path, name, text, message):
    write(tmp_path, **LLAMA)
    if text is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    assert refusal(load_config, tmp_path).startswith(f"{tmp_path / name}: {message}")


@pytest.mark.parametrize("key", SIZES.split()[:5])
def test_a_size_missing_from_the_file_is_not_guessed(tmp_path, key):
    write(tmp_path, **mapping(without=(key,)))
    assert refusal(load_config, tmp_path).endswith(f"{key} is missing, expected a positive integer")


def test_not_a_directory(tmp_path):
    for path in (tmp_path / "absent", write(tmp_path, **LLAMA) / "config.json"):
        assert str(path) in refusal(load_config, path)


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.parent.name)
def test_fixtures_written_by_transformers(path):
    config = load_config(path.parent)
    theirs = transformers.AutoConfig.from_pretrained(path.parent)
    assert config.architecture in theirs.architectures
    assert config.rope_theta == theirs.rope_parameters["rope_theta"]
    kind = config.rope_scaling.kind if config.rope_scaling else "default"
    assert kind == theirs.rope_parameters["rope_type"]
    assert config.num_kv_heads == theirs.num_key_value_heads
    assert config.tie_word_embeddings == theirs.tie_word_embeddings
    if theirs.model_type != "llama":
        kinds = getattr(theirs, "layer_types", ["sliding_attention"] * config.num_layers)
        assert config.sliding_windows == tuple(
            theirs.sliding_window if kind == "sliding_attention" else None for kind in kinds
        )


def test_there_are_fixtures():
    assert len(FIXTURES) >= 9
