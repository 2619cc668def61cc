"""A call of `generate`, checked and turned into arrays."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, no_type_check

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Int, Key

from kvjax.cache.history import BEGUN, History, extended
from kvjax.cache.origin import fingerprint, owned
from kvjax.cache.state import Cache, for_rows
from kvjax.compression import scorers
from kvjax.compression.capacity import check_prompt, most_kept
from kvjax.compression.room import check_held
from kvjax.config import CompressionConfig, Recompress, check_config, check_repeat
from kvjax.exact import always_32_bits
from kvjax.generation.decode import Rules
from kvjax.generation.prefill import Prefilled, rope_lengths
from kvjax.generation.prefilled import PrefilledPrompts, refuse_beside
from kvjax.generation.programs import resize_program
from kvjax.generation.sampling import Sampling, row_keys
from kvjax.generation.suggestion import chosen
from kvjax.inputs.chat import Messages
from kvjax.inputs.multimodal import Pictures
from kvjax.inputs.prompts import (
    Ends,
    ModelInputs,
    Prompts,
    Row,
    bucket,
    check_context,
    eos_tokens,
    pad,
)
from kvjax.inputs.read import read
from kvjax.model_interface import Images, Model
from kvjax.sharding import mesh_of, put_on_mesh

FULL = CompressionConfig.named("full")
# Slots of the tail that a question to a cache starts with; twice as many, four times, ... for more.
TAIL = 256
# A cache that is handed back has a tail of whole blocks of slots.
BLOCK = 128
# Tokens of the prompt beside which an answer is decoded.
CONTEXT = 8
# Of a cache that does not say what it has read.
UNKNOWN = (History(turns=None),)
# What a tokenizer makes KVzip's instructions of: before the first chunk, before the others.
INSTRUCTIONS = (
    "\n\nRepeat the previous context exactly.\n",
    "\n\nRepeat the part of the previous context exactly, starting with\n",
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """The keywords of a call, as `kvjax.generate` documents them; the same for all that answer.

    Raises:
      ValueError: a keyword that cannot be, alone or beside another.
    """

    max_new_tokens: int
    tokenizer: Any = None
    sampling: Sampling | Literal["model"] | None = None
    seed: int | Sequence[int] = 0
    eos_ids: Ends | None = None
    stop: str | Sequence[str] = ()
    chat: bool = False
    messages: Messages | None = None
    template_args: Mapping[str, Any] | None = None
    attention_mask: np.ndarray | None = None
    images: Pictures | None = None
    cache: Cache | None = None
    recompress: Recompress | None = None

    def __post_init__(self):
        new = self.max_new_tokens
        if isinstance(new, bool) or not isinstance(new, int) or new < 1:
            raise ValueError(f"max_new_tokens={new!r}, expected an integer of at least 1")
        check_stops(self.stop, self.tokenizer)
        if self.images is not None and self.cache is not None:
            raise ValueError("images beside a cache are not read, expected them in its prompt")


def check_stops(stop: str | Sequence[str], tokenizer: Any) -> tuple[str, ...]:
    """The stop strings, however many.

    Raises:
      ValueError: one that is empty or no string, or no tokenizer beside them.
    """
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if not all(isinstance(text, str) and text for text in stops):
        raise ValueError(f"stop={list(stops)!r}, expected strings that are not empty")
    if stops and tokenizer is None:
        raise ValueError(f"stop={list(stops)!r} needs a tokenizer, got tokenizer=None")
    return stops


@no_type_check  # jax maps trees to other leaves than arrays
class Request(struct.PyTreeNode):
    """A call's arguments, checked and turned into arrays."""

    tokens: Int[Array, "B T"]
    lengths: Int[Array, " B"]
    key: Key[Array, " B"]
    rules: Rules
    cache: Cache | None
    images: Images | None
    rope_length: Int[Array, " B"] | None
    prefilled: Prefilled | None
    config: CompressionConfig = struct.field(pytree_node=False)
    new_tokens: int = struct.field(pytree_node=False)
    tail_slots: int = struct.field(pytree_node=False)
    tokenizer: Any = struct.field(pytree_node=False)
    stop: tuple[str, ...] = struct.field(pytree_node=False)
    inputs: ModelInputs = struct.field(pytree_node=False)
    history: tuple[History, ...] | None = struct.field(pytree_node=False)
    recompress: Recompress | None = struct.field(pytree_node=False, default=None)

    @property
    def contexts(self) -> list[list[int]]:
        """The tokens of each prompt beside which its answer is decoded."""
        return [row[-CONTEXT:] for row in self.inputs.rows]

    @classmethod
    @always_32_bits
    def make(
        cls,
        model: Model,
        prompts: Prompts | PrefilledPrompts | None,
        config: CompressionConfig,
        options: Options,
    ) -> "Request":
        """Check a call and turn it into arrays, on the mesh that the model lies on.

        Raises:
          ValueError: a wrong argument, named with its value and what was expected.
        """
        check_config(config)
        cache, recompress, new_tokens = options.cache, options.recompress, options.max_new_tokens
        tokenizer, shape = options.tokenizer, model.config
        config = instructed(config, tokenizer, shape.vocab_size)
        prefilled = prompts.arrays if isinstance(prompts, PrefilledPrompts) else None
        if recompress is not None:
            _check_recompress(recompress, config, cache)
            config = dataclasses.replace(
                config,
                layout="packed" if config.compresses else None,
                sums=config.sums or recompress.sums,
            )
        inputs = _inputs(model, prompts, config, options)
        rows = inputs.rows
        tokens, lengths = pad(rows)
        slots = new_tokens
        if recompress is not None:
            slots = min(new_tokens, recompress.every) + 1  # one for the token that is fed last
        if cache is None:
            check_rows(model, rows, config, new_tokens=new_tokens)
        else:
            cache = for_rows(owned(cache, model), len(rows))
            check_rows(model, rows, FULL, cache.next_positions.tolist(), new_tokens)
            # Wide steps: a later turn, whose tail has taken more, still finds its program.
            slots = doubled(slots + int(cache.tail.cursor) + tokens.shape[1])
            cache = with_tail(cache, slots)
        if recompress is not None:
            _check_held(recompress, shape, config, tokens.shape[1], lengths, cache)
        reads = cache is None and prefilled is None
        request = cls(
            tokens=jnp.asarray(tokens),
            lengths=jnp.asarray(lengths),
            key=row_keys(options.seed, len(rows)),
            rules=_rules(model, options),
            cache=cache,
            images=None if prefilled else inputs.images(tokens),
            rope_length=rope_lengths(model, lengths, new_tokens) if reads else None,
            prefilled=prefilled,
            config=config,
            new_tokens=new_tokens,
            tail_slots=bucket(slots) if cache is None else slots,
            tokenizer=tokenizer,
            stop=check_stops(options.stop, options.tokenizer),
            inputs=inputs,
            history=BEGUN if options.cache is None else options.cache.history,
            recompress=recompress,
        )
        return put_on_mesh(request, mesh_of(model))


