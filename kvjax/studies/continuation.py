"""Measure how well a compressed prefix still predicts what follows, against the full cache."""

from dataclasses import dataclass

import numpy as np

from kvjax.config import CompressionConfig
from kvjax.likelihood import Scored, score
from kvjax.model_interface import Model

BATCH = 50


@dataclass(frozen=True)
class Result:
    """One method at one budget over all documents.

    Attributes:
      nll: mean over all target tokens, in nats.
      delta: what compression adds to it.
      agree: share of targets (the first of each document left out) whose likeliest token is the
        full cache's.
      kept: entries kept per head, the mean over documents, layers and heads.
    """

    nll: float
    delta: float
    agree: float
    kept: float


def evaluate(
    model: Model,
    documents: list[dict],
    config: CompressionConfig,
    full: list[Scored] | None,
    *,
    seed: int = 0,
) -> tuple[list[Scored], Result]:
    """Score every document; a document is {"ids": tokens, "prompt": tokens of its prefix}.

    `full` is the uncompressed run's scores, None for that run itself. The `random` scorer draws
    for each document anew, from `seed` and its index.
    """
    scores: list[Scored] = []
    # One shape for all batches: one compilation.
    prompts = [document["prompt"] for document in documents]
    rests = [len(document["ids"]) - document["prompt"] for document in documents]
    rows = min(BATCH, len(documents))
    for start in range(0, len(documents), rows):
        chosen = list(range(start, min(start + rows, len(documents))))
        filled = chosen + [chosen[-1]] * (rows - len(chosen))
        batch = score(
            model,
            [documents[index]["ids"] for index in filled],
            [documents[index]["prompt"] for index in filled],
            config,
            seed=[seed * len(documents) + index for index in filled],
            positions=True,
            pad_to=(max(prompts), max(rests)),
        )
        scores += batch[: len(chosen)]
    total = sum(len(scored.nll) for scored in scores)
    nll = sum(sum(scored.nll) for scored in scores) / total
    reference = scores if full is None else full
    same = sum(
        sum(a == b for a, b in zip(mine.top1[1:], theirs.top1[1:], strict=True))
        for mine, theirs in zip(scores, reference, strict=True)
    )
    base = sum(sum(scored.nll) for scored in reference) / total
    heads = model.config.num_layers * model.config.num_kv_heads
    return scores, Result(
        nll=nll,
        delta=nll - base,
        agree=same / (total - len(scores)),
        kept=float(np.mean([scored.kept / heads for scored in scores])),
    )
