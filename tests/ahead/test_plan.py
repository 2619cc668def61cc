"""The plan: bytes from shapes against hand-worked ones, limits, real compilations, the command."""

import dataclasses
import json
import math
from functools import partial
from pathlib import Path

import jax
import pytest
from flax import nnx

from kvjax import METHODS, CompressionConfig, sharding
from kvjax.cache.state import with_room
from kvjax.compile_for import collectives, missing
from kvjax.generation import prefill
from kvjax.kernels.platform import assume
from kvjax.models.config import ModelConfig
from kvjax.models.decoder import Decoder
from kvjax.models.presets import preset
from kvjax.plan import TOPOLOGIES, Ask, held, largest, plan, program
from kvjax.plan.depth import by_depth
from kvjax.plan.program import Compiled
from kvjax.plan.store import Store
from kvjax.plan.table import PlanSettings, markdown, parse_split, read_plan

ROOT = Path(__file__).parents[2]
SMALL = ModelConfig.from_hf(
    {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 512,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "max_position_embeddings": 4096,
    }
)


def ask(method="ada-snapkv", budget=1024, model="llama-3-8b", topology="v5e-8", **settings):
    common = {"data": 1, "parts": 8, "batch": 1, "prompt": 8192, "new_tokens": 128}
    config = model if isinstance(model, ModelConfig) else preset(model, 2**20)
    return Ask(
        name="a model",
        model=config,
        topology=TOPOLOGIES[topology],
        compression=CompressionConfig.named(method, budget),
        **(common | settings),
    )


