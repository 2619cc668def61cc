"""A server's programs, compiled for chips that are not here, with a pool that dwarfs all else."""

import dataclasses

import pytest

from kvjax.compile_for import TPUS, missing
from kvjax.kernels.decode_attention.tpu_pages import MOST_TABLE
from kvjax.plan.question_matrix import small_model
from kvjax.plan.served_programs import CASES, IN_PLACE, Server, Shapes, compile_case
from kvjax.plan.topology import TOPOLOGIES

# What overwrites the pool; decoding overwrites rows and tails alone, swapping out nothing.
KEEPS_POOL = ("decode", "swap_out")


@pytest.fixture(scope="module", params=["v5e-8", "v6e-8", "h200"])
def shapes(request):
    """The shapes of a server with a rule and of one without, made once a slice."""
    topology = TOPOLOGIES[request.param]
    if (reason := missing(topology.target)) is not None:
        pytest.skip(reason)
    config = dataclasses.replace(small_model(layers=1).config, vocab_size=512)
    server = Server(topology=topology, model=config, prompt=2048, new_tokens=64, pool=16_384)
    made = {}

    def of(rule):
        if rule not in made:
            made[rule] = Shapes(server, rule)
        return made[rule]

    return of


@pytest.mark.parametrize("case", CASES)
def test_a_program_copies_no_pool(shapes, case):
    name, rule = CASES[case]
    found = compile_case(name, shapes(rule))
    assert found["temporaries"] < 0.05 * found["pool"]
    assert not set(found["copies"]) - IN_PLACE
    assert found["in_loop"] == []
    if name not in KEEPS_POOL:
        assert found["overwritten"] >= found["pool"]
    if name in ("decode", "ask"):
        tpu = shapes(rule).server.topology.target in TPUS
        assert ("tpu_custom_call" if tpu else "triton") in found["kernels"]
        assert found["table"] <= MOST_TABLE
