"""Run `kvjax serve`: many clients at once over HTTP; slow imports come late."""

import argparse
import contextlib
import os
import re
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kvjax
from kvjax.cli.settings import loading, recompression
from kvjax.compression.scorers import decoding_scorers
from kvjax.config import CompressionConfig, Recompress, parse_budget
from kvjax.methods import METHODS
from kvjax.spelling import FORM, parse_method, parse_methods

_INSTALL = "kvjax serve needs FastAPI, uvicorn and prometheus_client: pip install kvjax[serve]"
_KEY = "KVJAX_API_KEY"
# Connections that wait until they are taken; uvicorn's own number.
_BACKLOG = 2048
_BYTES = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def add_flags(parser: argparse.ArgumentParser, whole: Callable[[int], Any]) -> None:
    """The flags beside those of the model; `whole` makes a type of a least integer."""
    _engine_flags(parser.add_argument_group("engine").add_argument, whole)
    _memory_flags(parser.add_argument_group("answers in less memory").add_argument, whole)
    _network_flags(parser.add_argument_group("network").add_argument, whole)


def _engine_flags(add: Callable[..., Any], whole: Callable[[int], Any]) -> None:
    add(
        "--method",
        default="full",
        metavar="M,M",
        help=f"{FORM}, of {', '.join(METHODS)}; requests choose one, the first by default (full)",
    )
    add(
        "--budget",
        metavar="N|P%",
        help="entries kept per KV head, on average over heads and layers, which requests may lower",
    )
    add(
        "--cache-bytes",
        required=True,
        type=byte_count,
        metavar="N",
        help="of the pool that all requests share, such as 8G",
    )
    add("--rows", type=whole(1), default=8, metavar="N", help="requests answered at once (8)")
    add(
        "--prompt-buckets",
        type=_lengths,
        metavar="N,N",
        help="lengths that prompts are padded to, the last one the longest prompt; a program is"
        " compiled for each and every method (powers of two up to the context)",
    )
    add(
        "--question-buckets",
        type=_lengths,
        metavar="N,N",
        help="lengths of questions about contexts (256; none with --recompress-every)",
    )
    add(
        "--context-bytes",
        type=byte_count,
        metavar="N",
        help="of the pool that contexts may take together; the one that was asked longest ago"
        " leaves for another (as much as the pool has)",
    )
    add(
        "--contexts-dir",
        type=Path,
        metavar="DIR",
        help="where contexts are kept on disk too, and read again when they are asked",
    )
    add("--max-new-tokens", type=whole(1), default=256, metavar="N", help="of an answer (256)")
    add(
        "--top-logprobs",
        type=whole(0),
        default=0,
        metavar="N",
        help="likeliest tokens that requests may ask for at each place (0)",
    )
    add("--decode-steps", type=whole(1), default=8, metavar="N", help="between two prefills (8)")


def _memory_flags(add: Callable[..., Any], whole: Callable[[int], Any]) -> None:
    add(
        "--recompress-every",
        type=whole(2),
        metavar="N",
        help="compress again every N tokens of an answer, so that it needs no more memory",
    )
    add("--recompress-budget", type=whole(4), metavar="N", help="entries a KV head of all of it")
    add(
        "--recompress-scorer",
        choices=decoding_scorers(),
        help="what that goes by, as of kvjax generate (window)",
    )
    add(
        "--recompress-layers",
        choices=("uniform", "global"),
        help="layers keep the slots they have, or one threshold over layers and heads, with"
        " squared-sum (uniform)",
    )
    add(
        "--pressure",
        choices=("swap", "evict"),
        default="swap",
        help="where pages run short: requests wait until all that they can come to hold is free, or"
        " rows keep less, with --recompress-layers global (swap)",
    )
    add(
        "--pressure-floor",
        type=whole(1),
        metavar="N",
        help="entries a KV head that are left of a row then (half of --recompress-budget)",
    )


def _network_flags(add: Callable[..., Any], whole: Callable[[int], Any]) -> None:
    add("--host", default="127.0.0.1", metavar="H", help="address to listen on (127.0.0.1)")
    add("--port", type=_port, default=8000, metavar="N", help="0 for a free one (8000)")
    add(
        "--api-key",
        metavar="K",
        help=f"that clients have to give; better in the environment, as {_KEY}, where others on"
        " this machine cannot read it",
    )
    add("--served-name", metavar="S", help="of the model, to clients (the last part of --model)")
    add("--body-bytes", type=byte_count, default=4 * 2**20, metavar="N", help="of a request (4M)")
    add("--timeout", type=whole(1), default=600, metavar="S", help="of a request, in seconds (600)")
    add(
        "--max-requests",
        type=whole(1),
        default=256,
        metavar="N",
        help="answered or waiting at once; more are told to try again (256)",
    )


def byte_count(text: str) -> int:
    """A type for argparse: a number of bytes, K, M, G or T behind it for powers of 1024."""
    found = re.fullmatch(r"(\d{1,15})([KMGT]?)", text)
    count = int(found[1]) * _BYTES[found[2]] if found else 0
    if count < 1:
        raise argparse.ArgumentTypeError(f"{text!r}, expected bytes, such as 268435456 or 256M")
    return count


