"""Scores of answers, by literal values.

Numbers of LongBench's metrics are what its metrics.py (with rouge 1.0.1, fuzzywuzzy 0.18 and
python-Levenshtein) gives for the same texts; those of other benchmarks follow from their rules.
"""

import itertools
import random

import pytest

from kvjax.eval.tasks import METRICS, TASKS
from kvjax.eval.tasks.rouge import lcs, lcs_table, ratio, rouge_l

CASES = [
    # ---- LongBench, words in common
    ("f1", "The cat sat on the mat.", ["a cat on a mat"], 6 / 7),
    ("f1", "Paris, France", ["paris"], 2 / 3),
    ("f1", "Paris, France", ["London", "Paris, France"], 1.0),
    ("f1", "no", ["yes"], 0.0),
    ("f1", "", ["yes"], 0.0),
    ("f1", "yes\nno", ["yes"], 2 / 3),
    ("line-f1", "yes\nno", ["yes"], 1.0),
    ("line-f1", "\n\nyes\nno", ["yes"], 1.0),
    # Characters, and runs of ASCII letters; LongBench's words would give 0 for the first.
    ("f1-zh", "苹果公司", ["苹果"], 2 / 3),
    ("f1-zh", "北京。", ["北京"], 1.0),
    ("f1-zh", "iPhone 4", ["iphone4", "iPhone"], 2 / 3),
    # ---- LongBench, summaries
    ("rouge-l", "the cat sat on the mat", ["the cat lay on the mat"], 0.7999999950000002),
    (
        "rouge-l",
        "police killed the gunman. he was armed.",
        ["the gunman was shot by police. police killed him"],
        0.6666666616888889,
    ),
    # Lin's own example of a union: w1 w2 w3 w5 of the reference.
    ("rouge-l", "w1 w2 w6 w7 w8. w1 w3 w8 w9 w5", ["w1 w2 w3 w4 w5"], 0.6153846106508877),
    ("rouge-l", "a b c a b c", ["a b c"], 0.999999995),
    ("rouge-l", "c b a", ["a b c"], 0.3333333283333334),
    ("rouge-l", "a. b. ", ["a b"], 0.7999999952000001),  # the empty end counts as a word
    ("rouge-l", "", ["a"], 0.0),
    ("rouge-l", "...", ["a"], 0.0),
    ("line-rouge-l", "a b\nc d", ["a b"], 0.999999995),
    ("rouge-l-zh", "北京。", ["北京"], 0.8),
    # ---- LongBench, code
    ("edit-similarity", "    return x\n", ["return x"], 0.8),
    ("edit-similarity", "\n\nreturn a + b", ["return a - b"], 0.92),
    ("edit-similarity", "# comment\nfor i in x:\n  pass", ["for i in x:"], 1.0),
    ("edit-similarity", "# comment\n\nfor i in x:", ["for i in x:"], 0.0),  # the empty line
    ("edit-similarity", "`x`\n// y\n# z", ["x"], 0.0),
    # ---- LongBench, numbers
    ("count", "There are 7 of 12: 7", ["7"], 2 / 3),
    ("count", "seven", ["7"], 0.0),
    ("retrieval", "Paragraph 3", ["Paragraph 3"], 1.0),
    ("retrieval", "3 or 4", ["Paragraph 3"], 0.5),
    ("retrieval", "Paragraph 13", ["Paragraph 3"], 0.0),
    ("retrieval-zh", "段落2、段落27", ["段落27"], 0.5),
    # ---- RULER
    ("match-all", "it is 123 and ABC", ["123", "abc", "def", "9"], 0.5),
    ("match-all", "123 456", ["123", "456"], 1.0),
    ("match-part", "it is abc", ["nothing", "ABC"], 1.0),
    ("match-part", "it is abc", ["nothing"], 0.0),
    # ---- lost in the middle
    ("substring", 'the value is "AB-12".', ["ab-12"], 1.0),
    ("substring", "AB 12", ["ab-12"], 0.0),
    ("best-subspan-em", "It was the Beatles, in 1966.", ["Rolling Stones", "Beatles"], 1.0),
    ("best-subspan-em", "It was a U.S. band", ["the US"], 1.0),
    ("best-subspan-em", "It was a band", ["the US"], 0.0),
    # ---- LongEval
    ("last-number", "In line 7, the content is <2416>.", ["2416"], 1.0),
    ("last-number", "<2416> of line 7", ["2416"], 0.0),
    ("last-number", "02416", ["2416"], 1.0),
    ("last-number", "no number", ["2416"], 0.0),
    # ---- the bundled model
    ("exact", " fini  sazo .", ["fini sazo ."], 1.0),
    ("exact", "fini sazo . the", ["fini sazo ."], 0.0),
]


