"""Methods as they are typed, for benchmarks, plans and evaluations alike."""

import json

import pytest

from kvjax import CompressionConfig, ConfigError
from kvjax.bench.report import Settings
from kvjax.eval.settings import EvalSettings
from kvjax.plan.table import PlanSettings
from kvjax.spelling import parse_method, parse_methods, spelled

named = CompressionConfig.named
TYPED = {
    "snapkv": named("snapkv", 64),
    "full": named("full"),
    "ada-snapkv/packed": named("ada-snapkv", 64, layout="packed"),
    "ada-snapkv/packed/int8": named("ada-snapkv", 64, layout="packed", quantize="int8"),
    "snapkv:window=16,kernel=5": named("snapkv", 64, window=16, kernel=5),
    "snapkv/padded:floor=0.5,pooling=none": named(
        "snapkv", 64, layout="padded", floor=0.5, pooling="none"
    ),
}


@pytest.mark.parametrize(("text", "config"), TYPED.items())
def test_a_method_is_read_alike_everywhere(text, config):
    assert parse_method(text, 64) == config
    bench = Settings(model="1m", batches=(1,), prompt=128, new=4, budget=64, methods=(text,))
    assert bench.configs()[1] == config
    plan = PlanSettings(
        models=("1m",),
        topologies=("h200",),
        methods=(text,),
        prompt=128,
        new_tokens=4,
        budget="64",
    )
    assert plan.asks()[0].compression == config
    settings = EvalSettings(model="tiny", tasks=("needle",), methods=(text,), budgets=("64",))
    assert [*settings.configs().values()] == [config]


def test_a_list_of_them():
    assert parse_methods(",".join(TYPED)) == tuple(TYPED)
    assert parse_methods("full,,snapkv:window=8,kernel=3,h2o,") == (
        "full", "snapkv:window=8,kernel=3", "h2o",
    )  # fmt: skip


def test_settings_of_all_give_way_to_a_methods_own():
    found = parse_method("snapkv/padded:window=8", 64, window=4, layout="packed", kernel=3)
    assert found == named("snapkv", 64, layout="padded", window=8, kernel=3)


def test_a_profile_of_the_budget(tmp_path):
    (tmp_path / "profile_0.8.json").write_text(json.dumps([0.9, 0.7]))
    text = f"prefixkv:profile={tmp_path}/profile_{{evicted}}.json"
    assert parse_method(text, 0.2).profile == pytest.approx((0.1, 0.3))
    with pytest.raises(ConfigError, match="needs budgets in per cent, got 64"):
        parse_method(text, 64)


def test_a_layout_and_int8_are_spelled_as_they_are_read():
    for text in ("snapkv", "snapkv/padded", "ada-snapkv/packed/int8"):
        assert spelled(parse_method(text, 64)) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nope", "method='nope', expected one of"),
        ("snapkv/tiled", "layout='tiled', expected one of"),
        ("snapkv/packed/int8/more", "method='snapkv/packed/int8/more', expected METHOD"),
        ("snapkv:window", "has 'window', expected NAME=VALUE of a setting"),
        ("snapkv:layout=packed", "has 'layout=packed', expected NAME=VALUE of a setting"),
        ("snapkv:budget=3", "has 'budget=3', expected NAME=VALUE of a setting"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_a_wrong_spelling_is_named(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_method(text, 64)
