"""Say what a machine lacks for the check; run by its path, for kvjax may not import.

python -P kvjax/bench/check/needs.py {gpu,tpu}
"""

import importlib
import os
import re
import sys
from importlib.metadata import PackageNotFoundError, version

PYTHON = (3, 12)
JAX = (0, 11, 2), (0, 12)
# What is imported, and what it is installed as.
_COMMON = {
    "flax": "flax",
    "jaxtyping": "jaxtyping",
    "jinja2": "jinja2",
    "numpy": "numpy",
    "optax": "optax",
    "orbax.checkpoint": "orbax-checkpoint",
    "safetensors": "safetensors",
    "tokenizers": "tokenizers",
    "tqdm": "tqdm",
    "transformers": "transformers",
}
PACKAGES = {
    "gpu": {"jax": "jax[cuda13]", "triton": "triton", "jax_triton": "jax-triton"} | _COMMON,
    "tpu": {"jax": "jax[tpu]"} | _COMMON,
    "cpu": {"jax": "jax"} | _COMMON,
}
_BACKEND = {"gpu": "cuda", "tpu": "tpu", "cpu": "cpu"}


def absent(platform: str) -> list[str]:
    """Packages that cannot be imported, as they are installed; why, where they are there."""
    found = []
    for module, package in PACKAGES[platform].items():
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            told = package
            if error.name != module.split(".")[0]:
                told += f" (its import needs {error.name})"
            found.append(told)
        except Exception as error:
            found.append(f"another {package} (its import says {type(error).__name__}: {error})")
    return found


def wrong_version() -> str | None:
    """Which jax is there, where it is not one that kvjax works with."""
    try:
        text = version("jax")
    except PackageNotFoundError:
        return None
    number = tuple(int(digits) for digits in re.findall(r"\d+", text)[:3])
    return None if JAX[0] <= number < JAX[1] else f"jax 0.11.2 to 0.11 (this is {text})"


def no_device(platform: str) -> str | None:
    """What JAX says where it does not see the device."""
    import jax

    try:
        jax.devices(_BACKEND[platform])
    except RuntimeError as error:
        return f"a {platform.upper()} that JAX sees ({str(error).splitlines()[0]})"
    return None


def missing(platform: str) -> str | None:
    """One sentence, or None where nothing is missing."""
    if sys.version_info < PYTHON:
        lacking = [f"Python 3.12 or later (this is {sys.version.split()[0]})"]
    else:
        lacking = absent(platform)
        if (wrong := wrong_version()) is not None:
            lacking.append(wrong)
        if not lacking and (device := no_device(platform)) is not None:
            lacking.append(device)
    if not lacking:
        return None
    return (
        f"{platform}-check needs {', '.join(lacking)} under {sys.executable}: name another"
        " interpreter (make PYTHON=...) or a folder of wheels to install from (make WHEELS=...)"
    )


def main() -> int:
    platform = sys.argv[1]
    # Other chips that may be here are not looked for.
    os.environ.setdefault("JAX_PLATFORMS", f"{_BACKEND[platform]},cpu")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    if (sentence := missing(platform)) is not None:
        print(f"kvjax: {sentence}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
