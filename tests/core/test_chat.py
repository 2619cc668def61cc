"""Conversations: what a template writes, and what follows what a cache has read of one."""

import warnings

import pytest
from turns import LLAMA, QWEN, SMOL, STRICT, said, tokenizer

from kvjax.cache.history import BEGUN, History, extended
from kvjax.inputs.chat import (
    chat_text,
    continued,
    conversation_rows,
    conversations,
    opening,
    turn_tokens,
    user_turns,
)

DOCUMENT = [said("system", "Be brief."), said("user", "The cab is abroad.")]
QUESTION = said("user", "Where?")
TEMPLATES = {"llama": LLAMA, "qwen": QWEN, "smol": SMOL}


def ids(turns, made, **settings) -> list[int]:
    return turn_tokens(turns, made, **settings)


def ask(made, **settings) -> list[int]:
    """What a cache has read before an answer is drawn."""
    return ids([*DOCUMENT, QUESTION], made, add_generation_prompt=True, **settings)


def drawn(text: str, made) -> list[int]:
    """An answer, cut up otherwise than the tokenizer does: "ab" as two tokens."""
    return [token for letter in text for token in made(letter)["input_ids"]]


# ---------------------------------------------------------------------------- what follows
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("document", [DOCUMENT, DOCUMENT[1:]], ids=["instructed", "plain"])
def test_a_question_follows_a_document(template, document):
    """Given alone or with all before it; together they are the conversation rendered at once."""
    made = tokenizer(template)
    read = ids(document, made)
    whole = ids([*document, QUESTION], made, add_generation_prompt=True)
    for turns in ([QUESTION], [*document, QUESTION]):
        rest, found = continued(turns, read, document, made)
        assert [*read, *rest] == whole
        assert found == [*document, QUESTION]
        assert rest != whole


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("end", [[], ["<|end|>"]], ids=["cut off", "ended"])
@pytest.mark.parametrize("answer", ["cab!", "grab a bab"])
def test_an_answer_is_followed_whichever_way_it_was_drawn(template, end, answer):
    """The text of all tokens is the conversation's, the answer's own tokens are left as drawn."""
    made = tokenizer(template)
    closing = made.convert_tokens_to_ids(end)
    held = [*DOCUMENT, QUESTION, said("assistant", answer)]
    again = said("user", "Why?")
    text = made.decode(ids([*held, again], made, add_generation_prompt=True))
    for answered in (drawn(answer, made), made(answer)["input_ids"]):
        read = [*ask(made), *answered, *closing]
        for turns in ([again], [*held, again]):
            rest, _ = continued(turns, read, held, made)
            assert made.decode([*read, *rest]) == text
    assert drawn(answer, made) != made(answer)["input_ids"]


def test_a_batch_follows_one_document_or_its_own():
    made = tokenizer(LLAMA)
    history = extended(BEGUN, [ids(DOCUMENT, made)], [DOCUMENT])
    questions = [[QUESTION], [said("user", "Who?"), said("assistant", "I."), QUESTION]]
    rows, whole = conversation_rows(questions, made, history, True)
    for row, turns, question in zip(rows, whole, questions, strict=True):
        assert turns == [*DOCUMENT, *question]
        assert [*history[0].tokens, *row] == ids(turns, made, add_generation_prompt=True)
    answers = extended(history, rows, whole, [[5], [6, 7]], ["x", "y"])
    assert [one.tokens[-2:] for one in answers] == [(*rows[0][-1:], 5), (6, 7)]
    assert answers[1].turns == (*whole[1], said("assistant", "y"))
    with pytest.raises(ValueError, match="the cache has 2 rows, expected 1 or the 3 conversations"):
        conversation_rows([[QUESTION]] * 3, made, answers, True)


def test_histories_that_are_no_conversation():
    assert extended(None, [[5]], None) is None
    plain = extended(BEGUN, [[5], [6]], None, [[7], [8]], ["x", "y"])
    assert plain == (History((5, 7)), History((6, 8)))
    assert [one.turns for one in plain] == [None, None]
    untold = extended(BEGUN, [[5]], [[QUESTION]], [[7]], None)  # no tokenizer, no text
    assert untold[0].turns is None


def test_template_arguments_pass_through():
    made = tokenizer(QWEN)
    rows, _ = conversation_rows([DOCUMENT], made, None, True, enable_thinking=False)
    assert made.decode(rows[0]).endswith("<|assistant|><think>\n\n</think>\n\n")
    rest, _ = continued([QUESTION], ids(DOCUMENT, made), DOCUMENT, made, enable_thinking=False)
    assert made.decode(rest).endswith("<|assistant|><think>\n\n</think>\n\n")


# ---------------------------------------------------------------------------- rewritten turns
@pytest.mark.parametrize(
    ("template", "answer"),
    [(LLAMA, " In Rome.\n"), (QWEN, "<think>\nabout it\n</think>\n\nIn Rome.")],
    ids=["trimmed", "thinking"],
)
@pytest.mark.parametrize("end", [[], ["<|end|>"]], ids=["cut off", "ended"])
def test_a_turn_that_is_rewritten_is_named(template, answer, end):
    """What was read stays; what follows is what the template writes behind that turn."""
    made = tokenizer(template)
    held = [*DOCUMENT, QUESTION, said("assistant", answer)]
    read = [*ask(made), *made(answer)["input_ids"], *made.convert_tokens_to_ids(end)]
    with pytest.warns(UserWarning, match=r"writes turn 3 \(assistant\) otherwise than the cache"):
        rest, _ = continued([said("user", "Why?")], read, held, made)
    line = "\n" if template == QWEN else ""
    expected = f"{answer}<|end|>{line}<|user|>Why?<|end|>{line}<|assistant|>"
    assert made.decode([*read, *rest]).endswith(expected)


