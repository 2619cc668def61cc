"""LongEval's lines: a number that one of many lines holds.

Source: Li et al. 2023, "How long can open-source LLMs truly promise on context length?" (LMSYS);
prompt and numbers from DachengLi1/LongChat @4b5faa52, longeval/utils.py. Its files can be read.
"""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from kvjax.eval.tasks import words
from kvjax.eval.tasks.example import Document, Task, TaskSettings
from kvjax.eval.tasks.files import read_rows, shortened, text_of
from kvjax.eval.tasks.lengths import Draft, Sample, check_fits, document, drawn

_NAME = "longeval/lines"
_NEW_TOKENS = 100
_METRIC = "last-number"
_COUNT = 50
_BEFORE = (
    "Below is a record of lines I want you to remember. Each line begins with 'line <line index>'"
    " and contains a '<REGISTER_CONTENT>' at the end of the line as a numerical value. For each"
    " line index, memorize its corresponding <REGISTER_CONTENT>. At the end of the record, I will"
    " ask you to retrieve the corresponding <REGISTER_CONTENT> of a certain line index. Now the"
    " record start:\n\n"
)
_LINE = "line {key}: REGISTER_CONTENT is <{value}>\n"
_BEGIN = "\nNow the record is over."
_QUESTION = _BEGIN + " Tell me what is the <REGISTER_CONTENT> in line {key}? I need the number."


def _lines(rng: np.random.Generator, limit: int) -> Sample:
    """A unit is a line; which one is asked for is drawn as a share of the lines."""
    depth, keys, lines = rng.random(), words.pairs(rng), list[tuple[str, int]]()

    def build(units: int) -> Draft:
        missing = islice(keys, max(units - len(lines), 0))
        lines.extend((key, int(rng.integers(1, 50_001))) for key in missing)
        key, value = lines[int(depth * units)]
        record = "".join(_LINE.format(key=name, value=held) for name, held in lines[:units])
        return Draft(
            context=_BEFORE + record,
            question=_QUESTION.format(key=key),
            answers=(str(value),),
            facts={"lines": units, "position": int(depth * units)},
        )

    return Sample(build=build, least=2)


def _draw(settings: TaskSettings) -> Iterator[Document]:
    return drawn(_NAME, settings, _COUNT, _NEW_TOKENS, _METRIC, _lines)


def _read(path: Path, settings: TaskSettings) -> Iterator[Document]:
    for index, (place, row) in enumerate(read_rows(path)):
        if index == settings.count:
            return
        prompt = text_of(row, "prompt", place)
        at = prompt.rfind(_BEGIN)
        if at < 0:
            raise ValueError(f'{place}: "prompt" has no {_BEGIN!r}, expected a prompt of {_NAME}')
        number = row.get("expected_number")
        if type(number) is not int:
            raise ValueError(
                f'{place}: "expected_number" is {shortened(number)}, expected a whole number'
            )
        draft = Draft(
            context=prompt[:at],
            question=prompt[at:],
            answers=(str(number),),
            facts={"lines": row["num_lines"]} if "num_lines" in row else {},
        )
        check_fits(settings, place, draft, _NEW_TOKENS)
        yield document(f"{_NAME}/{index}", _NAME, draft, _NEW_TOKENS, _METRIC)


TASK = Task(
    name=_NAME,
    metric=_METRIC,
    source="LongEval, Li et al. 2023 (LMSYS), DachengLi1/LongChat @4b5faa52",
    needs=("tokenizer", "length"),
    draw=_draw,
    read=_read,
    files=("lines.jsonl", "lines.jsonl.gz"),
    count=_COUNT,
)