# ---------------------------------------------------------------------------- bytes by hand
@pytest.mark.smoke
def test_llama_3_8b_on_eight_chips_by_hand():
    """D 4096, F 14336, V 128256, 32 layers; of 8 KV heads one a chip; 2 bytes a number."""
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14_336
    norms = 65 * 4096  # whole on every chip
    weights = 2 * ((2 * 128_256 * 4096 + 32 * layer) // 8 + norms)
    # 1024 entries x 32 layers x 8 heads over 8 chips: 128 keys, 128 values, owner, position.
    pool = 1024 * 32 * (2 * 128 * 2 + 5) + 4 * 32 * 8
    tail = 128 * (32 * 2 * 128 * 2 + 4)
    assert held.held(ask()) == held.Held(weights, pool, tail)
    full = 8192 * 32 * (2 * 128 * 2 + 4)  # and a position for each head's slot
    assert held.held(ask("full")) == held.Held(weights, full, tail)


def test_fewer_kv_heads_than_chips_are_repeated():
    """16 chips and 8 KV heads: two chips have each head's tail, the pool is split over all."""
    sixteen = {"model": "llama-3-70b", "topology": "v5e-256", "data": 16, "parts": 16, "batch": 32}
    found = held.held(ask(**sixteen))
    assert found.pool == 2 * (1024 * 80 * 8 // 16 * (512 + 5) + 4 * 80 * 8)
    assert found.tail == 2 * 128 * (80 * 2 * 128 * 2 + 4)


@pytest.mark.parametrize("method", ["full", "snapkv", "ada-prefixkv", "kvzip", "padded", "int8"])
def test_shapes_say_what_the_stages_make(method):
    """Pool and tail of two rows, two parts of the batch and four of the model."""
    settings = {"padded": {"layout": "padded"}, "int8": {"quantize": "int8"}}.get(method, {})
    name = method if method in METHODS else "ada-snapkv"
    one = ask(model=SMALL, data=2, parts=4, batch=4, prompt=256, new_tokens=20)
    config = CompressionConfig.named(name, None if name == "full" else 64, **settings)
    one = dataclasses.replace(one, compression=config)
    mesh = sharding.abstract(2, 4, 8, 4)
    model = nnx.eval_shape(lambda: Decoder(SMALL, dtype=program.DTYPE, rngs=nnx.Rngs(0)))
    tokens = jax.ShapeDtypeStruct((4, 256), "int32")
    lengths = jax.ShapeDtypeStruct((4,), "int32")

    def made(model, tokens, lengths):
        _, cache = prefill.prefill_compress(model, tokens, lengths, jax.random.key(0), config)
        return with_room(cache, one.tail_slots)

    with sharding.using(mesh), assume("tpu"):
        cache = jax.eval_shape(made, model, tokens, lengths)

    def size(x, axes):
        shape = sharding.named(axes, x.shape, mesh).shard_shape(x.shape)
        return math.prod(shape) * x.dtype.itemsize

    axes = program.cache_axes(cache)
    sizes = jax.tree.map(size, cache, axes)
    found = held.held(one)
    assert sum(jax.tree.leaves((sizes.slots, sizes.layers))) == found.pool
    assert sum(jax.tree.leaves(sizes.tail)) == found.tail + 4  # the cursor


def test_a_step_reads_everything_once_but_the_embeddings():
    step, parts = held.step(ask()), held.held(ask())
    table = 128_256 * 4096 * 2 // 8
    assert step.bytes == parts.weights - table + parts.pool + parts.tail
    assert step.seconds == pytest.approx(step.bytes / 819e9)
    # Packed: all 32 query heads with each of a chip's slots; the tail: its own four.
    pairs = 32 * 1024 * 32 + 4 * 128 * 32
    assert step.flops == parts.weights - table + 4 * 128 * pairs


def test_without_a_compiler_the_row_is_an_estimate():
    row = plan(ask(), None)
    parts = row.held
    assert not row.compiled
    assert row.total == parts.weights + parts.pool + parts.tail + held.prefill_estimate(ask())
    assert "~" in markdown([row])
    assert row.short == 0
    large = plan(ask(model="llama-3-70b"), None)
    assert large.short == large.total - TOPOLOGIES["v5e-8"].room > 0
    assert large.batch.most == 0


# ---------------------------------------------------------------------------- limits
def counted(cost):
    asked = []

    def look(value):
        asked.append(value)
        return cost(value)

    return look, asked


@pytest.mark.parametrize("guess", [1, 99, 100, 101, 130, 1000])
def test_an_affine_cost_is_solved_and_verified(guess):
    """3 + 2 x <= 203.5: x = 100, known from looks at 100 and 101."""
    look, asked = counted(lambda x: 3 + 2 * x)
    found = largest(look, range(1, 1001), 203.5, start=1, guess=guess)
    assert (found.most, found.exact) == (100, True)
    assert {100, 101} <= set(asked)
    assert found.looks == len(asked) == len(set(asked)) <= 4


def test_a_cost_that_bends_is_never_overstated():
    look, asked = counted(lambda x: x + (x // 50) ** 2 * 20)
    found = largest(look, range(1, 500), 400, start=10, guess=300)
    assert len(asked) <= 4
    assert look(found.most) <= 400
    assert found.exact == (look(found.most + 1) > 400)


def test_nothing_fits_or_everything():
    none = largest(lambda x: 10 + x, range(1, 9), 5, start=4, guess=1)
    assert (none.most, none.exact) == (0, True)
    everything = largest(lambda x: x, range(1, 9), 100, start=1, guess=8)
    assert (everything.most, everything.exact) == (8, True)


def test_a_row_asks_at_most_four_times_each_and_once_for_what_it_knows():
    asks = []

    def compiler(one):
        asks.append(one)
        total = held.total_estimate(one) + 10**9 + one.batch * 10**6
        return Compiled(0, 0, 2 * 10**9, total, False, (), ())

    one = ask(batch=4)
    row = plan(one, compiler)
    assert len(asks) == len(set(asks)) == row.batch.looks + row.prompt.looks - 1
    assert max(row.batch.looks, row.prompt.looks) <= 4
    assert row.batch.exact
    room = one.topology.room
    fits = [
        held.total_estimate(dataclasses.replace(one, batch=n)) + 10**9 + n * 10**6 <= room
        for n in (row.batch.most, row.batch.most + 1)
    ]
    assert fits == [True, False]


@pytest.mark.parametrize(("a_layer", "beside"), [(100, 3200), (-100, -600)])
def test_few_layers_stand_for_all(a_layer, beside):
    """All layers' held bytes, and beside them a line in the depth, or the deeper one's."""
    depths = []

    def compiler(one):
        layers, has = one.model.num_layers, held.held(one)
        depths.append(layers)
        step = (("all-gather", 64),) * (3 * layers) + (("all-reduce", 8),)
        temporaries = has.pool + has.tail + a_layer * layers
        total = has.weights + temporaries + 10
        return Compiled(has.weights + 3, 7, temporaries, total, False, ("triton",), step)

    found, has = by_depth(compiler, ask()), held.held(ask())
    assert depths == [2, 6]
    step = (("all-gather", 64),) * 96 + (("all-reduce", 8),)
    temporaries = has.pool + has.tail + beside
    sizes = has.weights + 3, 7, temporaries, has.weights + temporaries + 10
    assert found == Compiled(*sizes, False, ("triton",), step, (2, 6))
    shallow = ask(model=SMALL)  # two layers alone
    assert by_depth(compiler, shallow).layers == ()
    assert depths == [2, 6, 2]
    assert "≈" in markdown([plan(ask(), lambda one: found, limits="none")])


def test_a_deep_model_that_does_not_fit_is_refused():
    def compiler(one):
        has = held.held(one)
        total = has.weights + has.pool + has.tail + one.model.num_layers * 2**30
        return Compiled(0, 0, 0, total, False, (), ())

    row, has = plan(ask(), partial(by_depth, compiler), limits="none"), held.held(ask())
    total = has.weights + has.pool + has.tail + 32 * 2**30
    assert row.short == total - row.ask.topology.room


@pytest.mark.parametrize(("topology", "fits"), [("v5e-8", True), ("h200", False)])
def test_what_a_tpus_compiler_takes_fits(topology, fits):
    """The parts of `memory_analysis()` sum to more than a TPU's program needs at once."""
    one = ask(topology=topology, parts=1)

    def compiler(one):
        return Compiled(0, 0, 0, one.topology.room + 2**30, False, (), ())

    row = plan(one, compiler, limits="fit")
    assert row.short == (0 if fits else 2**30)
    assert (row.batch.most >= one.batch) == fits


# ---------------------------------------------------------------------------- compilers
def kept_programs(monkeypatch):
    """A list of what is compiled from now on."""
    programs = []
    whole = jax.stages.Lowered.compile

    def kept(lowered, *arguments, **named):
        programs.append(whole(lowered, *arguments, **named))
        return programs[-1]

    monkeypatch.setattr(jax.stages.Lowered, "compile", kept)
    return programs


@pytest.mark.parametrize(
    ("topology", "data", "parts"), [("v5e-4", 2, 2), ("h200", 1, 1)], ids=["v5e-4", "h200"]
)
def test_figures_are_the_compilers(topology, data, parts, monkeypatch):
    """A row's bytes beside `memory_analysis()` of its program, added up here."""
    if (reason := missing(TOPOLOGIES[topology].target)) is not None:
        pytest.skip(reason)
    programs = kept_programs(monkeypatch)
    split = {"data": data, "parts": parts, "batch": 2, "prompt": 256, "new_tokens": 16}
    one = ask(model=SMALL, budget=64, topology=topology, **split)
    row = plan(one, program.compiled, limits="none")
    [compiled] = programs
    memory = compiled.memory_analysis()
    assert row.compiled
    assert row.short == 0
    assert row.temporaries == memory.temp_size_in_bytes
    assert row.total == (
        memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        + memory.generated_code_size_in_bytes
        - memory.alias_size_in_bytes
    )
    # Weights, and some small arrays beside them: the prompt, lengths, rules.
    assert 0 <= memory.argument_size_in_bytes - row.held.weights < 2**14
    assert ("tpu_custom_call" if topology == "v5e-4" else "triton") in row.kernels
    if parts > 1:
        step = collectives(compiled.as_text(), "decode")
        assert row.collectives == (len(step), sum(size for _, size in step))
        # One row a chip: a query to the others (8 heads of 128 in bf16), and what they found.
        found = 2 * 4 * 129 * 4
        assert step.count(("all-gather", 8 * 128 * 2)) >= 2
        assert step.count(("all-to-all", found)) == 2


def test_what_was_compiled_is_found_again(tmp_path):
    found = Compiled(1, 2, 3, 6, False, ("triton",), (("all-gather", 8),))
    calls = []
    for _ in range(2):
        store = Store(lambda one: calls.append(one) or found, tmp_path)
        assert store(ask()) == found
        assert store.holds(ask())
        assert not store.holds(ask(batch=2))
    assert calls == [ask()]


@pytest.mark.parametrize(
    ("file", "method"), [("llama-limits", "full"), ("llama-70b-few", "ada-snapkv")]
)
def test_committed_rows_are_the_compilers(file, method, monkeypatch):
    """Two rows of docs/plan.md compiled again, their bytes continued to all layers here.

    After a change to what is compiled, `make plan` makes the page anew.
    """
    if (reason := missing("h200")) is not None:
        pytest.skip(reason)
    asks = read_plan(ROOT / "configs" / "plan" / f"{file}.toml").asks()
    one = next(
        one for one in asks if (one.topology.name, one.compression.method) == ("h200", method)
    )
    rows = json.loads((ROOT / "docs" / "plan.json").read_text())["rows"]
    keys = "model", "topology", "method", "layers"
    wanted = [one.name, "h200", method, [2, 6]]
    row = next(row for row in rows if [row[key] for key in keys] == wanted)
    programs = kept_programs(monkeypatch)
    for layers in (2, 6):
        program.compiled(one.with_layers(layers))
    few, more = (
        memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        + memory.generated_code_size_in_bytes
        - memory.alias_size_in_bytes
        for memory in (compiled.memory_analysis() for compiled in programs)
    )
    total = few + (more - few) * (one.model.num_layers - 2) / 4
    assert row["total"] == pytest.approx(total, rel=0.005)


# ---------------------------------------------------------------------------- the command
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "llama-3-8b"], "--topology is missing"),
        (["--model", "x", "--topology", "h200"], "model='x', expected a directory"),
        (["--model", "1m", "--topology", "v9"], "topology='v9', expected one of v5e-4"),
        (["--model", "1m", "--topology", "h200", "--split", "2x2"], "split=2x2 needs 4 devices"),
        (
            ["--model", "1m", "--topology", "v5e-8", "--split", "4"],
            "split='4', expected DATAxMODEL",
        ),
        (
            ["--model", "1m", "--topology", "v5e-8", "--split", "4x2", "--batch", "6"],
            "batch=6, expected a multiple of data=4",
        ),
        (["--model", "1m", "--topology", "h200", "--methods", "best"], "method='best'"),
    ],
)
def test_a_wrong_call_is_one_sentence(run, flags, message):
    code, out, err = run("plan", "--estimate", *flags)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_an_unknown_key_is_named(tmp_path):
    file = tmp_path / "plan.toml"
    file.write_text('models = ["1m"]\ntopologies = ["h200"]\nmethods = ["full"]\nslices = 3\n')
    with pytest.raises(ValueError, match="unknown key slices"):
        read_plan(file)


