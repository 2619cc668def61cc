"""Define what a task is: documents, and what is asked about each of them.

A prompt is the context followed by the question and, where there is one, by the beginning of the
answer (`lead`). A cache that is compressed before the question is known is made of the context
alone and serves every question of its document; so all questions about one context are one
`Document`.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvjax.config import ConfigError

# What stands for a picture in a document, whatever a model's own token is.
IMAGE = "<image>"


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One question about a document.

    Attributes:
      id: unique among all questions; of one row of a file, that row's own id if it has one.
      question: the text right after the context; "" where the answer simply continues it.
      answers: accepted answers, at least one; all of them are wanted with "match-all". With the
        metric "perplexity" the only one is the continuation that is scored.
      new_tokens: most tokens to generate, at least 1.
      metric: a name in `kvjax.eval.tasks.metrics.METRICS`, or "perplexity", which needs the model.
      lead: how the answer begins, given to the model right after the question; not generated.
      classes: all labels of a classification, () elsewhere.
      facts: what results are grouped by: numbers and texts that JSON can hold.
    """

    id: str
    question: str
    answers: tuple[str, ...]
    new_tokens: int
    metric: str
    lead: str = ""
    classes: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Document:
    """A context and the questions about it.

    Attributes:
      id: unique among all tasks.
      task: its task's name.
      context: the text that a cache is made of; IMAGE stands for each picture.
      asks: at least one.
      images: paths of the pictures, as they stand in the context.
    """

    id: str
    task: str
    context: str
    asks: tuple[Ask, ...]
    images: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """What documents are made from. A task looks at the fields that concern it.

    Attributes:
      tokenizer: a Hugging Face tokenizer (called with a text; `decode`), to measure lengths with.
      length: most tokens of context, question, lead and answer together, special tokens included.
        For the files of LongBench None means that nothing is cut.
      count: most documents; None for all that a file has, and for the task's own number where they
        are drawn.
      seed: of everything that is drawn, at least 0.
      data: the task's file, or a folder that holds it under its benchmark's name for it.
      haystack: a UTF-8 text (or a JSON file {"text": ...}, as RULER keeps its essays) that needles
        are hidden in; None for RULER's repeated sentences.
      reserve: tokens of `length` left free, for a chat template around the prompt.
      depths: where the needle of "needle" and the pair of "lost-in-the-middle/kv" lie, 0 (start)
        to 1 (end), document by document in turn. () is 0, 0.1, ... 1 for the former, and for the
        latter where chance or the file put it.
      lengths: the lengths of the heat map of "needle", `count` documents each; () for `length`.
      questions: most questions of a document of the bundled model's tasks.
      continuation: tokens after each prefix of a text ("perplexity", "rouge").

    Raises:
      ConfigError: a value outside its range.
    """

    tokenizer: Any = None
    length: int | None = None
    count: int | None = None
    seed: int = 0
    data: str | Path | None = None
    haystack: str | Path | None = None
    reserve: int = 0
    depths: tuple[float, ...] = ()
    lengths: tuple[int, ...] = ()
    questions: int = 1
    continuation: int = 128

    def __post_init__(self):
        least = {"length": 1, "count": 1, "seed": 0, "reserve": 0, "questions": 1}
        least |= {"continuation": 1}
        for name, smallest in least.items():
            value = getattr(self, name)
            if value is None and name in ("length", "count"):
                continue
            if not _whole(value, smallest):
                raise ConfigError(f"{name}={value!r}, expected an integer of at least {smallest}")
        for depth in self.depths:
            if isinstance(depth, bool) or not 0 <= depth <= 1:
                raise ConfigError(f"depths has {depth!r}, expected numbers from 0 to 1")
        for length in self.lengths:
            if not _whole(length, 1):
                raise ConfigError(f"lengths has {length!r}, expected integers of at least 1")


def _whole(value: Any, least: int) -> bool:
    return type(value) is int and value >= least


_EXPECTED = {
    "tokenizer": "a Hugging Face tokenizer to measure lengths with",
    "length": "a number of tokens",
    "data": "the task's file, or a folder that holds it",
}


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task of a benchmark.

    Attributes:
      name: its key in `kvjax.eval.tasks.TASKS`.
      metric: of its questions, see `Ask`.
      source: paper, and the code that its parameters are from.
      needs: the fields of `TaskSettings` that must be set where documents are drawn.
      draw: draws documents; None for a task that is only read.
      read: reads documents from a file of the benchmark's own form; None for a task without files.
      files: the file's names in a folder, the first that is there counts.
      count: documents that are drawn where `TaskSettings.count` is None.
      chat: whether the benchmark puts the prompt into a chat model's template.
    """

    name: str
    metric: str
    source: str
    needs: tuple[str, ...] = ()
    draw: Callable[[TaskSettings], Iterator[Document]] | None = None
    read: Callable[[Path, TaskSettings], Iterator[Document]] | None = None
    files: tuple[str, ...] = ()
    count: int | None = None
    chat: bool = True

    def documents(self, settings: TaskSettings) -> Iterator[Document]:
        """The task's documents one after another; the same for the same settings.

        They are read where `settings.data` is a file, or a folder that holds the task's, and drawn
        otherwise.

        Raises:
          ConfigError: a setting that the task needs is missing.
          ValueError: now or while iterating: a file that is not of the task's form, a length that
            not even the smallest document keeps to.
          OSError: a file cannot be read.
        """
        path = self._file(settings)
        if self.read is not None and path is not None:
            return self.read(path, settings)
        for name in self.needs:
            if getattr(settings, name) is None and not (name == "length" and settings.lengths):
                raise ConfigError(f"{name}=None, expected {_EXPECTED[name]} for task {self.name}")
        if self.draw is None:
            lacks = f" without {' or '.join(self.files)}" if self.files else ""
            raise ConfigError(
                f"data={settings.data} is a folder{lacks}, expected the file of task {self.name}"
            )
        return self.draw(settings)

    def _file(self, settings: TaskSettings) -> Path | None:
        if settings.data is None:
            return None
        path = Path(settings.data)
        if path.is_dir():
            return next((path / name for name in self.files if (path / name).is_file()), None)
        # Finished prompts have one JSON object a line; a .json file is what some are drawn from.
        return None if self.draw is not None and path.suffix == ".json" else path