@pytest.mark.parametrize(("name", "prediction", "answers", "score"), CASES)
def test_score_of_an_answer(name, prediction, answers, score):
    assert METRICS[name](prediction, answers, ()) == pytest.approx(score, abs=1e-8)


@pytest.mark.parametrize(
    ("prediction", "answer", "classes", "score"),
    [
        ("Individual", "Individual", ["Person", "Individual"], 1.0),
        ("Type: Person, Individual", "Individual", ["Person", "Individual"], 0.5),
        ("Other", "Individual", ["Person", "Individual"], 0.0),
        # A label that is a part of the right one does not count against it.
        ("Group of person", "Group of person", ["person", "Group of person"], 1.0),
        # LongBench passes over the label after one that it takes out: "ab" stays.
        ("a ab abc", "abc", ["a", "ab", "abc"], 0.5),
    ],
)
def test_classification_counts_named_labels(prediction, answer, classes, score):
    for name in ("classification", "line-classification"):
        assert METRICS[name](prediction, (answer,), tuple(classes)) == score
    assert METRICS["line-classification"](f"x\n{prediction}", (answer,), tuple(classes)) == 0


def test_every_metric_is_listed_and_between_0_and_1():
    assert {name for name, *_ in CASES} | {"classification", "line-classification"} == set(METRICS)
    assert {task.metric for task in TASKS.values()} - {"perplexity"} <= set(METRICS)
    for name, metric in METRICS.items():
        answer = {"retrieval": "Paragraph 1", "retrieval-zh": "段落1"}.get(name, "1")
        for prediction in ("", " ", ".", "1", "1 2 . 3\n4", "Paragraph 1 段落1", "。" * 9):
            assert 0 <= metric(prediction, [answer], ["1"]) <= 1


def test_retrieval_needs_a_numbered_answer():
    with pytest.raises(ValueError, match="answer 'third', expected one like Paragraph 1"):
        METRICS["retrieval"]("3", ["third"])


def test_subsequences_agree_with_all_of_them():
    """Against every subsequence of short texts, longest first."""
    draw = random.Random(0)
    for _ in range(60):
        first = draw.choices("abc", k=draw.randint(0, 7))
        second = draw.choices("abc", k=draw.randint(0, 7))
        every = [
            set(itertools.combinations(text, size)) for text in (first, second) for size in range(8)
        ]
        longest = max(size for size in range(8) if every[size] & every[8 + size])
        assert lcs_table(first, second)[-1, -1] == longest == len(lcs(first, second))
        assert tuple(lcs(first, second)) in every[longest] & every[8 + longest]


def test_of_two_subsequences_the_reference_decides():
    # "a" and "b" are both longest; the word of the reference is left out only if it must be.
    assert lcs(["a", "b"], ["b", "a"]) == ["b"]
    assert lcs(["b", "a"], ["a", "b"]) == ["a"]


def test_long_texts_are_quick():
    text = " ".join(f"word{i % 97}" for i in range(600))
    assert rouge_l(text, text[: len(text) // 2]) > 0.9
    assert ratio("x = y + z " * 60, "x = y - z " * 60) == 0.9