def test_settings_are_columns():
    common = {"methods": ("full", "snapkv/packed/int8"), "prompt": 1024, "new_tokens": 8}
    with pytest.raises(ValueError, match="topologies has 1 entries, expected 2"):
        PlanSettings(models=("1m", "1m"), topologies=("h200",), **common)
    settings = PlanSettings(models=("1m",), topologies=("v6e-256",), budget="25%", **common)
    full, int8 = settings.asks()
    assert (full.data, full.parts, full.batch) == (32, 8, 32)
    assert (int8.compression.quantize, int8.compression.budget) == ("int8", 0.25)
    assert parse_split("", 1) == (1, 1)


def test_the_command_estimates_and_writes(run, tmp_path):
    out = tmp_path / "plan.md"
    flags = ["--model", "llama-3-8b", "--topology", "h100", "--methods", "full,snapkv", "--json"]
    code, text, _ = run("plan", "--estimate", *flags, "--prompt", 1024, "-o", out)
    assert code == 0
    printed = json.loads(text.splitlines()[-1])
    assert printed == json.loads(out.with_suffix(".json").read_text())
    assert [row["method"] for row in printed["rows"]] == ["full", "snapkv"]
    assert all(row["how"] == "estimate" for row in printed["rows"])
    assert out.read_text().count("| llama-3-8b | h100 |") == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.json", "plan.md"]


