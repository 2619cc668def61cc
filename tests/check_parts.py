"""Parts for the tests of `kvjax.bench.check`: they pass, fail, hang and die."""

import os
import time
from functools import partial

from kvjax.bench.check.part import Failed, Part


def passes() -> dict:
    return {"number": 7, "shown": "seven"}


def fails() -> dict:
    raise Failed("error 2.0e+00, expected at most 3.1e-05")


def raises() -> dict:
    raise RuntimeError("first line\nsecond line")


def hangs() -> dict:
    time.sleep(600)
    return {}


def dies() -> dict:
    os._exit(11)


def part(function, limit: int | float = 60, **settings) -> Part:
    return Part(function.__name__, limit, partial(function), **settings)
