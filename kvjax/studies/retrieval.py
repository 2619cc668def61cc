"""Ask questions about long documents of a compressed cache, and count right answers.

Two protocols. Question "seen": it ends the prompt, so that an observation window sees it (the first
token of the answer comes from the uncompressed prompt). "unseen": the document is compressed alone
and then asked, as a cache that serves many questions must be.

A prompt is prefilled once for all methods and budgets. A method's budgets are run-time numbers and
caches are widened to the prompt's bucket, so that one program compresses for all budgets, and one
decodes all caches; what is kept does not change.

B prompts, T tokens of a bucket, O tokens of an answer, L layers, K KV heads.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial, reduce
from operator import or_

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from kvjax.cache.padded import PaddedLayer
from kvjax.cache.state import Cache, with_room
from kvjax.compression.compress import Packing, add_layer, finish, make_plan, probe_request
from kvjax.compression.row_budgets import make_rows
from kvjax.config import CompressionConfig
from kvjax.generation import decode, prefill
from kvjax.inputs.prompts import bucket, pad
from kvjax.model_interface import Model, ProbeRequest
from kvjax.tiny.questions import Item

PROTOCOLS = {"seen": "question seen", "unseen": "question unseen"}
ROWS = 50  # prompts at once
_MOST = 0.999  # of a prompt: every smaller budget shares its program


@dataclass(frozen=True)
class Outcome:
    """One method at one budget over all prompts.

    Attributes:
      right: `[B]` whether the answer was the expected one to the last token.
      kept: `[B, L, K]` entries of the prompt that were held, counted in the cache.
      positions: `[L, K, S]` of the first prompt, -1 in empty slots.
    """

    right: Bool[np.ndarray, " B"]
    kept: Int[np.ndarray, "B L K"]
    positions: Int[np.ndarray, "L K S"]


def ask(
    model: Model,
    items: Sequence[Item],
    configs: Sequence[CompressionConfig],
    protocol: str,
    *,
    seed: int = 0,
) -> list[Outcome]:
    """Answer every item under every config, greedily.

    Args:
      model: a decoder.
      items: the prompts.
      configs: methods and budgets; those that observe a window observe at most 32 tokens.
      protocol: where the question stands, a key of PROTOCOLS.
      seed: of the `random` scorer.

    Raises:
      ValueError: an unknown protocol.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol={protocol!r}, expected 'seen' or 'unseen'")
    seen = protocol == "seen"
    prompts = [[*item.document, *(item.question if seen else ())] for item in items]
    longest = max(len(prompt) for prompt in prompts)
    room = max(len(item.answer) for item in items)
    questions, _ = pad([item.question for item in items])
    asked = [probe_request(widest(config), bucket(longest)) for config in configs]
    request = reduce(or_, asked, ProbeRequest())
    right: list[list[bool]] = [[] for _ in configs]
    kept: list[list[np.ndarray]] = [[] for _ in configs]
    first: list[np.ndarray] = []
    for start in range(0, len(items), ROWS):
        chosen = range(start, min(start + ROWS, len(items)))
        # A last batch that is short is filled up: one shape, one compilation.
        rows = [*chosen, *[chosen[-1]] * (min(ROWS, len(items)) - len(chosen))]
        tokens, lengths = pad([prompts[row] for row in rows], at_least=longest)
        counts = jnp.array([len(items[row].question) for row in rows], jnp.int32)
        read = _prefill(model, tokens, lengths, request)
        logits, layers = read.logits, (read.keys, read.values, read.probes)
        # Every prompt draws for itself.
        key = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.array(rows))
        for index, config in enumerate(configs):
            budgets = make_rows(config, jnp.asarray(lengths))
            cache = compress_widest(*layers, budgets, key, config=widest(config))
            if seen:
                drawn = _decode(model, cache, logits, room=room)
            else:
                drawn = _ask(model, cache, questions[rows], counts, room=room)
            drawn = np.asarray(drawn)
            held = np.asarray(decode.kept_entries(cache))
            for place, row in enumerate(chosen):
                answer = list(items[row].answer)
                right[index].append(drawn[place, : len(answer)].tolist() == answer)
                kept[index].append(held[place])
            if start == 0:
                first.append(np.stack([np.asarray(layer.positions[0]) for layer in cache.layers]))
    return [
        Outcome(right=np.array(mine), kept=np.stack(held), positions=positions)
        for mine, held, positions in zip(right, kept, first, strict=True)
    ]


@partial(jax.jit, static_argnames="request")
def _prefill(model, tokens, lengths, request):
    return prefill.prefill(model, tokens, lengths, request)


def widest(config: CompressionConfig) -> CompressionConfig:
    """The config whose padded slots hold every budget of the method."""
    budget = config.budget
    if isinstance(budget, float) and budget < _MOST and config.profile is None:
        budget = _MOST
    return dataclasses.replace(config, layout="padded", budget=budget)


@partial(jax.jit, static_argnames="config")
def compress_widest(keys, values, probes, rows, key, *, config) -> Cache:
    """A cache with as many slots as the prompts have tokens, at the budgets of `rows`.

    Args:
      keys, values, probes: one a layer, from a prefill.
      rows: from `make_rows`, of the method at the budget that is wanted.
      key: of the `random` scorer.
      config: from `widest`.
    """
    tokens, windows = keys[0].shape[1], (None,) * len(keys)
    plan = make_plan(config, rows.lengths, tokens, windows, key, rows)
    kept = Packing()
    for index, layer in enumerate(zip(keys, values, probes, strict=True)):
        kept = add_layer(kept, index, *layer, plan)
    cache = finish(kept, plan)
    return cache.replace(layers=tuple(_widen(layer, tokens) for layer in cache.layers))


def _widen(layer: PaddedLayer, slots: int) -> PaddedLayer:
    """The layer with empty slots up to `slots`."""
    more = ((0, 0), (0, 0), (0, slots - layer.positions.shape[-1]))
    return PaddedLayer(
        keys=jnp.pad(layer.keys, (*more, (0, 0))),
        values=jnp.pad(layer.values, (*more, (0, 0))),
        positions=jnp.pad(layer.positions, more, constant_values=-1),
    )


@partial(jax.jit, static_argnames="room")
def _decode(model, cache, logits, *, room: int):
    rules = decode.greedy_rules()
    batch = logits.shape[0]
    prompt = jnp.zeros((batch, 1), jnp.int32), jnp.ones((batch,), jnp.int32)
    answer = decode.start_answer(logits, *prompt, jax.random.key(0), rules, room)
    slots = cache.tail.positions.shape[1] + room
    return decode.decode(model, with_room(cache, slots), answer, rules, room - 1)[1].tokens


@partial(jax.jit, static_argnames="room")
def _ask(model, cache, questions, counts, *, room: int):
    cache = with_room(cache, questions.shape[1])
    logits, cache = prefill.extend_prompt(model, questions, counts, cache)
    return _decode(model, cache, logits, room=room)


def interval(right: Bool[np.ndarray, " B"], *, draws: int = 2000, seed: int = 0):
    """Bootstrap 95 % interval of the share that is right: (low, high)."""
    rng = np.random.default_rng(seed)
    shares = rng.choice(right, (draws, len(right))).mean(axis=1)
    return tuple(float(edge) for edge in np.quantile(shares, (0.025, 0.975)))