# ---------------------------------------------------------------------------- the committed table
def test_the_committed_table_is_of_its_settings():
    rows = json.loads((ROOT / "docs" / "plan.json").read_text())["rows"]
    names = "llama", "llama-limits", "llava", "llama-70b", "llama-70b-few"
    groups = [read_plan(ROOT / "configs" / "plan" / f"{name}.toml") for name in names]
    asks = [one for group in groups for one in group.asks()]
    assert [(row["model"], row["topology"]) for row in rows] == [
        (one.name, one.topology.name) for one in asks
    ]
    for row, one in zip(rows, asks, strict=True):
        found = dataclasses.asdict(held.held(one))
        assert found == {name: row[name] for name in ("weights", "pool", "tail")}
        asked = row["how"] == "compiled" and isinstance(row["layers"], int)
        if not (asked and one.topology.platform == "tpu"):  # else its compiler said so
            assert row["fits"] == (row["total"] <= one.topology.room)


def test_two_committed_rows_by_hand():
    """8B on v5e-8 as above, batch 8 of 32,768 tokens; LLaVA-1.5-7B whole on one v6e."""
    rows = json.loads((ROOT / "docs" / "plan.json").read_text())["rows"]

    def row(*names):
        keys = "model", "topology", "method"
        return next(row for row in rows if tuple(row[key] for key in keys) == names)

    first = row("llama-3-8b", "v5e-8", "ada-snapkv")
    assert first["weights"] == 2_008_031_232
    assert first["pool"] == 8 * (1024 * 32 * 517 + 1024)
    assert first["tail"] == 8 * 128 * (32 * 512 + 4)
    second = row("llava-1.5-7b", "v6e-1", "full")
    layer = 4 * 4096 * 4096 + 3 * 4096 * 11_008
    assert second["weights"] == 2 * (2 * 32_064 * 4096 + 32 * layer + 65 * 4096)
    assert second["pool"] == 16 * 1024 * 32 * 32 * (512 + 4)
    assert second["tail"] == 16 * 512 * (32 * 32 * 512 + 4)
