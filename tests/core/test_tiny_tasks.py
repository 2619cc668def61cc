"""The bundled model's language and tasks: exact lengths, answers that the document holds."""

import hashlib
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvjax.tiny.batches import loss_weights, training_batch, training_sequence
from kvjax.tiny.filler import sentences
from kvjax.tiny.questions import QUESTIONS, UNTIL, questions
from kvjax.tiny.tasks import TASKS, draw_facts, make_document
from kvjax.tiny.vocabulary import (
    BOS,
    ID,
    KEYS,
    SPECIAL,
    SYMBOLS,
    VALUES,
    VOCABULARY,
    WORDS,
    text,
    tokenizer,
)

STOP = ID["."]


def test_words_are_distinct_and_fit_the_embedding():
    assert len(set(WORDS)) == len(WORDS) <= VOCABULARY
    assert len(KEYS) == len(VALUES) == SYMBOLS
    assert WORDS[:4] == list(SPECIAL)


def test_tokenizer_reads_words_and_puts_the_start_before_them():
    made = tokenizer()
    ids = made.encode("the old baker finds one stone . ask badi :").ids
    assert ids[0] == BOS
    assert text(ids[1:]) == "the old baker finds one stone . ask <unk> :"
    known = [ID["note"], ID[KEYS[3]], ID[VALUES[5]], STOP]
    assert made.encode(text(known)).ids == [BOS, *known]
    assert made.decode(known) == text(known)


@given(
    task=st.sampled_from(sorted(TASKS)),
    length=st.integers(48, 300),
    needles=st.integers(1, 40),
    alphabet=st.integers(4, SYMBOLS),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=150, deadline=None)
def test_document_has_its_length_and_its_facts(task, length, needles, alphabet, seed):
    made = make_document(
        np.random.default_rng(seed), task, length, needles=needles, alphabet=alphabet
    )
    again = make_document(
        np.random.default_rng(seed), task, length, needles=needles, alphabet=alphabet
    )
    assert made == again
    assert len(made.tokens) == length
    assert made.tokens[0] == BOS
    assert BOS not in made.tokens[1:]
    assert max(made.tokens) < len(WORDS)
    allowed = {ID[word] for word in (*KEYS[:alphabet], *VALUES[:alphabet])}
    symbols = {ID[word] for word in (*KEYS, *VALUES)}
    assert symbols & set(made.tokens) <= allowed
    assert bool(made.turns) == (task != "stream")


def notes(tokens, word):
    """What follows each `word`, up to the full stop."""
    found = []
    for place, token in enumerate(tokens):
        if token == ID[word]:
            found.append(tokens[place + 1 : tokens.index(STOP, place)])
    return found


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("task", QUESTIONS)
def test_the_document_alone_says_the_answer(task, seed):
    """A solver of a few lines that reads the words finds every answer."""
    made = make_document(np.random.default_rng(seed), task, 200, needles=12)
    facts = notes(made.tokens, {"tracking": "let", "frequent": "saw"}.get(task, "note"))
    for question, answer in made.turns:
        asked = [token for token in question[1:] if token != ID[":"]]
        if task == "tracking":
            name, told = asked[0], []
            link = dict(facts)
            while name in link:
                name = link[name]
                told.append(name)
            assert len(told) >= 2
            assert told[-1] in {ID[word] for word in VALUES}
        elif task == "frequent":
            words, counts = np.unique([word for (word,) in facts], return_counts=True)
            order = np.argsort(-counts, kind="stable")
            assert counts[order[0]] > counts[order[1]] > counts[order[2]]
            told = words[order[:2]].tolist()
        else:
            told = [token for key in asked for fact in facts if fact[0] == key for token in fact]
            if question[-1] != ID[":"]:
                told = told[1:]  # the question ends with the key itself
        assert answer == [*told, STOP]


def test_repeat_asks_for_the_whole_document():
    made = make_document(np.random.default_rng(0), "repeat", 100)
    assert made.turns == [([ID["again"]], made.tokens[1:])]


def test_chains_are_set_before_they_are_used():
    made = make_document(np.random.default_rng(5), "tracking", 300, needles=16)
    links = notes(made.tokens, "let")
    for place, (_, source) in enumerate(links):
        later = [name for name, _ in links[place + 1 :]]
        assert source not in later


