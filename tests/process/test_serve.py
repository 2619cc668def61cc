"""`kvjax serve` as a process: it starts, is ended under load, and refuses what it cannot be."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from contextlib import contextmanager

import pytest

from kvjax.tiny import WEIGHTS

FLAGS = (
    "--model", WEIGHTS, "--method", "key-diff", "--budget", "24", "--cache-bytes", "4M",
    "--prompt-buckets", "64", "--question-buckets", "32", "--rows", "2", "--max-new-tokens", "128",
    "--port", "0",
)  # fmt: skip
STREAMS = 20  # ten times as many as rows


@contextmanager
def process(*flags, **environment):
    command = [sys.executable, "-m", "kvjax.cli", "serve", *map(str, (*FLAGS, *flags))]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=os.environ | environment
    ) as running:
        try:
            yield running
        finally:
            running.kill()


def address(running) -> str:
    """Where it listens, once it says so."""
    for line in running.stderr:
        if found := re.search(r"http://\S+", line):
            return found[0]
    raise AssertionError("it ended before it listened")


def ask(url: str, body: dict, **headers) -> list[dict]:
    """The answer, or all events of a stream, which comes to its end."""
    data = json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"} | headers)
    with urllib.request.urlopen(request, timeout=300) as answer:
        if not body.get("stream"):
            return [json.load(answer)]
        *events, end = [line[len("data: ") :] for line in map(bytes.decode, answer) if line.strip()]
        assert end.strip() == "[DONE]"
        return [json.loads(event) for event in events]


def test_what_was_accepted_is_answered_after_sigterm():
    """Slow: the command compiles its programs."""
    with process("--served-name", "tiny", KVJAX_API_KEY="secret") as running:
        root = address(running)
        url, key = f"{root}/v1/completions", {"authorization": "Bearer secret"}
        with pytest.raises(urllib.error.HTTPError, match="401") as caught:
            ask(url, {"prompt": "the"})
        caught.value.close()
        asked = {"model": "tiny", "prompt": "the note of the baker", "max_tokens": 128}
        asked["temperature"] = 0  # a drawn answer may end at once
        [whole] = ask(url, asked, **key)
        counted = asked | {"stream": True, "stream_options": {"include_usage": True}}
        answers: list[list[dict]] = []

        def one() -> None:
            answers.append(ask(url, counted, **key))

        threads = [threading.Thread(target=one) for _ in range(STREAMS)]
        for thread in threads:
            thread.start()
        page = urllib.request.Request(f"{root}/pool.json", headers=key)
        pool: dict = {"running": 0, "queued": 0, "finished": 0}
        while pool["running"] + pool["queued"] + pool["finished"] < STREAMS + 1:
            with urllib.request.urlopen(page, timeout=60) as answer:
                pool = json.load(answer)
        running.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        assert running.wait(timeout=60) == 0
        assert len(answers) == STREAMS
        for *pieces, last in answers:
            texts = [piece["choices"][0]["text"] for piece in pieces]
            assert "".join(texts) == whole["choices"][0]["text"]
            assert last["usage"] == whole["usage"]
        assert running.stderr.read() == ""


def test_it_can_be_reached_once_it_says_where(run, monkeypatch):
    """Slow: the command compiles its programs."""

    def reach(app, listener, seconds):
        with socket.create_connection(listener.getsockname(), timeout=5):
            reached.append(listener)

    reached: list[socket.socket] = []
    monkeypatch.setattr("kvjax.cli.serve._serve", reach)
    assert run("serve", *FLAGS)[0] == 0
    assert len(reached) == 1


@pytest.mark.smoke
def test_what_a_server_refuses(run, monkeypatch):
    monkeypatch.delenv("KVJAX_API_KEY", raising=False)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        cases = [
            (
                ("--port", port),
                f"--host 127.0.0.1 --port {port} cannot be had (Address already in use), expected a"
                " free address",
            ),
            (
                ("--port", 65536),
                "argument --port: '65536', expected a port from 0 to 65535",
            ),
            (
                ("--cache-bytes", "0"),
                "argument --cache-bytes: '0', expected bytes, such as 268435456 or 256M",
            ),
            (
                ("--prompt-buckets", "64,x"),
                "argument --prompt-buckets: '64,x', expected rising lengths, as in 512,4096",
            ),
            (
                ("--api-key", ""),
                "api_key of 0 characters, expected at least one, each of visible ASCII",
            ),
            (
                ("--recompress-every", 8),
                "--recompress-every and --recompress-budget, expected both or neither",
            ),
            (
                ("--pressure", "evict"),
                "pressure='evict', expected recompress with scorer='squared-sum' and"
                " layers='global'",
            ),
            (("--method", ""), "--method '', expected METHOD[/LAYOUT[/int8]][:NAME=VALUE,...]"),
        ]
        for flags, message in cases:
            assert run("serve", *FLAGS, *flags) == (2, "", f"kvjax: {message}\n")
