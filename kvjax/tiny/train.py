"""Train the bundled model: optax for the updates, orbax for checkpoints, exact resume.

Step i draws its batch from (seed, i) and nothing else, and a checkpoint holds all the rest: the
weights, the optimiser's state and how many steps are done. So a run that was killed and started
again ends in the same bits as one that was not.

B sequences, T tokens, V vocabulary.
"""

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from kvjax.models.checkpoints.export import save_decoder
from kvjax.models.config import ModelConfig
from kvjax.models.decoder import Decoder
from kvjax.tiny.batches import Batch, loss_weights, training_batch
from kvjax.tiny.settings import Settings
from kvjax.tiny.vocabulary import tokenizer

# The layers' matrices are for Muon; the rest is left to Adam.
_MATRICES = ("q_DX", "k_DY", "v_DY", "o_XD", "gate_DF", "up_DF", "down_FD")
_EVALUATION_SEED, _EVALUATED = 1_000_003, 16  # documents a task


class State(NamedTuple):
    """Everything that the next step depends on."""

    step: Int[np.ndarray, ""]
    params: Any
    optimizer: optax.OptState


def make_optimizer(settings: Settings) -> optax.GradientTransformation:
    """Muon for matrices, Adam for embeddings and norms; warm-up, cosine, clipping."""

    def rate(peak: float) -> optax.Schedule:
        cycles = [
            optax.warmup_cosine_decay_schedule(
                0.0, peak * part, settings.warmup, steps, peak * part * settings.final_rate
            )
            for steps, part in zip(settings.cycles, settings.peaks, strict=True)
        ]
        return optax.join_schedules(cycles, np.cumsum(settings.cycles)[:-1].tolist())

    def matrices(params: Any) -> Any:
        def axes(path, _):
            return optax.contrib.MuonDimensionNumbers() if path[-1].key in _MATRICES else None

        return jax.tree_util.tree_map_with_path(axes, params)

    return optax.chain(
        optax.clip_by_global_norm(settings.clip),
        optax.contrib.muon(
            rate(settings.muon_rate),
            adam_learning_rate=rate(settings.adam_rate),
            adam_b2=0.95,
            muon_weight_dimension_numbers=matrices,
        ),
    )


def new_model(settings: Settings) -> Decoder:
    """Random weights, embeddings a tenth of unit variance as they are the head too."""
    config = ModelConfig.from_hf(settings.hf_config())
    model = Decoder(config, rngs=nnx.Rngs(settings.seed))
    model.embed.table_VD[...] *= 0.1
    return model


def next_token_losses(
    model: Decoder, tokens: Int[Array, "B T"]
) -> tuple[Float[Array, "B T"], Array]:
    """Cross-entropy of each token under the tokens before it, and whether it was the likeliest.

    Both are 0 for the first token of a sequence.
    """
    logits_BTV = model(tokens)[:, :-1]
    losses_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, tokens[:, 1:])
    hits_BT = logits_BTV.argmax(-1) == tokens[:, 1:]
    return jnp.pad(losses_BT, ((0, 0), (1, 0))), jnp.pad(hits_BT, ((0, 0), (1, 0)))


def make_update(graph: Any, optimizer: optax.GradientTransformation) -> Callable:
    """The compiled step: (state, tokens, weights) -> (state, loss)."""

    def loss_of(params, tokens, weights):
        losses_BT, _ = next_token_losses(nnx.merge(graph, params), tokens)
        return (losses_BT * weights).sum() / weights.sum()

    @jax.jit
    def update(state: State, tokens, weights):
        loss, gradients = jax.value_and_grad(loss_of)(state.params, tokens, weights)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        return State(state.step + 1, params, optimizer_state), loss

    return update


def evaluate(graph: Any, params: Any, settings: Settings, step: int) -> dict[str, float]:
    """Share of answers right to the last token, by task, at the stage's length (teacher-forced)."""
    stage = settings.stage_at(step)
    results = {}
    for task in dict.fromkeys(stage.tasks):
        if task == "stream":
            continue
        batch = training_batch(
            (_EVALUATION_SEED, stage.length),
            [task] * _EVALUATED,
            stage.length,
            needles=stage.needles,
            alphabet=stage.alphabet,
        )
        right = [_hits(graph, params, batch.tokens[i : i + 4]) for i in range(0, _EVALUATED, 4)]
        results[task] = _exact(batch, np.concatenate(right))
    return results


@jax.jit(static_argnums=0)
def _hits(graph, params, tokens):
    return next_token_losses(nnx.merge(graph, params), tokens)[1]


def _exact(batch: Batch, hits: np.ndarray) -> float:
    whole = [
        hits[row][batch.turns[row] == turn].all()
        for row in range(len(hits))
        for turn in range(1, batch.turns[row].max() + 1)
    ]
    return float(np.mean(whole))


