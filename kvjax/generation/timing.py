"""timed_generate(): `generate` with its phases compiled and timed apart."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from kvjax.cache.state import with_room
from kvjax.compression.compress import probe_request
from kvjax.config import CompressionConfig
from kvjax.generation import decode, prefill
from kvjax.generation.generate import Generation, as_generation
from kvjax.generation.programs import Program
from kvjax.generation.request import FULL, Options, Request
from kvjax.inputs.prompts import Prompts
from kvjax.model_interface import Model, encode_images


@dataclass(frozen=True)
class Timings:
    """Seconds of each phase, compilation apart, and programs compiled."""

    prefill: float
    compress: float
    decode: float
    compile: float
    compilations: int


def timed_generate(
    model: Model,
    prompts: Prompts | None = None,
    config: CompressionConfig = FULL,
    **options: Any,
) -> tuple[Generation, Timings]:
    """`generate` with its phases compiled and timed apart; keywords as there.

    Every layer's keys and values are alive between prefill and compression, which the one
    program avoids. Each call compiles anew, which is not in the phases' seconds.

    Raises:
      ValueError: as `generate`.
      TypeError: `stop`, `cache`, `return_cache`, `mesh`, or a keyword that `generate` lacks.
    """
    for name in ("stop", "cache"):
        if name in options:
            raise TypeError(f"timed_generate() got {name}=, which it does not take")
    request = Request.make(model, prompts, config, Options(**options))
    if request.prefilled is not None:
        raise ValueError("the prompts were prefilled before, expected prompts to be timed")
    recompress = request.recompress
    phases, config = Phases(), request.config
    observe, windows = probe_request(config, request.tokens.shape[1]), model.config.sliding_windows
    prompt = request.tokens, request.lengths

    def shrink(prompts, key):
        cache = prefill.compress_prefilled(prompts, windows, key, config)
        return with_room(cache, request.tail_slots)

    def answer_all(model, logits, cache, tokens, lengths, key, rules):
        answer = decode.start_answer(logits, tokens, lengths, key, rules, request.new_tokens)
        rest = recompress, request.new_tokens, config.fraction, False
        cache, ratio, held = decode.open_answer(model, cache, *rest)
        if recompress is None:
            return decode.decode(model, cache, answer, rules, request.new_tokens - 1)[1], held
        answer = decode.decode_in_segments(model, cache, answer, rules, recompress, ratio)[1]
        return answer, held

    def read(model, tokens, lengths, images, rope_length):
        features = encode_images(model, images).turned_for(rope_length)
        return prefill.prefill(model, tokens, lengths, observe, features)

    seen = request.images, request.rope_length
    read_prompts = phases.run("prefill", read, model, *prompt, *seen)
    cache = phases.run("compress", shrink, read_prompts, request.key)
    logits = read_prompts.logits
    del read_prompts
    answer, held = phases.run(
        "decode", answer_all, model, logits, cache, *prompt, request.key, request.rules
    )
    return as_generation(model, request, answer, held, None), phases.timings()


class Phases:
    """A stopwatch over functions that are compiled apart from being run."""

    def __init__(self):
        self.seconds = {"prefill": 0.0, "compress": 0.0, "decode": 0.0, "compile": 0.0}
        self.compilations = 0

    def run(self, phase: str, function: Callable, *arrays: Any) -> Any:
        """Compile `function` for `arrays`, run it to its end, and note both times."""
        began = time.perf_counter()
        compiled = Program(function).lower(*arrays).compile()
        ready = time.perf_counter()
        out = jax.block_until_ready(compiled(*arrays))
        self.seconds["compile"] += ready - began
        self.seconds[phase] += time.perf_counter() - ready
        self.compilations += 1
        return out

    def timings(self) -> Timings:
        """What was noted."""
        return Timings(**self.seconds, compilations=self.compilations)
