"""What tests of tasks share: a tokenizer without a file, and small files in benchmarks' forms."""

import json
from pathlib import Path

from kvjax.eval.tasks import TASKS, Document, TaskSettings
from kvjax.eval.tasks.lengths import prompt_tokens

NEW = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}
NIAH = [
    *("niah_single_1", "niah_single_2", "niah_single_3"),
    *("niah_multikey_1", "niah_multikey_2", "niah_multikey_3"),
    *("niah_multivalue", "niah_multiquery"),
]
NAMES = [*NIAH, "vt", "cwe", "fwe", "qa_1", "qa_2"]
ESSAY = " ".join(f"Sentence {i} has seven words here{'.!?'[i % 3]}" for i in range(60))
UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"


class Bytes:
    """A token a byte, and 256 before a text."""

    def __call__(self, text: str, *, add_special_tokens: bool = True, **_) -> dict[str, list[int]]:
        return {"input_ids": [256] * add_special_tokens + list(text.encode())}

    def decode(self, ids, *, skip_special_tokens: bool = False) -> str:
        """The text of some tokens; parts of characters are U+FFFD, as in real tokenizers."""
        return bytes(token for token in ids if token < 256).decode(errors="replace")


def make(name: str, **settings) -> list[Document]:
    """All documents of a task."""
    return list(TASKS[name].documents(TaskSettings(**settings)))


def make_ruler(name: str, data: Path | None = None, **settings) -> list[Document]:
    """Three documents of a task of RULER's, of 2,048 tokens, in the essay of `data`."""
    given = {"length": 2048, "count": 3, "haystack": data and data / "essay.txt"} | settings
    return make(f"ruler/{name}", data=data, **given)


def whole(document: Document) -> str:
    """The prompt of a document's only question."""
    (ask,) = document.asks
    return document.context + ask.question + ask.lead


def write_ruler(folder: Path) -> Path:
    """An essay, and small files in the forms of SQuAD and HotpotQA."""
    (folder / "essay.txt").write_text(ESSAY)
    articles = []
    for a in range(3):
        paragraphs = []
        for p in range(4):
            answer = {"text": f"answer {a}{p}", "answer_start": 0}
            asked = {"question": f"What is {a}{p}?", "answers": [answer, answer], "id": "1"}
            never = {"question": "What not?", "answers": [], "is_impossible": True, "id": "2"}
            told = f"The answer {a}{p} stands in article {a}. " + "More. " * 8
            paragraphs.append({"context": told, "qas": [asked | {"is_impossible": False}, never]})
        articles.append({"title": str(a), "paragraphs": paragraphs})
    (folder / "squad.json").write_text(json.dumps({"version": "v2.0", "data": articles}))
    hotpot = [
        {
            "question": f"Who is {q}?",
            "answer": f"person {q}",
            "context": [[f"Title {q}{p}", [f"Here is person {q}.", " More."]] for p in range(3)],
        }
        for q in range(4)
    ]
    (folder / "hotpotqa.json").write_text(json.dumps(hotpot))
    return folder


def write(path: Path, *rows) -> Path:
    """A file with a JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def used(tokenizer, document: Document) -> int:
    """Most tokens of a document's prompts with their answers."""
    return max(
        prompt_tokens(tokenizer, document.context, ask.question + ask.lead) + ask.new_tokens
        for ask in document.asks
    )
