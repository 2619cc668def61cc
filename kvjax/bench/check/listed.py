"""List all parts in the order in which they run: cheap ones first."""

from functools import partial
from importlib.util import find_spec

from kvjax.bench.check import calls, kernels, speed
from kvjax.bench.check.part import Part

PLATFORMS = ("gpu", "tpu", "cpu")


def parts(platform: str, small: bool) -> list[Part]:
    """The parts of a platform; `small` ones try the check itself.

    Limits are some times what a part should need: a chip's first compilation is slow.
    """
    found = [
        *_kernels(small),
        *_calls(small),
        Part("speed copy", 40, partial(speed.copy, small)),
        *(
            Part(f"speed decode {name}", 90, partial(speed.decode, small=small, **call))
            for name, call in _DECODE.items()
        ),
        Part("speed scores", 60, partial(speed.score, small)),
        *(
            Part(f"speed generate {method}", 120, partial(speed.whole, method, small))
            for method in speed.METHODS
        ),
    ]
    if platform != "tpu" and find_spec("torch") is not None and speed.PEER.is_file():
        found.append(Part("peer torch", 150, partial(speed.peer, small), apart=True))
    return found


_DECODE: dict[str, dict[str, str]] = {
    "ada-snapkv, even heads": {"method": "ada-snapkv/packed"},
    "ada-snapkv, skewed heads": {"method": "ada-snapkv/packed", "owners": "skewed"},
    "ada-snapkv, int8": {"method": "ada-snapkv/packed/int8"},
    "full": {"method": "full"},
}


def _kernels(small: bool) -> list[Part]:
    dtypes = {
        kernels.pool: ("float32", "bfloat16", "int8"),
        kernels.prefill: ("bfloat16", "float32"),
        kernels.scores: ("float32", "bfloat16"),
    }
    found = [
        Part(f"kernel {function.__name__} {dtype}", 90, partial(function, dtype, small))
        for function, of in dtypes.items()
        for dtype in of
    ]
    return [*found, Part("kernel at load", 90, partial(kernels.loaded, small))]


def _calls(small: bool) -> list[Part]:
    names = [*calls.calls(calls.size_of(small)), *calls.HALF]
    return [Part(f"call {name}", 60, partial(calls.check, name, small)) for name in names]