def test_the_first_of_several_rewritten_turns_is_named_once():
    made = tokenizer(LLAMA)
    held = [said("user", "a"), said("assistant", " b"), said("user", "c"), said("assistant", "d ")]
    text = "<s><|user|>a<|end|><|assistant|> b<|end|><|user|>c<|end|><|assistant|>d <|end|>"
    read = made(text, add_special_tokens=False)["input_ids"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rest, _ = continued([said("user", "e")], read, held, made)
    assert ["turn 1 (assistant)" in str(one.message) for one in caught] == [True]
    assert made.decode(rest) == "<|user|>e<|end|><|assistant|>"


def test_a_turn_that_the_template_leaves_out():
    made = tokenizer("{% for m in messages[2:] %}{{ m['content'] }}{% endfor %}")
    with pytest.raises(ValueError, match=r"^the chat template leaves out turn 0 \(system\), which"):
        continued([QUESTION], [3, 4, 5], DOCUMENT, made)


# ---------------------------------------------------------------------------- another conversation
@pytest.mark.parametrize(
    ("turns", "message"),
    [
        (
            [said("system", "Be long."), DOCUMENT[1], QUESTION],
            r"messages\[0\] is not the turn that",
        ),
        ([DOCUMENT[0], said("user", "Another."), QUESTION], r"messages\[1\] is not the turn that"),
        ([DOCUMENT[0]], "messages are the beginning of what the cache holds, expected"),
    ],
    ids=["other instructions", "other document", "its beginning"],
)
def test_another_conversation_is_refused(turns, message):
    made = tokenizer(SMOL)
    with pytest.raises(ValueError, match=f"^{message}"):
        continued(turns, ids(DOCUMENT, made), DOCUMENT, made)


def test_a_cache_that_holds_no_turns_is_followed_from_the_first():
    made = tokenizer(SMOL)
    read, whole = ids(DOCUMENT, made), [*DOCUMENT, QUESTION]
    rest, _ = continued(whole, read, None, made)
    assert [*read, *rest] == ids(whole, made, add_generation_prompt=True)
    with pytest.raises(ValueError, match=r"^messages do not begin with what the cache has read"):
        continued([QUESTION], read, None, made)


def test_nothing_follows():
    made = tokenizer(SMOL)
    with pytest.raises(ValueError, match=r"^the cache does not say what it has read, expected one"):
        continued([QUESTION], [], None, made)
    read = ids(DOCUMENT, made, add_generation_prompt=True)
    with pytest.raises(ValueError, match=r"^messages end where the cache does, expected turns"):
        continued(DOCUMENT, read, DOCUMENT, made)


# ---------------------------------------------------------------------------- forms
def test_one_conversation_or_several():
    assert conversations(DOCUMENT) == conversations([DOCUMENT]) == [DOCUMENT]
    assert conversations((tuple(DOCUMENT), [QUESTION])) == [DOCUMENT, [QUESTION]]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], r"^messages=\[\], expected at least one turn in each conversation$"),
        ([[QUESTION], []], "expected at least one turn in each conversation$"),
        ([{"role": "user"}], r"^messages\[0\] is \{'role': 'user'\}, expected a dictionary with"),
        ([QUESTION, "hi"], r"^messages\[1\] is 'hi', expected a dictionary with role and content$"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_what_is_no_conversation_is_named(messages, message):
    with pytest.raises(ValueError, match=message):
        conversations(messages)


def test_texts_as_turns():
    made = tokenizer(SMOL)
    assert user_turns("hi", made, None, "") == [[said("user", "hi")]]
    for wrong, message in (([5, 6], "expected texts"), (["a", ""], "^prompt 1 is empty")):
        with pytest.raises(ValueError, match=message):
            user_turns(wrong, made, None, "")
    with pytest.raises(ValueError, match=r"^chat=True, expected a tokenizer with a chat template$"):
        chat_text("hi", tokenizer(None))


def test_what_a_chat_opens_with():
    taken = [said("system", "S"), said("user", "D")]
    assert opening("S", "D", tokenizer(SMOL)) == taken
    assert opening(None, "D", tokenizer(SMOL)) == taken[1:]
    assert opening("S", None, tokenizer(SMOL)) == taken[:1]
    assert opening(None, None, tokenizer(SMOL)) == []
    assert opening("S", "D", tokenizer(STRICT)) == [said("system", "S\n\nD")]
    assert opening(None, "D", tokenizer(STRICT)) == [said("system", "D")]
    with pytest.raises(ValueError, match=r"template does not take this prompt \(TemplateError: no"):
        opening("S", "D", tokenizer("{{ raise_exception('no') }}"))


def test_a_template_that_fails_says_so_in_one_sentence():
    failing = tokenizer("{{ messages[0]['content'] + {}['x'] }}")
    with pytest.raises(ValueError, match=r"^the chat template does not take this prompt \(Undefin"):
        chat_text("hi", failing)


def test_a_template_for_text_alone_is_given_text():
    """It joins a text to the content, which is a list where images are told of."""
    joining = tokenizer("{{ '<u>' + messages[0]['content'] }}")
    assert chat_text("what?", joining, images=1, placeholder="<i>") == "<u><i>what?"
