"""Settings of `kvjax eval`: a flat TOML file, checked."""

import dataclasses
from pathlib import Path

from kvjax.config import CompressionConfig, ConfigError, parse_budget
from kvjax.eval.tasks import TASKS
from kvjax.settings import read_settings
from kvjax.spelling import parse_method

PROTOCOLS = ("seen", "unseen")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """An evaluation; every field is a key of the file.

    Attributes:
      model: a Hugging Face directory, a GGUF file, "org/name" on the hub, or "tiny" for the bundled
        model.
      tasks: names of `kvjax.eval.tasks.TASKS`.
      methods: names of `kvjax.METHODS`, each with settings of its own if need be, as in
        "prefixkv:layers=uniform" or "snapkv/padded:window=64,kernel=5" (`kvjax.spelling`); results
        carry the entry as typed.
        "full" is run once, whatever the budgets.
      budgets: as typed on the command line: "25%" of the prompt, or "1024" entries a KV head.
      lengths: tokens of a prompt and its answer, for tasks that are generated or truncated.
      protocols: "seen", the question ends the prompt; "unseen", the context is compressed once and
        all its questions are asked of it.
      count: documents of each task and length at most.
      batch: documents at once.
      seed: of generated tasks and of the `random` scorer.
      dtype: of weights and cache.
      chat: put prompts into the tokenizer's chat template.
      questions: of each document of the bundled model's tasks at most.
      depths: where needles lie, 0 (start) to 1 (end); all tenths by default.
      continuation: tokens after each prefix of a text ("perplexity", "rouge").
      data: folder or file of tasks that are read.
      haystack: a text file that needles are hidden in; repeated sentences by default.
      window: last tokens observed, 0 for the default.
      layout: "padded", "packed" or "" for where it saves bytes.
      quantize: "int8" or "".
      prefill_once: prefill a batch once for all methods and budgets, whose keys and values are held
        whole meanwhile; otherwise once for each, layer by layer, in less memory.
      revision: branch, tag or commit of a name on the hub, "" for its main branch.
      max_context: most tokens of a prompt with its answer, 0 for what the model was trained for.
    """

    model: str
    tasks: tuple[str, ...]
    methods: tuple[str, ...]
    budgets: tuple[str, ...]
    lengths: tuple[int, ...] = (4096,)
    protocols: tuple[str, ...] = ("unseen",)
    count: int = 50
    batch: int = 4
    seed: int = 0
    dtype: str = "float32"
    chat: bool = False
    questions: int = 1
    depths: tuple[float, ...] = ()
    continuation: int = 128
    data: str = ""
    haystack: str = ""
    window: int = 0
    layout: str = ""
    quantize: str = ""
    prefill_once: bool = True
    max_context: int = 0
    revision: str = ""

    def __post_init__(self):
        for name, known in (("tasks", tuple(TASKS)), ("protocols", PROTOCOLS)):
            given = getattr(self, name)
            unknown = [value for value in given if value not in known]
            if unknown or not given or len(set(given)) < len(given):
                wrong = unknown[0] if unknown else list(given)
                raise ValueError(f"{name} has {wrong!r}, expected some of {', '.join(known)}, once")
        for name in ("count", "batch", "questions", "continuation"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}, expected at least 1")
        if self.max_context < 0:
            raise ValueError(f"max_context = {self.max_context}, expected at least 0")
        if not self.lengths or min(self.lengths) < 64:
            raise ValueError(f"lengths = {list(self.lengths)}, expected tokens of at least 64")
        self.configs()

    def configs(self) -> dict[tuple[str, str], CompressionConfig]:
        """Each (method, budget), as typed, and its config; the full cache's budget is "100%".

        Raises:
          ValueError: a method, budget or setting that there is not.
        """
        given = {name: getattr(self, name) or None for name in ("window", "layout", "quantize")}
        chosen = {name: value for name, value in given.items() if value is not None}
        found = {}
        for method in self.methods:
            for budget in ("100%",) if method == "full" else self.budgets:
                try:
                    entries = None if method == "full" else parse_budget(budget)
                    config = parse_method(method, entries, **chosen)
                except ConfigError as error:
                    raise ValueError(f"methods, budgets: {error}") from None
                found[method, budget] = config
        if not found:
            raise ValueError(
                f"methods = {list(self.methods)}, budgets = {list(self.budgets)},"
                " expected at least one of each"
            )
        return found


def load_eval_settings(path: str | Path) -> EvalSettings:
    """Read a settings file; ValueError and OSError as of `kvjax.settings.read_settings`."""
    return read_settings(path, EvalSettings)