def _port(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 6 and int(text) < 2**16):
        raise argparse.ArgumentTypeError(f"{text!r}, expected a port from 0 to 65535")
    return int(text)


def _lengths(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.isascii() and part.isdecimal() and len(part) < 10 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r}, expected rising lengths, as in 512,4096")
    return tuple(map(int, parts))


def methods(arguments: argparse.Namespace) -> dict[str, CompressionConfig]:
    """The methods that the flags name, as they are typed."""
    budget = None if arguments.budget is None else parse_budget(arguments.budget)
    names = parse_methods(arguments.method)
    if not names:
        raise ValueError(f"--method {arguments.method!r}, expected {FORM}")
    return {name: parse_method(name, budget) for name in names}


def run(arguments: argparse.Namespace) -> None:
    """`kvjax serve`: until SIGTERM or an interrupt, after which what was accepted is answered."""
    try:
        import uvicorn  # noqa: F401

        from kvjax.serve.engine import Engine
        from kvjax.serve.guard import Limits, is_local
        from kvjax.serve.http import make_app
        from kvjax.serve.pressure import floor_of
    except ImportError as error:
        raise ImportError(f"{_INSTALL} ({error})") from None
    offered, rule = methods(arguments), _recompression(arguments)
    floor_of(arguments.pressure, arguments.pressure_floor, rule)  # before a model is loaded
    limits = Limits(
        api_key=os.environ.get(_KEY) if arguments.api_key is None else arguments.api_key,
        loopback=is_local(arguments.host),
        body_bytes=arguments.body_bytes,
        seconds=arguments.timeout,
        requests=arguments.max_requests,
    )
    if not limits.loopback and limits.api_key is None:
        _say(f"--host {arguments.host} without an API key: whoever reaches this port is answered")
    # The port first: a model is slow to load, and its programs are slow to compile.
    with _bound(arguments.host, arguments.port) as listener:
        model, tokenizer = kvjax.load(arguments.model, **loading(arguments))
        if tokenizer is None:
            raise ValueError(f"--model {arguments.model} has no tokenizer, expected one for texts")
        with Engine(
            model,
            tokenizer,
            offered,
            cache_bytes=arguments.cache_bytes,
            rows=arguments.rows,
            buckets=arguments.prompt_buckets,
            question_buckets=_question_buckets(arguments),
            max_new_tokens=arguments.max_new_tokens,
            decode_steps=arguments.decode_steps,
            recompress=rule,
            pressure=arguments.pressure,
            pressure_floor=arguments.pressure_floor,
            top_logprobs=arguments.top_logprobs,
            context_bytes=arguments.context_bytes,
            contexts_dir=arguments.contexts_dir,
            seed=arguments.seed,
        ) as engine:
            for sentence in engine.refused:
                _say(sentence)
            name = arguments.served_name or Path(arguments.model).name
            app = make_app(engine, tokenizer, name, offered, limits)
            _say(f"{engine.compiled} programs, {engine.stats().pages} pages, {arguments.rows} rows")
            _listen(listener)  # who reads the next line may connect at once
            _say(f"{name} at http://{_shown(listener)}")
            _serve(app, listener, limits.seconds + limits.body_seconds)


def _recompression(arguments: argparse.Namespace) -> Recompress | None:
    every, budget = arguments.recompress_every, arguments.recompress_budget
    if (every is None) != (budget is None):
        raise ValueError("--recompress-every and --recompress-budget, expected both or neither")
    return recompression(arguments)


def _question_buckets(arguments: argparse.Namespace) -> tuple[int, ...]:
    if arguments.question_buckets is not None:
        return arguments.question_buckets
    return () if arguments.recompress_every else (256,)


@contextlib.contextmanager
def _bound(host: str, port: int) -> Iterator[socket.socket]:
    """A socket at an address, which does not listen yet; ValueError where that cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with _free(host, port):
            listener.bind((host, port))
        yield listener


def _listen(listener: socket.socket) -> None:
    """Let clients come; another server may have bound the same address, and listen since."""
    with _free(*listener.getsockname()[:2]):
        listener.listen(_BACKLOG)


@contextlib.contextmanager
def _free(host: str, port: int) -> Iterator[None]:
    """ValueError where an address cannot be had."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(
            f"--host {host} --port {port} cannot be had ({reason}), expected a free address"
        ) from None


def _shown(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _serve(app: Any, listener: socket.socket, seconds: int | float) -> None:
    """Answer until SIGTERM or an interrupt, and then all that was accepted."""
    import uvicorn

    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            lifespan="off",
            server_header=False,
            ws="none",
            proxy_headers=False,
            # No request takes longer than this, its body included.
            timeout_graceful_shutdown=int(seconds + 5),
        )
    )
    # Before uvicorn has its own handler, and when it raises the signal that ended it once more.
    signal.signal(signal.SIGTERM, server.handle_exit)
    server.run(sockets=[listener])


def _say(line: str) -> None:
    print(f"kvjax: {line}", file=sys.stderr, flush=True)