def _rules(model: Model, options: Options) -> Rules:
    """How tokens are drawn, and which end a row."""
    sampling, shape = options.sampling or Sampling(), model.config
    if not isinstance(sampling, Sampling):
        sampling = chosen(sampling, shape.stated_sampling)
    eos = eos_tokens(options.eos_ids, shape.eos_token_ids, shape.vocab_size)
    return Rules(
        values=sampling.values,
        eos=jnp.array([*eos, -1], jnp.int32),
        switches=sampling.switches,
    )


def _inputs(
    model: Model,
    prompts: Prompts | PrefilledPrompts | None,
    config: CompressionConfig,
    options: Options,
) -> ModelInputs:
    """The prompts as tokens, read now or before."""
    if not isinstance(prompts, PrefilledPrompts):
        cache = options.cache
        return read(
            model, prompts, options.images, tokenizer=options.tokenizer, chat=options.chat,
            messages=options.messages, template_args=options.template_args,
            history=None if cache is None else cache.history or UNKNOWN,
            attention_mask=options.attention_mask, special=cache is None,
        )  # fmt: skip
    names = "cache", "attention_mask", "images", "messages", "template_args"
    given = {name: getattr(options, name) for name in names}
    refuse_beside(**given, chat=options.chat or None)
    prompts.check(model, config)
    prompts.check_following(options.max_new_tokens)
    return prompts.inputs