def train(settings: Settings, out: str | Path, *, progress: bool = True) -> Path:
    """Run, or go on with, a training run.

    Args:
      settings: the run.
      out: a folder: `checkpoints/`, `log.csv`, and at the end `model/`, a Hugging Face directory.
        Where it holds checkpoints of the same settings, the run goes on from the last one.
      progress: whether to show a bar on stderr.

    Returns:
      The path of the Hugging Face directory.

    Raises:
      ValueError: `out` holds a run with other settings.
    """
    folder = Path(out).resolve()
    _claim(folder, settings)
    graph, weights = nnx.split(new_model(settings), nnx.Param)
    optimizer, params = make_optimizer(settings), nnx.to_pure_dict(weights)
    state = State(np.zeros((), np.int32), params, optimizer.init(params))
    update = make_update(graph, optimizer)
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    with ocp.CheckpointManager(folder / "checkpoints", options=options) as checkpoints:
        if (latest := checkpoints.latest_step()) is not None:
            restored: Any = checkpoints.restore(latest, args=ocp.args.StandardRestore(state))
            state = State(*restored)
        start = int(state.step)
        log = _Log(folder / "log.csv", settings, start)
        steps = range(start, settings.total_steps)
        bar = tqdm(steps, "train", settings.total_steps, initial=start, disable=not progress)
        for step in bar:
            stage = settings.stage_at(step)
            batch = _batch(settings, step)
            state, loss = update(state, batch.tokens, loss_weights(batch, settings.filler_weight))
            done, last = step + 1, step + 1 == settings.total_steps
            log.add(loss)
            if done % settings.evaluate_every == 0 or last:
                log.write(done, stage, evaluate(graph, state.params, settings, step))
            elif done % settings.log_every == 0:
                log.write(done, stage, {})
            bar.set_postfix_str(log.summary, refresh=False)
            if done % settings.save_every == 0 or last:
                checkpoints.save(done, args=ocp.args.StandardSave(state))
    return export(nnx.merge(graph, state.params), settings, folder / "model")


def _batch(settings: Settings, step: int) -> Batch:
    stage = settings.drawn_at(step)
    # Tasks in turn: every step of a long curriculum sees all that its batch has room for.
    first = step * stage.batch
    tasks = [stage.tasks[(first + row) % len(stage.tasks)] for row in range(stage.batch)]
    return training_batch(
        (settings.seed, step),
        tasks,
        stage.length,
        needles=stage.needles,
        alphabet=stage.alphabet,
    )


def export(model: Decoder, settings: Settings, directory: Path) -> Path:
    """Write the model as a Hugging Face directory, in bfloat16, with its tokenizer."""
    save_decoder(model, directory, settings.hf_config())
    tokenizer().save(str(directory / "tokenizer.json"))
    roles = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "model_max_length": settings.context,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(roles, indent=2) + "\n")
    return directory


def read_log(out: str | Path) -> list[dict[str, str]]:
    """The rows of a run's `log.csv`."""
    with (Path(out) / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def _claim(folder: Path, settings: Settings) -> None:
    """Make the folder this run's own, or see that it is."""
    folder.mkdir(parents=True, exist_ok=True)
    path, text = folder / "settings.txt", repr(settings) + "\n"
    if not path.exists():
        temporary = path.with_suffix(".part")
        temporary.write_text(text)
        os.replace(temporary, path)
    elif path.read_text() != text:
        raise ValueError(f"out={str(folder)!r} holds a run with other settings, expected a new one")


class _Log:
    """`log.csv`: a row every few steps. A resumed run drops the rows after its checkpoint."""

    def __init__(self, path: Path, settings: Settings, start: int):
        tasks = dict.fromkeys(task for stage in settings.stages for task in stage.tasks)
        self.columns = ["step", "length", "alphabet", "loss", *(t for t in tasks if t != "stream")]
        self.path = path
        self.losses: list[Any] = []
        self.summary = ""
        rows = []
        if start and path.exists():
            with path.open(newline="") as file:
                rows = [row for row in csv.DictReader(file) if int(row["step"]) <= start]
        temporary = path.with_suffix(".part")
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(rows)
        os.replace(temporary, path)

    def add(self, loss: Any) -> None:
        self.losses.append(loss)

    def write(self, step: int, stage: Any, accuracies: dict[str, float]) -> None:
        loss = float(np.mean(jax.device_get(self.losses)))
        self.losses = []
        row = {"step": step, "length": stage.length, "alphabet": stage.alphabet}
        row |= {"loss": f"{loss:.4f}"} | {task: f"{x:.4f}" for task, x in accuracies.items()}
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.columns).writerow(row)
        shown = [f"loss {loss:.3f}", *(f"{task} {x:.0%}" for task, x in accuracies.items())]
        self.summary = " ".join(shown)
