"""Run parts one by one, in a process that may hang or die without the others."""

import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from kvjax.bench.check.journal import FAILED, PASSED, Journal, told
from kvjax.bench.check.part import Part

START = 120.0  # seconds that a process has to find its device
_LONGEST = 400  # characters of an error


class Stopped(Exception):
    """No process could be started; the message says why."""


def run(
    parts: Sequence[Part],
    journal: Journal,
    seconds: int | float,
    log: Path,
    show: Callable[[str], Any] = print,
) -> None:
    """Run parts until all are done or the time is over, and write each one's result at once.

    A part that takes longer than its limit is killed and has failed; one that the end of the time
    cuts off has no result, so that a further call begins with it.

    Args:
      parts: in the order in which they run.
      journal: takes a row a part.
      seconds: for all of them.
      log: file that gets what the processes print, tracebacks included.
      show: takes a line as each part ends.

    Raises:
      Stopped: the device cannot be reached.
    """
    deadline = time.monotonic() + seconds
    worker: _Worker | None = None
    try:
        for part in parts:
            if worker is not None and worker.apart != part.apart:
                worker.stop()
                worker = None
            if (left := deadline - time.monotonic()) <= 0:
                return
            if worker is None:
                worker = _Worker(part.apart, log)
            if not worker.ready(min(START, left)):
                if left < START:
                    return
                raise Stopped(f"no device within {START:g} s ({log})")
            left = max(0.0, deadline - time.monotonic())
            began = time.monotonic()
            row, alive = worker.run(part, min(part.limit, left))
            if not alive:
                worker.stop()
                worker = None
            if row is None and part.limit > left:
                return
            row = row or {"error": f"took more than its {part.limit:g} s"}
            row |= {"part": part.name, "seconds": round(time.monotonic() - began, 2)}
            row["result"] = FAILED if "error" in row else PASSED
            journal.write(row)
            show(f"{row['result']:<7}{row['seconds']:>6.1f} s  {part.name}: {told(row)}")
    finally:
        if worker is not None:
            worker.stop()


class _Worker:
    """A process that runs parts as they are sent to it."""

    def __init__(self, apart: bool, log: Path):
        self.apart, self._ready = apart, False
        context = multiprocessing.get_context("spawn")
        self._end, other = context.Pipe()
        self._process = context.Process(target=_work, args=(other, apart, str(log)), daemon=True)
        self._process.start()
        other.close()

    def ready(self, limit: int | float) -> bool:
        """Whether it has found its device within so many seconds."""
        if not self._ready:
            answer, _ = self._answer(limit)
            if answer is not None and "error" in answer:
                raise Stopped(answer["error"])
            self._ready = answer is not None
        return self._ready

    def run(self, part: Part, limit: int | float) -> tuple[dict[str, Any] | None, bool]:
        """The part's row, None where it took too long; and whether the process can go on."""
        self._end.send(part)
        return self._answer(limit)

    def _answer(self, limit: int | float) -> tuple[dict[str, Any] | None, bool]:
        if not self._end.poll(limit):
            return None, False
        try:
            return self._end.recv(), True
        except (EOFError, ConnectionResetError):
            self._process.join(5)
            code = self._process.exitcode
            why = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
            return {"error": f"its process died ({why})"}, False

    def stop(self) -> None:
        """End the process, and whatever it has started."""
        if self._process.is_alive() and self._process.pid is not None:
            try:
                # The process leads a session of its own from its first line on.
                if os.getpgid(self._process.pid) == self._process.pid:
                    os.killpg(self._process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            self._process.kill()
        self._process.join(10)
        self._end.close()


def _work(end: Connection, apart: bool, log: str) -> None:
    """The process: answers every part that comes with a row."""
    os.setsid()
    with open(log, "ab", buffering=0) as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())
    if apart:
        # Another program is to have the device's memory.
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    try:
        import jax

        device = "" if apart else jax.devices()[0].device_kind
    except Exception as error:
        traceback.print_exc()
        end.send({"error": _line(error)})
        return
    end.send({})
    while True:
        try:
            part = end.recv()
        except EOFError:
            return
        print(f"\n---- {part.name}", flush=True)
        try:
            row = {"found": part.run(), "device": device}
        except Exception as error:
            traceback.print_exc()
            row = {"error": _line(error), "device": device}
        end.send(row)


def _line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    name = type(error).__name__
    return lines[0][:_LONGEST] if name == "Failed" else f"{name}: {lines[0]}"[:_LONGEST]
