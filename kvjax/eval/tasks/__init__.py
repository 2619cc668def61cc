"""The tasks of evaluations: documents, questions about them, and scores of answers.

    for document in TASKS["ruler/vt"].documents(TaskSettings(tokenizer=tokenizer, length=4096)):
        for ask in document.asks:
            prompt = document.context + ask.question + ask.lead
            ...
            score = METRICS[ask.metric](prediction, ask.answers, ask.classes)

| tasks | documents |
|---|---|
| ruler/... (13) | drawn for a tokenizer and a length, or read from RULER's own files |
| longbench/... (21) | read from LongBench's files |
| longeval/lines | drawn, or read from LongEval's files |
| lost-in-the-middle/kv | drawn, or read from its authors' files |
| needle | drawn: a heat map of depth and length |
| tiny/... (6) | drawn in the bundled model's own words |
| perplexity, rouge | any text, cut into prefixes and continuations |
| vision/perplexity, vision/rouge | pictures and questions, read from PrefixKV's files |

Plain Python and NumPy: nothing here runs a model.
"""

from collections.abc import Mapping
from types import MappingProxyType

from kvjax.eval.tasks import (
    longbench,
    longeval,
    lost_in_the_middle,
    needle,
    ruler,
    text,
    tiny,
    vision,
)
from kvjax.eval.tasks.example import Ask, Document, Task, TaskSettings
from kvjax.eval.tasks.metrics import METRICS

# name -> Task
TASKS: Mapping[str, Task] = MappingProxyType(
    {
        task.name: task
        for task in (
            *ruler.TASKS,
            *longbench.TASKS,
            longeval.TASK,
            lost_in_the_middle.TASK,
            needle.TASK,
            *tiny.TASKS,
            *text.TASKS,
            *vision.TASKS,
        )
    }
)

__all__ = ["METRICS", "TASKS", "Ask", "Document", "Task", "TaskSettings"]
