"""The `kvjax` command.

Results go to stdout, everything else to stderr. Exit codes: 0; 2 with one sentence on stderr for
what a user can mend (a flag, a file, a model directory, a package); 130 after an interrupt; 141
where the reader of stdout has gone.
"""

import logging
import os
import sys
from collections.abc import Sequence

from kvjax.cli.parser import build_parser
from kvjax.exact import in_32_bits


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; `argv` without the program's name. Returns the exit code."""
    try:
        arguments = build_parser().parse_args(argv)
        _quieten()
        with in_32_bits():
            arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes stdout once more when it exits, and would complain there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, ImportError) as error:  # the last: a package that is not installed
        print(f"kvjax: {_sentence(error)}", file=sys.stderr)
        return 2
    return 0


def _sentence(error: ValueError | OSError | ImportError) -> str:
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(text.split())


def _quieten() -> None:
    """Silence what JAX and XLA say when they look for devices."""
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1") == "1":  # 1 is JAX's own default
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
    logging.getLogger("jax").setLevel(logging.ERROR)