@given(total=st.integers(0, 500), seed=st.integers(0, 2**32 - 1))
@settings(deadline=None)
def test_filler_has_the_asked_length_and_whole_sentences(total, seed):
    found = sentences(np.random.default_rng(seed), total)
    assert sum(map(len, found)) == total
    for sentence in found[:-1]:
        assert sentence[-1] == STOP or len(sentence) == 24
        assert STOP not in sentence[:-1]


def test_filler_is_not_uniform_noise():
    """The word before says more about a word than its frequency does: 0.8 nats and more."""
    tokens = [t for sentence in sentences(np.random.default_rng(0), 100_000) for t in sentence]
    pairs = np.zeros((VOCABULARY, VOCABULARY))
    np.add.at(pairs, (tokens[:-1], tokens[1:]), 1)
    joint = pairs / pairs.sum()
    independent = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    seen = joint > 0
    information = (joint[seen] * np.log(joint[seen] / independent[seen])).sum()
    assert information > 0.8


def test_what_cannot_be_made_is_an_error():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="task='needle', expected one of single"):
        draw_facts(rng, "needle", 100)
    with pytest.raises(ValueError, match="room=3 tokens, expected at least 5 for task single"):
        draw_facts(rng, "single", 3)
    with pytest.raises(ValueError, match="task='stream', expected one of single"):
        questions("stream", 100, 1)


@pytest.mark.parametrize("task", [*TASKS])
@pytest.mark.parametrize("length", [64, 129])
def test_training_sequence_marks_answers(task, length):
    tokens, turns = training_sequence(np.random.default_rng(1), task, length, 16, SYMBOLS)
    assert len(tokens) == len(turns) <= length
    assert len(tokens) > 0.9 * length
    if task == "stream":
        assert not turns.any()
        return
    assert turns[: length // 5].sum() == 0  # the document
    assert turns.max() >= 1
    assert set(np.diff(np.unique(turns))) <= {1}
    if task == "repeat":
        copied = tokens[turns == 1]
        np.testing.assert_array_equal(copied, tokens[1 : len(copied) + 1])
        assert tokens[len(copied) + 1] == ID["again"]


def test_repeated_documents_differ_in_length():
    """Else copying would be learnt as a distance."""
    rng = np.random.default_rng(0)
    sequences = [training_sequence(rng, "repeat", 200, 8, SYMBOLS)[1] for _ in range(40)]
    lengths = [(turns == 1).sum() + 1 for turns in sequences]
    assert min(lengths) < 60
    assert max(lengths) > 80
    assert len(set(lengths)) > 20
    assert np.mean([turns.max() > 1 for turns in sequences]) > 0.8  # questions follow the copy


def test_batches_repeat_and_differ_by_step():
    tasks = ["multikey", "repeat", "stream"]
    first = training_batch((0, 7), tasks, 64, needles=8)
    np.testing.assert_array_equal(first.tokens, training_batch((0, 7), tasks, 64, needles=8).tokens)
    assert (first.tokens != training_batch((0, 8), tasks, 64, needles=8).tokens).any()


def test_weights_are_of_answers_and_of_words_that_sentences_predict():
    batch = training_batch((0, 1), ["multikey", "stream"], 64, needles=8)
    weights = loss_weights(batch, 0.1)
    assert (weights[batch.turns > 0] == 1).all()
    symbols = np.isin(batch.tokens, [ID[word] for word in (*KEYS, *VALUES)])
    assert (weights[symbols & (batch.turns == 0)] == 0).all()
    assert (weights[1, 1:] == np.float32(0.1)).all()
    assert (weights[:, 0] == 0).all()


@pytest.mark.parametrize("task", QUESTIONS)
def test_questions_are_fresh_fixed_and_of_one_length(task):
    items = questions(task, 256, 6)
    assert items == questions(task, 256, 6)
    assert len({json.dumps(list(map(int, item.document))) for item in items}) == 6
    for item in items:
        assert len(item.document) + len(item.question) == 256
        places = [i for i, token in enumerate(item.document) if token in (ID["note"], ID["let"])]
        assert all(place < UNTIL * 256 + 40 for place in places)


def test_a_seed_is_a_document_for_ever():
    """Weights are trained on exactly these documents: a change needs a new training run."""
    made = [make_document(np.random.default_rng(i), t, 200).tokens for i, t in enumerate(TASKS)]
    digest = hashlib.sha256(json.dumps(made).encode()).hexdigest()
    assert digest[:16] == "48b0fd6ef57bd618"
