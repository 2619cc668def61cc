"""Settings of the bundled model's training: a flat TOML file, checked."""

import bisect
import dataclasses
import itertools
from pathlib import Path
from typing import Any

from kvjax.settings import read_settings
from kvjax.tiny.tasks import TASKS
from kvjax.tiny.vocabulary import BOS, EOS, SYMBOLS, VOCABULARY


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """One step of the curriculum.

    Attributes:
      steps: optimiser steps, >= 1.
      length: tokens of a sequence, >= 32.
      batch: sequences of a step, >= 1.
      alphabet: how many keys and values occur, 4..SYMBOLS.
      needles: the most facts of a document, >= 2.
      tasks: their names, repeated in proportion to how often each is drawn.
    """

    steps: int
    length: int
    batch: int
    alphabet: int
    needles: int
    tasks: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """A training run; every field is a key of the file.

    Attributes:
      seed: of weights and data.
      layers, width, mlp, heads, kv_heads, head_dim: L, D, F, N, K, H.
      rope_theta, context: of the model's config.
      muon_rate: peak learning rate of matrices (Muon).
      adam_rate: peak learning rate of embeddings and norms (Adam).
      warmup: steps of linear warm-up; a cosine follows, down to `final_rate` of the peak.
      cycles: steps of each such warm-up and cosine; together those of all stages.
      peaks: what each cycle's peak is of the rates above.
      clip: global norm of the gradient at most.
      filler_weight: of the loss of words in sentences; words of answers weigh 1.
      rehearse: every so many steps, a step is one of the three stages before its own, in turn, so
        that what was learnt at short lengths is not lost at long ones.
      log_every, evaluate_every, save_every: steps.
      steps, lengths, batches, alphabets, needles: one entry a stage, see `Stage`.
      tasks: one entry a stage: names separated by spaces, a name as often as its weight.
    """

    seed: int
    layers: int
    width: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    rope_theta: float
    context: int
    muon_rate: float
    adam_rate: float
    warmup: int
    cycles: tuple[int, ...]
    peaks: tuple[float, ...]
    final_rate: float
    clip: float
    filler_weight: float
    rehearse: int
    log_every: int
    evaluate_every: int
    save_every: int
    steps: tuple[int, ...]
    lengths: tuple[int, ...]
    batches: tuple[int, ...]
    alphabets: tuple[int, ...]
    needles: tuple[int, ...]
    tasks: tuple[str, ...]

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            entries = value if isinstance(value, tuple) else (value,)
            for entry in entries:
                if not isinstance(entry, str) and not entry > 0 and field.name != "seed":
                    raise ValueError(f"{field.name} = {value!r}, expected numbers above 0")
            of_cycles = field.name in ("cycles", "peaks")
            if isinstance(value, tuple) and not of_cycles and len(value) != len(self.steps):
                raise ValueError(
                    f"{field.name} has {len(value)} entries, expected one for each of the"
                    f" {len(self.steps)} stages"
                )
        if len(self.cycles) != len(self.peaks) or sum(self.cycles) != self.total_steps:
            raise ValueError(
                f"cycles = {self.cycles!r}, expected {self.total_steps} steps in all (those of the"
                f" stages) and an entry for each of the {len(self.peaks)} peaks"
            )
        for stage in self.stages:
            _check(stage, self.context)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The curriculum in order."""
        lists = [self.steps, self.lengths, self.batches, self.alphabets, self.needles]
        return tuple(
            Stage(
                steps=steps,
                length=length,
                batch=batch,
                alphabet=alphabet,
                needles=needles,
                tasks=tuple(tasks.split()),
            )
            for steps, length, batch, alphabet, needles, tasks in zip(
                *lists, self.tasks, strict=True
            )
        )

    @property
    def total_steps(self) -> int:
        """Over all stages."""
        return sum(self.steps)

    def stage_at(self, step: int) -> Stage:
        """The stage that step 0 .. total_steps - 1 belongs to."""
        return self.stages[self._index(step)]

    def drawn_at(self, step: int) -> Stage:
        """The stage whose sequences step 0 .. total_steps - 1 sees: its own or a rehearsed one."""
        index = self._index(step)
        turn, left = divmod(step, self.rehearse)
        if index and not left:
            index -= 1 + turn % min(index, 3)
        return self.stages[index]

    def _index(self, step: int) -> int:
        ends = list(itertools.accumulate(self.steps))
        if not 0 <= step < ends[-1]:
            raise ValueError(f"step={step}, expected 0 to {ends[-1] - 1}")
        return bisect.bisect_right(ends, step)

    def hf_config(self) -> dict[str, Any]:
        """The model's `config.json`."""
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "vocab_size": VOCABULARY,
            "hidden_size": self.width,
            "intermediate_size": self.mlp,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.context,
            "rope_theta": self.rope_theta,
            "rms_norm_eps": 1e-6,
            "hidden_act": "silu",
            "attention_bias": False,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
            "bos_token_id": BOS,
            "eos_token_id": EOS,
            "dtype": "bfloat16",
        }


def _check(stage: Stage, context: int) -> None:
    if not 32 <= stage.length <= context:
        raise ValueError(f"lengths has {stage.length}, expected 32 to context = {context}")
    if not 4 <= stage.alphabet <= SYMBOLS:
        raise ValueError(f"alphabets has {stage.alphabet}, expected 4 to {SYMBOLS}")
    if stage.needles < 2:
        raise ValueError(f"needles has {stage.needles}, expected 2 or more")
    unknown = [task for task in stage.tasks if task not in TASKS]
    if unknown or not stage.tasks:
        raise ValueError(f"tasks has {' '.join(unknown)!r}, expected names of {', '.join(TASKS)}")


def load_settings(path: str | Path) -> Settings:
    """Read a settings file; ValueError and OSError as of `kvjax.settings.read_settings`."""
    return read_settings(path, Settings)
