# ruff: noqa: RUF001 (LongBench's Chinese punctuation)
"""Score answers from 0 (wrong) to 1 (right), by the name that an `Ask` gives.

| name | benchmark | what is right |
|---|---|---|
| f1, line-f1 | LongBench QA | words in common with an answer, articles and punctuation aside |
| f1-zh | LongBench QA | the same over characters |
| rouge-l, line-rouge-l, rouge-l-zh | LongBench summaries | see `kvjax.eval.tasks.rouge` |
| edit-similarity | LongBench code | the first line that is code |
| line-classification | LongBench | the label, a share where several are named |
| count, retrieval, retrieval-zh | LongBench | the number, as a share of all that are named |
| match-all, match-part | RULER | the share of answers, or any of them, inside the prediction |
| substring | lost in the middle | the same as match-part |
| best-subspan-em | lost in the middle | any answer inside, articles and punctuation aside |
| last-number | LongEval | the last number |
| exact | the bundled model | the whole answer, spacing aside |

"line-" looks at the first line of the prediction alone, as LongBench does for few-shot tasks.
Several answers: the best score, except for match-all. Chinese is not segmented into words
(LongBench uses jieba): a character counts as a word, and so does a run of ASCII letters and digits.
Scores of "-zh" therefore differ from published ones. Edit similarity is that of fuzzywuzzy with
python-Levenshtein; without it, fuzzywuzzy takes difflib and gives some lines less.

Sources: LongBench metrics.py and eval.py (THUDM/LongBench @2e00731f), RULER eval/synthetic
(NVIDIA/RULER @c3f5e3b4), LongEval utils.py (DachengLi1/LongChat @4b5faa52), lost in the middle
metrics.py and evaluate_kv_responses.py (nelson-liu/lost-in-the-middle @29b8a6d0).
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from kvjax.eval.tasks.rouge import ratio, rouge_l

Metric = Callable[..., float]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_ASCII_PUNCTUATION = str.maketrans("", "", string.punctuation)
_CHINESE = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】"
    "〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏"
)
_PUNCTUATION = str.maketrans("", "", string.punctuation + _CHINESE)
_PIECE = re.compile(r"[A-Za-z0-9]+|\S")


# ---------------------------------------------------------------------------- words
def normalized(text: str) -> str:
    """Lower case without punctuation, English articles and repeated spaces (SQuAD's rule)."""
    plain = text.lower().translate(_ASCII_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", plain).split())


def _f1(prediction: Sequence[str], answer: Sequence[str]) -> float:
    common = (Counter(prediction) & Counter(answer)).total()
    if not common:
        return 0.0
    precision, recall = common / len(prediction), common / len(answer)
    return 2 * precision * recall / (precision + recall)


def _f1_en(prediction: str, answer: str) -> float:
    return _f1(normalized(prediction).split(), normalized(answer).split())


def _f1_zh(prediction: str, answer: str) -> float:
    texts = (text.lower().translate(_PUNCTUATION) for text in (prediction, answer))
    return _f1(*(_PIECE.findall(text) for text in texts))


def _rouge_zh(prediction: str, answer: str) -> float:
    return rouge_l(*(" ".join(_PIECE.findall(text)) for text in (prediction, answer)))


# ---------------------------------------------------------------------------- lines and numbers
def _code(prediction: str, answer: str) -> float:
    """Similarity of the first line without a sign of a comment or of Markdown."""
    lines = prediction.lstrip("\n").split("\n")
    plain = (line for line in lines if not any(sign in line for sign in ("`", "#", "//")))
    return ratio(next(plain, ""), answer)


def _share(prediction: str, wanted: str) -> float:
    """How many of the prediction's numbers are `wanted`, as a share."""
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(wanted) / len(numbers) if numbers else 0.0


def _numbered(word: str) -> Callable[[str, str], float]:
    pattern = re.compile(rf"{word}(\d+)")

    def score(prediction: str, answer: str) -> float:
        found = pattern.search(answer)
        if found is None:
            raise ValueError(f"answer {answer!r}, expected one like {word}1")
        return _share(prediction, found[1])

    return score


def _last_number(prediction: str, answer: str) -> float:
    numbers = re.findall(r"\d+", prediction)
    return float(bool(numbers) and numbers[-1].lstrip("0") == answer.lstrip("0"))


def _exact(prediction: str, answer: str) -> float:
    return float(prediction.split() == answer.split())


# ---------------------------------------------------------------------------- parts of a text
def _inside(prediction: str, answer: str) -> float:
    return float(answer.lower() in prediction.lower())


def _subspan(prediction: str, answer: str) -> float:
    return float(normalized(answer) in normalized(prediction))


def _match_all(prediction: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
    return sum(_inside(prediction, answer) for answer in answers) / len(answers)


def _classification(prediction: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
    """1 / (labels named in the prediction) where the right one is among them.

    Named labels that are a part of the right one do not count. LongBench takes them out of a list
    that it is going through, so the label after one that is taken out is passed over; so here.
    """
    best = 0.0
    for answer in answers:
        named = [label for label in classes if label in prediction]
        place = 0
        while place < len(named):
            if named[place] in answer and named[place] != answer:
                del named[place]
            place += 1
        best = max(best, 1 / len(named) if answer in named else 0.0)
    return best


# ---------------------------------------------------------------------------- the table
def _best(score: Callable[[str, str], float]) -> Metric:
    """The best score over all answers."""

    def metric(prediction: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
        return max(score(prediction, answer) for answer in answers)

    return metric


def _first_line(metric: Metric) -> Metric:
    def of_line(prediction: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
        return metric(prediction.lstrip("\n").split("\n")[0], answers, classes)

    return of_line


# name -> function(prediction, answers, classes=()) -> 0..1; at least one answer.
METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        "f1": _best(_f1_en),
        "f1-zh": _best(_f1_zh),
        "line-f1": _first_line(_best(_f1_en)),
        "rouge-l": _best(rouge_l),
        "rouge-l-zh": _best(_rouge_zh),
        "line-rouge-l": _first_line(_best(rouge_l)),
        "edit-similarity": _best(_code),
        "classification": _classification,
        "line-classification": _first_line(_classification),
        "count": _best(_share),
        "retrieval": _best(_numbered("Paragraph ")),
        "retrieval-zh": _best(_numbered("段落")),
        "match-all": _match_all,
        "match-part": _best(_inside),
        "substring": _best(_inside),
        "best-subspan-em": _best(_subspan),
        "last-number": _best(_last_number),
        "exact": _best(_exact),
    }
)
