"""The bundled model's words: a token is a word, and a text reads as a sentence.

Symbols (keys and values) are made of two syllables and mean nothing, so that only the context can
say which value belongs to which key.
"""

from collections.abc import Sequence
from itertools import product

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
MARKS = (".", ":", "note", "ask", "list", "let", "trace", "saw", "most", "again")

_FILLER = {
    "article": "the a this that every some one our",
    "adjective": "old small quiet green bright heavy cold young red tall brown soft wise slow",
    "subject": "baker miller sailor teacher doctor farmer singer painter hunter weaver fox crow"
    " judge smith child queen",
    "verb": "finds sees carries leaves wants paints keeps sells breaks hides follows opens"
    " brings drops cleans holds",
    "object": "stone lamp boat door bell basket letter mirror ladder coat bridge window rope"
    " wheel garden table",
    "preposition": "near under behind beside above across inside toward",
    "place": "river hill market forest harbour tower field island mill cave road village",
    "adverb": "often slowly never always today gladly rarely soon",
}
FILLER = {role: words.split() for role, words in _FILLER.items()}

_KEY_SYLLABLES = [c + v for c, v in product("bdgkmptw", "aiou")]
_VALUE_SYLLABLES = [c + v for c, v in product("fhlnrsvz", "aeio")]
SYMBOLS = 128  # of each kind


def _pairs(syllables: list[str]) -> list[str]:
    """Two-syllable words in an order that mixes first syllables."""
    size = len(syllables)
    seconds = [(i * 5 + i // size * 7 + 3) % size for i in range(999)]
    words = [syllables[i % size] + syllables[second] for i, second in enumerate(seconds)]
    return list(dict.fromkeys(words))[:SYMBOLS]


KEYS = _pairs(_KEY_SYLLABLES)
VALUES = _pairs(_VALUE_SYLLABLES)

WORDS = [*SPECIAL, *MARKS, *(word for words in FILLER.values() for word in words), *KEYS, *VALUES]
ID = {word: index for index, word in enumerate(WORDS)}
PAD, BOS, EOS = 0, 1, 2
# Rows of the embedding; the last ones belong to no word.
VOCABULARY = 384


def tokenizer() -> Tokenizer:
    """Words separated by spaces, and `<s>` before a text."""
    made = Tokenizer(models.WordLevel(ID, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
    )
    made.add_special_tokens([AddedToken(word, special=True) for word in SPECIAL])
    return made


def text(ids: Sequence[int]) -> str:
    """The words of token ids, separated by spaces."""
    return " ".join(WORDS[token] if token < len(WORDS) else "<unk>" for token in ids)
