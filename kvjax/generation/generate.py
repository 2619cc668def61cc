"""generate(), stream() and compress_prompt(): what users call, and the programs behind them.

`generate` is one compiled program. `stream` runs the same stages (`prefill.py`, `decode.py`) jitted
apart, and draws the same tokens.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from kvjax.cache.origin import fingerprint
from kvjax.cache.ratio import Ratio
from kvjax.cache.state import Cache, with_room
from kvjax.config import CompressionConfig, Recompress, check_config
from kvjax.exact import always_32_bits
from kvjax.generation import decode
from kvjax.generation.decode import Answer, Held
from kvjax.generation.detokenize import RunningText, cut_at_stop
from kvjax.generation.prefill import rope_lengths
from kvjax.generation.programs import (
    answer_program,
    ask_program,
    close_answer_program,
    decode_program,
    evict_program,
    flat,
    generate_program,
    open_answer_program,
    prefill_compress_program,
    start_answer_program,
)
from kvjax.generation.request import (
    FULL,
    Options,
    Request,
    check_rows,
    following,
    handed_back,
    instructed,
)
from kvjax.generation.sampling import Sampling, row_keys
from kvjax.inputs.multimodal import Pictures, read
from kvjax.inputs.prompts import Ends, Prompts, bucket, pad
from kvjax.model_interface import Model
from kvjax.sharding import place

# Tokens between two looks at the host while streaming.
CHUNK = 8


@dataclass(frozen=True)
class Generation:
    """Answers, one a row.

    Attributes:
      tokens: ids drawn, the end-of-sequence token included where one was drawn.
      log_probs: of each of them under the model itself (before temperature and filters).
      text: what continues the prompt's text, without special tokens, cut before a stop string;
        None without a tokenizer.
      kept: `[B, L, K]` entries of the prompt that each row, layer and head held.
      cache_bytes: bytes of keys and values held for the prompts, empty slots included; what several
        questions of one prompt share counts once.
      full_cache_bytes: what the uncompressed prompts' buckets would take.
      cache: the cache with question and answer, where it was asked for.
    """

    tokens: list[list[int]]
    log_probs: list[list[float]]
    text: list[str] | None
    kept: np.ndarray
    cache_bytes: int
    full_cache_bytes: int
    cache: Cache | None = None


@dataclass(frozen=True)
class Step:
    """What a stream has since the last step, one entry a row (rows that are done get nothing)."""

    tokens: list[list[int]]
    log_probs: list[list[float]]
    text: list[str] | None


def generate(
    model: Model,
    prompts: Prompts,
    config: CompressionConfig = FULL,
    *,
    max_new_tokens: int,
    tokenizer: Any = None,
    sampling: Sampling | Literal["model"] | None = None,
    seed: int | Sequence[int] = 0,
    eos_ids: Ends | None = None,
    stop: str | Sequence[str] = (),
    chat: bool = False,
    attention_mask: np.ndarray | None = None,
    images: Pictures | None = None,
    cache: Cache | None = None,
    return_cache: bool = False,
    recompress: Recompress | None = None,
    mesh: Mesh | None = None,
) -> Generation:
    """Answer prompts with a compressed cache, in one compiled program.

    Args:
      model: from `kvjax.load`.
      prompts: a text or texts, token ids or rows of them, or a padded `[B, T]` array.
      config: what to keep; everything by default.
      max_new_tokens: most tokens to draw a row, at least 1. A model that scales rotary frequencies
        by length (dynamic NTK, LongRoPE) has a row's chosen for its prompt and as many tokens more.
      tokenizer: from `kvjax.load`; needed for text and for `stop`.
      sampling: greedy by default; "model" for what the checkpoint's `generation_config.json`
        suggests.
      seed: of sampling, and of the `random` scorer: one number, or one a row. A row draws the same
        alone and in any batch; rows of one prompt need seeds of their own to differ.
      eos_ids: token or tokens that end a row; the model's own by default, () for none.
      stop: string or strings that end a row and are cut off (looked for on the host, every few
        tokens); one may be a special token, such as "<|im_end|>".
      chat: put each text into the tokenizer's chat template (the first turn; render later ones
        yourself, the template would begin anew).
      attention_mask: 1 for the real tokens of a padded array, on either side.
      images: of a vision-language model: each prompt's PIL images, paths or uint8 arrays
        `[height, width, 3]`, in the order of the image tokens that stand for them (`<image>` of
        LLaVA); a list for one prompt, a list of lists for several.
      cache: a cache from `compress_prompt` or from an earlier answer, which the prompts
        continue; a cache of one row serves any number of prompts. It is not changed. `config`
        has no effect then. Another model's is refused.
      return_cache: also hand back the cache with the answer in it, for the next turn.
      recompress: compress again and again while decoding, so that an answer of any length needs
        no more memory; the cache is packed then.
      mesh: with axes `data` and `model`, to split the model and the batch over; where the model
        lies by default (`kvjax.load(mesh=)`).

    Raises:
      ValueError: a wrong argument, named with its value and what was expected.
    """
    model = place(model, mesh)
    options = Options(
        max_new_tokens=max_new_tokens, tokenizer=tokenizer, sampling=sampling, seed=seed,
        eos_ids=eos_ids, stop=stop, chat=chat, attention_mask=attention_mask, images=images,
        cache=cache, recompress=recompress,
    )  # fmt: skip
    request = Request.make(model, prompts, config, options)
    if stop:
        return _collect(model, request, return_cache)
    common = {
        "new_tokens": max_new_tokens,
        "tail_slots": request.tail_slots,
        "whole": return_cache,
        "recompress": recompress,
    }
    arrays = request.tokens, request.lengths, request.key, request.rules
    if request.cache is None:
        prompt = request.images, request.rope_length
        found = generate_program(model, *arrays, *prompt, config=request.config, **common)
    else:
        found = answer_program(model, request.cache, *arrays, **common)
    return as_generation(model, request, *found)


def stream(
    model: Model,
    prompts: Prompts,
    config: CompressionConfig = FULL,
    *,
    mesh: Mesh | None = None,
    **options: Any,
) -> Iterator[Step]:
    """`generate`, a few tokens at a time: the same keywords (but `return_cache`), the same tokens.

    Raises:
      ValueError: as `generate`, at once and not with the first step.
      TypeError: a keyword that `generate` does not have.
    """
    model = place(model, mesh)
    request = Request.make(model, prompts, config, Options(**options))
    return (step for step, _ in _steps(model, request, CHUNK))


@always_32_bits
def compress_prompt(
    model: Model,
    prompts: Prompts,
    config: CompressionConfig,
    *,
    tokenizer: Any = None,
    seed: int | Sequence[int] = 0,
    attention_mask: np.ndarray | None = None,
    images: Pictures | None = None,
    max_new_tokens: int | Sequence[int] = 0,
    mesh: Mesh | None = None,
) -> Cache:
    """Compress documents once, to ask many questions of (`generate(cache=...)`).

    Arguments as in `generate`, but for `max_new_tokens`: tokens of questions and answers that are
    to follow, one number or one a document. They matter where the model scales rotary frequencies
    by length (dynamic NTK, LongRoPE): a row's are chosen for its document and as many more tokens,
    and stay so, however many follow. The questions are not seen while compressing.

    Raises:
      ValueError: as `generate`; max_new_tokens below 0, or another number of them than documents.
    """
    check_config(config)
    inputs = read(model, prompts, images, tokenizer=tokenizer, attention_mask=attention_mask)
    model = place(model, mesh)
    check_rows(model, inputs.rows, config)
    tokens, lengths = pad(inputs.rows)
    rope_length = rope_lengths(model, lengths, following(max_new_tokens, len(lengths)))
    config = instructed(config, tokenizer, model.config.vocab_size)
    prompt = tokens, lengths, row_keys(seed, len(lengths)), inputs.images(tokens), rope_length
    cache = prefill_compress_program(model, *prompt, config=config)[1]
    return cache.replace(origin=fingerprint(model))


# ---------------------------------------------------------------------------- host
class _State(NamedTuple):
    """A stream between two stages: what they pass on from one to the next."""

    cache: Cache
    ratio: Ratio | None
    held: Held
    answer: Answer


def _begin(model: Model, request: Request) -> _State:
    """The stages up to the first token of each row."""
    prompt, rule, asked = (request.tokens, request.lengths), request.recompress, request.cache
    if asked is None:
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
        return _State(cache, None, held, answer)
    cache, ratio, held = open_answer_program(
        model, cache, recompress=rule, new_tokens=request.new_tokens,
        fraction=request.config.fraction, asked=asked is not None,
    )  # fmt: skip
    return _State(cache, ratio, held, answer)


def _steps(model: Model, request: Request, chunk: int) -> Iterator[tuple[Step, _State]]:
    """The stages one by one; each step comes with the state after it."""
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
    tokens = _drawn(answer.tokens, answer.tokens, shown, count)
    log_probs = _drawn(answer.log_probs, answer.tokens, shown, count)
    pieces = [text.add(row) for text, row in zip(texts, tokens, strict=True)]
    if request.stop:
        before = (answer.tokens[:, :shown] >= 0).sum(-1).tolist()
        for row, text in enumerate(texts):
            if text.stopped:
                left = max(0, text.taken - before[row])
                tokens[row], log_probs[row] = tokens[row][:left], log_probs[row][:left]
    return Step(tokens, log_probs, pieces if request.tokenizer else None)


def _drawn(array: Array, tokens: Array, start: int, end: int) -> list[list]:
    """Each row's entries of columns start..end - 1 where a token was drawn."""
    block, drawn = np.asarray(array[:, start:end]), np.asarray(tokens[:, start:end]) >= 0
    return [row[mask].tolist() for row, mask in zip(block, drawn, strict=True)]


