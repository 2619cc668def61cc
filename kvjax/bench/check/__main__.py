"""Run the check: `python -m kvjax.bench.check --platform {gpu,tpu,cpu} --out DIR`."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from kvjax.bench.check.journal import FAILED, Journal, summary
from kvjax.bench.check.listed import PLATFORMS, parts
from kvjax.bench.check.runner import Stopped, run

SECONDS = 480.0
# Where results are compared with the CPU's, JAX needs both.
_BACKENDS = {"gpu": "cuda,cpu", "tpu": "tpu,cpu", "cpu": "cpu"}


def main(arguments: Sequence[str] | None = None) -> int:
    """0: all parts passed; 1: one failed; 2: a wrong call or no device; 3: some are not run yet."""
    parser = argparse.ArgumentParser(
        prog="kvjax.bench.check",
        description="Correctness and speed on this machine's device; a second call goes on.",
    )
    parser.add_argument("--platform", choices=PLATFORMS, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--small", action="store_true", help="small shapes (always on a CPU)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"for all ({SECONDS:g})")
    parser.add_argument(
        "--only", nargs="+", default=[""], help="parts whose names hold one of these"
    )
    options = parser.parse_args(arguments)
    small = options.small or options.platform == "cpu"
    every = parts(options.platform, small)
    chosen = [part for part in every if any(word in part.name for word in options.only)]
    if not chosen:
        names = ", ".join(part.name for part in every)
        return _refuse(f"--only {' '.join(options.only)}, expected a piece of one of {names}")
    _environment(options.platform)
    try:
        journal = Journal(options.out, {"platform": options.platform, "small": small})
    except ValueError as error:
        return _refuse(str(error))
    stopped = None
    try:
        run(journal.waiting(chosen), journal, options.seconds, options.out / "log.txt", _show)
    except Stopped as error:
        stopped = str(error)
    text = summary(journal, chosen)
    (options.out / "summary.md").write_text(text)
    print("\n" + text)
    if stopped is not None:
        return _refuse(stopped)
    results = [journal.result(part) for part in chosen]
    return 1 if FAILED in results else 3 if None in results else 0


def _environment(platform: str) -> None:
    """For the processes that run the parts; what is set already stays."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "kvjax" / "check"
    wanted = {
        "JAX_PLATFORMS": _BACKENDS[platform],
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "XLA_PYTHON_CLIENT_MEM_FRACTION": ".92",
        "TRITON_DEFAULT_FP_FUSION": "1",  # what Triton does by itself, without a warning
    }
    for name, value in wanted.items():
        os.environ.setdefault(name, value)


def _show(line: str) -> None:
    print(line, flush=True)


def _refuse(message: str) -> int:
    print(f"kvjax: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