def following(max_new_tokens: int | Sequence[int], rows: int) -> Int[np.ndarray, " B"]:
    """Tokens that are to follow each row, from one number or one a row.

    Raises:
      ValueError: another number of them than rows, or one that is no integer of at least 0.
    """
    if isinstance(max_new_tokens, int | np.integer):
        each = [max_new_tokens] * rows
    else:
        each = list(max_new_tokens)
    whole = all(isinstance(n, int | np.integer) and not isinstance(n, bool) for n in each)
    if not whole or len(each) != rows or min(each) < 0:
        raise ValueError(
            f"max_new_tokens={max_new_tokens!r}, expected an integer of at least 0, or one for each"
            f" of the {rows} prompts"
        )
    return np.array(each, np.int32)


def doubled(slots: int) -> int:
    """TAIL slots, or as many times twice as many as hold these."""
    return TAIL * 2 ** max(0, (-(-slots // TAIL) - 1).bit_length())


def with_tail(cache: Cache, slots: int) -> Cache:
    """The cache with a tail of this many slots, at least as many as it has taken."""
    if cache.tail.positions.shape[1] == slots:
        return cache
    return cache.replace(tail=resize_program(cache.tail, slots=slots))


def handed_back(
    cache: Cache | None,
    model: Model,
    request: Request,
    answers: list[list[int]],
    texts: list[str] | None,
) -> Cache | None:
    """An answer's cache for the caller, its tail cut to the blocks that are in use.

    It says whose it is, and what it has read: the answers' tokens, and their texts as turns.
    """
    if cache is None:
        return None
    inputs = request.inputs
    history = extended(request.history, inputs.given, inputs.turns, answers, texts)
    cache = cache.replace(origin=fingerprint(model), history=history)
    slots = max(1, -(-int(cache.tail.cursor) // BLOCK)) * BLOCK
    return cache if slots >= cache.tail.positions.shape[1] else with_tail(cache, slots)


def _check_recompress(rule: Recompress, config: CompressionConfig, cache: Cache | None):
    if rule.sums and cache is not None and (cache.slots is None or cache.slots.sums is None):
        raise ValueError(
            f"recompress.scorer={rule.scorer!r} adds to sums that the cache does not have, expected"
            " one of a config with sums=True"
        )
    if rule.budget is not None:
        return
    if cache is not None or not config.keep_ratio or isinstance(config.budget, int):
        raise ValueError(
            "recompress.budget=None keeps the prompt's ratio, expected a method with keep_ratio,"
            " such as prefixkv, its budget a fraction of the prompt, and no cache"
        )


def _check_held(rule, shape, config: CompressionConfig, tokens: int, lengths, cache):
    """Raise ConfigError where a budget is less than what is kept of the fullest row."""
    windows, heads = shape.sliding_windows, shape.num_kv_heads
    if cache is not None:
        held = int(cache.counts.sum((1, 2)).max())
    else:
        held = most_kept(config, tokens, int(lengths.max()), windows, heads)
    check_held(rule, heads * len(windows), held)


def instructed(config: CompressionConfig, tokenizer: Any, vocab_size: int) -> CompressionConfig:
    """The config with KVzip's instructions as tokens, where it has none and there is a tokenizer.

    Unknown tokens are left out: a vocabulary without these words repeats without being told.
    """
    repeats = "reconstruction" in scorers.SCORERS[config.scorer].reads
    if not repeats or config.repeat is not None or tokenizer is None:
        return config
    unknown = getattr(tokenizer, "unk_token_id", None)
    spoken = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in INSTRUCTIONS]
    first, others = (
        tuple(token for token in ids if token != unknown and token < vocab_size) for ids in spoken
    )
    return dataclasses.replace(config, repeat=(first, others))


def check_rows(
    model: Model,
    rows: Sequence[Row],
    config: CompressionConfig,
    used: Sequence[int] = (),
    new_tokens: int = 0,
):
    """Raise ValueError where rows do not fit the model, or a window not the budget.

    `used` counts what the cache holds of each row already, nothing by default.
    """
    check_repeat(config, model.config.vocab_size)
    used = used or [0] * len(rows)
    check_context(rows, used, new_tokens, model.config.context)
    if config.profile is not None and len(config.profile) != model.config.num_layers:
        raise ValueError(
            f"profile has {len(config.profile)} layers, expected {model.config.num_layers}"
        )
    for row in rows:
        check_prompt(config, len(row))