def _collect(model: Model, request: Request, return_cache: bool) -> Generation:
    """A stream's end as a Generation: how rows with stop strings are run."""
    # A cache that is handed back must not hold tokens drawn after a stop string.
    for _, state in _steps(model, request, 1 if return_cache else CHUNK):  # noqa: B007
        pass
    cache = None
    if return_cache:
        rule = request.recompress
        cache = close_answer_program(model, state.cache, state.answer, state.ratio, recompress=rule)
    return as_generation(model, request, state.answer, state.held, cache)


def as_generation(
    model: Model, request: Request, answer: Answer, held: Held, cache: Cache | None
) -> Generation:
    """What came of a request."""
    tokens = _drawn(answer.tokens, answer.tokens, 0, answer.tokens.shape[1])
    log_probs = _drawn(answer.log_probs, answer.tokens, 0, answer.tokens.shape[1])
    text = None
    if request.tokenizer is not None:
        cut = [
            cut_at_stop(row, request.tokenizer, request.stop, context)
            for row, context in zip(tokens, request.contexts, strict=True)
        ]
        text = [piece for piece, _ in cut]
        tokens = [row[:count] for row, (_, count) in zip(tokens, cut, strict=True)]
        log_probs = [row[:count] for row, (_, count) in zip(log_probs, cut, strict=True)]
    return Generation(
        tokens=tokens,
        log_probs=log_probs,
        text=text,
        kept=np.asarray(held.kept),
        cache_bytes=held.nbytes,
        full_cache_bytes=_full_bytes(model, request),
        cache=handed_back(cache, model),
    )


def _full_bytes(model: Model, request: Request) -> int:
    """Bytes of the prompts' keys and values with nothing evicted."""
    config, (batch, tokens) = model.config, request.tokens.shape
    if (cache := request.cache) is not None:
        batch, tokens = batch // cache.shared, bucket(int(cache.prompt_lengths.max()))
    itemsize = model.embed.table_VD[...].dtype.itemsize
    vectors = 2 * config.num_kv_heads * config.num_layers * batch * tokens
    return vectors * config.head_dim * itemsize
