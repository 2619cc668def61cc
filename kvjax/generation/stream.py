"""stream(): the stages of an answer jitted apart, its tokens handed out as they are drawn."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from kvjax.cache.ratio import Ratio
from kvjax.cache.state import Cache, with_room
from kvjax.config import CompressionConfig
from kvjax.generation import decode
from kvjax.generation.decode import Answer, Held
from kvjax.generation.detokenize import RunningText
from kvjax.generation.prefilled import PrefilledPrompts
from kvjax.generation.programs import (
    ask_program,
    close_answer_program,
    compress_program,
    decode_program,
    evict_program,
    flat,
    open_answer_program,
    prefill_compress_program,
    start_answer_program,
)
from kvjax.generation.request import FULL, Options, Request, handed_back
from kvjax.inputs.prompts import Prompts
from kvjax.model_interface import Model
from kvjax.sharding import place

# Tokens between two looks at the host while streaming.
CHUNK = 8


@dataclass(frozen=True)
class Step:
    """What a stream has since the last step, one entry a row (rows that are done get nothing).

    `cache` is that of `return_cache`, in a last step without tokens.
    """

    tokens: list[list[int]]
    log_probs: list[list[float]]
    text: list[str] | None
    cache: Cache | None = None


def stream(
    model: Model,
    prompts: Prompts | PrefilledPrompts | None = None,
    config: CompressionConfig = FULL,
    *,
    return_cache: bool = False,
    mesh: Mesh | None = None,
    **options: Any,
) -> Iterator[Step]:
    """`generate`, a few tokens at a time: the same keywords, the same tokens.

    Raises:
      ValueError: as `generate`, at once and not with the first step.
      TypeError: a keyword that `generate` does not have.
    """
    model = place(model, mesh)
    request = Request.make(model, prompts, config, Options(**options))
    return _streamed(model, request, return_cache)


# ---------------------------------------------------------------------------- host
class State(NamedTuple):
    """A stream between two stages: what they pass on from one to the next."""

    cache: Cache
    ratio: Ratio | None
    held: Held
    answer: Answer


def _begin(model: Model, request: Request) -> State:
    """The stages up to the first token of each row."""
    prompt, rule, asked = (request.tokens, request.lengths), request.recompress, request.cache
    if request.prefilled is not None:
        windows, logits = model.config.sliding_windows, request.prefilled.logits
        cache = compress_program(
            request.prefilled, request.key, windows=windows, config=request.config
        )
        cache = with_room(cache, request.tail_slots)
    elif asked is None:
        rest, config = (request.key, request.images, request.rope_length), request.config
        logits, cache = prefill_compress_program(model, *prompt, *rest, config=config)
        cache = with_room(cache, request.tail_slots)
    else:
        slots = request.tail_slots
        logits, cache = ask_program(model, asked, *prompt, tail_slots=slots, recompress=rule)
    answer = start_answer_program(
        logits, *prompt, request.key, request.rules, room=request.new_tokens
    )
    if rule is None:
        held = Held(kept=decode.kept_entries(cache), nbytes=cache.nbytes)
        return State(cache, None, held, answer)
    cache, ratio, held = open_answer_program(
        model, cache, recompress=rule, new_tokens=request.new_tokens,
        fraction=request.config.fraction, asked=asked is not None,
    )  # fmt: skip
    return State(cache, ratio, held, answer)


def stages(model: Model, request: Request, chunk: int) -> Iterator[tuple[Step, State]]:
    """The stages one by one, `chunk` tokens at a time; each step comes with the state after it."""
    state, rule = _begin(model, request), request.recompress
    entries, parts = state.cache.without_tail(), flat(model)
    texts = [RunningText(request.tokenizer, request.stop, row) for row in request.contexts]
    shown, segment = 0, 1  # tokens shown, and where the segment began
    while True:
        count = int(state.answer.count)
        step = _step(request, texts, state.answer, shown, count)
        shown = count
        done = state.answer.done | np.array([text.stopped for text in texts])
        finished = count >= request.new_tokens or bool(done.all())
        if finished and step.text is not None:
            pieces = [piece + text.flush() for piece, text in zip(step.text, texts, strict=True)]
            step = dataclasses.replace(step, text=pieces)
        state = state._replace(answer=state.answer.replace(done=done))
        yield step, state
        if finished:
            return
        if rule is not None and count - segment == rule.every:
            windows, segment = model.config.sliding_windows, count
            cache = evict_program(state.cache, state.ratio, recompress=rule, windows=windows)
            state, entries = state._replace(cache=cache), cache.without_tail()
        steps = min(chunk, request.new_tokens - count)
        if rule is not None:
            steps = min(steps, segment + rule.every - count)
        entries = entries.replace(next_positions=state.cache.next_positions)
        tail, next_positions, answer = decode_program(
            parts, entries, state.cache.tail, state.answer, request.rules, steps=steps
        )
        cache = state.cache.replace(tail=tail, next_positions=next_positions)
        state = state._replace(cache=cache, answer=answer)


def _step(
    request: Request, texts: Sequence[RunningText], answer: Answer, shown: int, count: int
) -> Step:
    """What has come since `shown` tokens: nothing that was drawn after a stop string."""
    tokens = decode.drawn(answer.tokens, answer.tokens, shown, count)
    log_probs = decode.drawn(answer.log_probs, answer.tokens, shown, count)
    pieces = [text.add(row) for text, row in zip(texts, tokens, strict=True)]
    if request.stop:
        before = (answer.tokens[:, :shown] >= 0).sum(-1).tolist()
        for row, text in enumerate(texts):
            if text.stopped:
                left = max(0, text.taken - before[row])
                tokens[row], log_probs[row] = tokens[row][:left], log_probs[row][:left]
    return Step(tokens, log_probs, pieces if request.tokenizer else None)


def _streamed(model: Model, request: Request, return_cache: bool) -> Iterator[Step]:
    """The steps of a stream, and after them its cache, where that is asked for."""
    tokens: list[list[int]] = [[] for _ in request.contexts]
    texts = [""] * len(tokens)
    # A cache that is handed back must not hold tokens drawn after a stop string.
    chunk = 1 if return_cache and request.stop else CHUNK
    for step, state in stages(model, request, chunk):  # noqa: B007
        yield step
        for row, more in enumerate(step.tokens):
            tokens[row] += more
            texts[row] += step.text[row] if step.text is not None else ""
    if return_cache:
        told = None if step.text is None else texts
        cache = handed_back(closed(model, request, state), model, request, tokens, told)
        nothing: list[list] = [[] for _ in tokens]
        yield Step(nothing, nothing, None if told is None else [""] * len(texts), cache)


def closed(model: Model, request: Request, state: State) -> Cache:
    """The cache at a stream's end, with the whole answer in it."""
    rule = request.recompress
    return close_answer_program(model, state.cache, state.answer, state.ratio, recompress=rule)
