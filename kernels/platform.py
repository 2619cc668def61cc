"""Choose whose kernels a program gets: where JAX runs, or what it is compiled for elsewhere."""

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import jax

Platform = Literal["cpu", "gpu", "tpu"]

# Part of jit's cache key: a function that was traced for one platform is traced anew for another.
_ASSUMED: Any = jax.make_user_context(None)

# What jax-triton has to be told where there is no GPU to ask: a Hopper chip.
_HOPPER: dict[str, Any] = {"compute_capability": 90, "backend_options": {"ptx_version": 90}}


def platform() -> Platform:
    """The platform that what is being traced will run on."""
    name: Any = _ASSUMED.value or jax.default_backend()
    return "gpu" if name == "cuda" else name


@contextlib.contextmanager
def assume(name: Platform) -> Iterator[None]:
    """Inside, functions are traced with the kernels of `name`: to compile for what is not here."""
    with _ASSUMED(name):
        yield


def triton_options() -> dict[str, Any]:
    """How jax-triton compiles: for the GPU that is there, or for an assumed Hopper chip."""
    return dict(_HOPPER) if _ASSUMED.value == "gpu" and jax.default_backend() == "cpu" else {}
