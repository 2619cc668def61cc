"""What clients may ask of a server: OpenAI's requests, and fields of kvjax's own.

A field's description is what an error says was expected, and what /openapi.json shows. Nothing that
was asked for is passed over: fields that are not here are refused, and so are those of OpenAI's
fields that are not implemented, unless they have the value that changes nothing (`NEUTRAL`).
Shapes and defaults follow OpenAI's API reference.
"""

import secrets
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from kvjax.generation.sampling import Sampling

PROMPTS = 64  # of one request
STOPS = 4
_SHOWN = 60  # characters of a value in an error
_LARGEST = 2**31 - 1
_ROLES = "system", "developer", "user", "assistant", "tool"
_TEXT = "a text that is not empty"
_SWITCH = "true or false"
_PENALTY = "a number above 0 and at most 10"
_PROMPT = f"a text, token ids, or a list of at most {PROMPTS} of either, none of them empty"
_MESSAGES = "a list of turns, each an object with a role and a content"
_CONTENT = "a text, or a list of parts {'type': 'text', 'text': ...}, as texts alone are read"


# ---------------------------------------------------------------------------- values
def shortened(value: Any) -> str:
    """A value as an error shows it."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _text(value: Any, name: str, expected: str = _TEXT) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name}={shortened(value)}, expected {expected}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} is not valid Unicode ({error.reason})") from None
    return value


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(token) is int for token in value)


def _prompts(value: Any) -> list[str | list[int]]:
    """A prompt in any form, as a list of texts and token ids."""
    one = isinstance(value, str) or _is_ids(value)
    if not one and not isinstance(value, list):
        raise ValueError(f"prompt={shortened(value)}, expected {_PROMPT}")
    several = [value] if one else value
    if len(several) > PROMPTS:
        raise ValueError(f"prompt has {len(several)} entries, expected {_PROMPT}")
    for index, prompt in enumerate(several):
        name = "prompt" if one else f"prompt[{index}]"
        if not (prompt and _is_ids(prompt)):
            _text(prompt, name, _PROMPT)
    return several


def _turns(value: Any) -> list[dict[str, str]]:
    """Turns, the content of each as one text."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"messages={shortened(value)}, expected {_MESSAGES}")
    return [_turn(turn, f"messages[{index}]") for index, turn in enumerate(value)]


def _turn(turn: Any, name: str) -> dict[str, str]:
    keys = turn.keys() if isinstance(turn, dict) else set()
    if keys != {"role", "content"}:
        raise ValueError(f"{name}={shortened(turn)}, expected an object with a role and a content")
    role, content = turn["role"], turn["content"]
    if role not in _ROLES:
        expected = ", ".join(_ROLES)
        raise ValueError(f"{name}.role={shortened(role)}, expected one of {expected}")
    if content != "":
        content = _content(content, f"{name}.content")
    return {"role": role, "content": content}


def _content(value: Any, name: str) -> str:
    """A text, or the texts of parts one after another."""
    if not isinstance(value, list):
        return _text(value, name, _CONTENT)
    for index, part in enumerate(value):
        if not (
            isinstance(part, dict) and set(part) == {"type", "text"} and part["type"] == "text"
        ):
            raise ValueError(f"{name}[{index}]={shortened(part)}, expected {_CONTENT}")
    return _text("".join(_text(part["text"], name, _CONTENT) for part in value), name, _CONTENT)


def _stops(value: Any) -> list[str]:
    several = [value] if isinstance(value, str) else value
    if not isinstance(several, list) or len(several) > STOPS:
        raise ValueError(f"stop={shortened(value)}, expected a text or at most {STOPS} of them")
    return [_text(stop, "stop") for stop in several]


def _whole(least: int) -> Any:
    described = f"an integer from {least} to {_LARGEST}"
    return Field(None, ge=least, le=_LARGEST, description=described)


_Turns = Annotated[list[dict[str, str]], BeforeValidator(_turns)]


# ---------------------------------------------------------------------------- requests
class Body(BaseModel):
    """A request's body; null is a field that is not there.

    Attributes:
      NEUTRAL: fields of OpenAI's that are not implemented, with the values that change nothing.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
    NEUTRAL: ClassVar[Mapping[str, Any]] = {}

    @model_validator(mode="before")
    @classmethod
    def _what_matters(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        for name, neutral in cls.NEUTRAL.items():
            value = given.get(name)
            if value is not None and (value != neutral or isinstance(value, bool)):
                shown = f"{name}={shortened(value)}"
                raise ValueError(f"{shown} is not implemented, expected {neutral!r}")
        return {
            name: value
            for name, value in given.items()
            if value is not None and name not in cls.NEUTRAL
        }


class StreamOptions(Body):
    """`include_usage` asks for a last chunk that counts tokens."""

    include_usage: bool = Field(False, description=_SWITCH)


class Compressing(Body):
    """A method that the server was started with, and a budget in entries per KV head."""

    method: str | None = Field(None, description="the name of one of the server's methods")
    max_cache_tokens: int | None = _whole(2)


class Asked(Compressing):
    """What completions and chats have in common.

    Attributes:
      model: the served model's name, which may be left out.
      temperature: 0 for the likeliest token; 1 by default, as OpenAI's.
      top_k: kvjax's own: keep the k likeliest tokens, 0 for all.
      repetition_penalty: kvjax's own: above 1 tokens of the prompt and the answer become less
        likely, 1 by default.
      seed: of the draws; each request has another one by default.
      stop: strings that end an answer, which does not contain them.
      context: kvjax's own: the id of a context that the prompt follows.
      user: taken, and not used.
    """

    NEUTRAL: ClassVar[Mapping[str, Any]] = {
        "n": 1,
        "frequency_penalty": 0,
        "presence_penalty": 0,
        "logit_bias": {},
    }
    model: str | None = Field(None, description="the served model's name")
    temperature: float = Field(1.0, ge=0, le=2, description="a number from 0 to 2")
    top_p: float = Field(1.0, gt=0, le=1, description="a number above 0 and at most 1")
    top_k: int | None = _whole(0)
    repetition_penalty: float = Field(1.0, gt=0, le=10, description=_PENALTY)
    seed: int | None = _whole(0)
    stop: Annotated[list[str], BeforeValidator(_stops)] = []
    stream: bool = Field(False, description=_SWITCH)
    stream_options: StreamOptions | None = Field(None, description="an object with include_usage")
    context: str | None = Field(None, description="the id of a context")
    user: str | None = Field(None, description="a text")

    @model_validator(mode="after")
    def _options_are_of_a_stream(self) -> "Asked":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options beside stream=false, expected stream=true")
        return self

    @property
    def counts_at_the_end(self) -> bool:
        """Whether a stream's last chunk counts tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self) -> Sampling:
        """How tokens are drawn."""
        return Sampling(
            temperature=self.temperature,
            top_k=self.top_k or 0,
            top_p=self.top_p,
            repetition_penalty=self.repetition_penalty,
        )

    def drawn_seed(self) -> int:
        """The request's seed, or a new one."""
        return secrets.randbits(31) if self.seed is None else self.seed


class Completion(Asked):
    """The body of /v1/completions.

    Attributes:
      prompt: a text, token ids, or several of either; each gets a choice.
      max_tokens: most tokens of an answer; 16 by default, as OpenAI's.
      echo: begin the answer with the prompt; not beside `logprobs`.
      logprobs: give the log-probability of each drawn token, and of as many likeliest tokens.
    """

    NEUTRAL: ClassVar[Mapping[str, Any]] = {**Asked.NEUTRAL, "best_of": 1, "suffix": ""}
    prompt: Annotated[list[str | list[int]], BeforeValidator(_prompts)] = Field(description=_PROMPT)
    max_tokens: int | None = _whole(1)
    echo: bool = Field(False, description=_SWITCH)
    logprobs: int | None = _whole(0)

    @model_validator(mode="after")
    def _what_goes_together(self) -> "Completion":
        if self.echo and self.logprobs is not None:
            raise ValueError(
                "echo=true beside logprobs, expected one of the two, as log-probabilities of a"
                " prompt are not kept"
            )
        if self.stream and len(self.prompt) > 1:
            raise ValueError(f"stream=true beside {len(self.prompt)} prompts, expected one prompt")
        return self

    @property
    def limit(self) -> int:
        """Most tokens of an answer."""
        return 16 if self.max_tokens is None else self.max_tokens

    @property
    def wants_logprobs(self) -> bool:
        """Whether the answer has log-probabilities; 0 asks for them too."""
        return self.logprobs is not None

    @property
    def likeliest(self) -> int:
        """Likeliest tokens that are told at each place."""
        return self.logprobs or 0


class Chat(Asked):
    """The body of /v1/chat/completions.

    Attributes:
      messages: the conversation, as the model's chat template is to write it.
      max_tokens, max_completion_tokens: two names for most tokens of the answer; the server's limit
        by default.
      logprobs: whether to give the log-probability of each drawn token.
      top_logprobs: beside it those of as many likeliest tokens.
    """

    NEUTRAL: ClassVar[Mapping[str, Any]] = {
        **Asked.NEUTRAL,
        "tools": [],
        "response_format": {"type": "text"},
    }
    messages: _Turns = Field(description=_MESSAGES)
    max_tokens: int | None = _whole(1)
    max_completion_tokens: int | None = _whole(1)
    logprobs: bool = Field(False, description=_SWITCH)
    top_logprobs: int | None = _whole(0)

    @model_validator(mode="after")
    def _what_goes_together(self) -> "Chat":
        if self.top_logprobs and not self.logprobs:
            raise ValueError(
                f"top_logprobs={self.top_logprobs} beside logprobs=false, expected logprobs=true"
            )
        if None not in (self.max_tokens, self.max_completion_tokens):
            raise ValueError(
                f"max_tokens={self.max_tokens} beside max_completion_tokens"
                f"={self.max_completion_tokens}, expected one of the two"
            )
        return self

    @property
    def limit(self) -> int | None:
        """Most tokens of the answer, None for the server's limit."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def wants_logprobs(self) -> bool:
        """Whether the answer has log-probabilities."""
        return self.logprobs

    @property
    def likeliest(self) -> int:
        """Likeliest tokens that are told at each place."""
        return self.top_logprobs or 0


class Document(Compressing):
    """The body of /v1/contexts: a text or a conversation's beginning, to be compressed once."""

    text: Annotated[str, BeforeValidator(lambda value: _text(value, "text"))] | None = None
    messages: _Turns | None = None

    @model_validator(mode="after")
    def _one_of_the_two(self) -> "Document":
        if (self.text is None) == (self.messages is None):
            given = "neither text nor messages" if self.text is None else "text beside messages"
            raise ValueError(f"the body has {given}, expected one of the two")
        return self


# ---------------------------------------------------------------------------- errors
def complaint(error: Mapping[str, Any], kind: type[BaseModel]) -> tuple[str, str | None]:
    """One sentence about an error of pydantic's, and the argument that it is about.

    Args:
      error: an entry of a `ValidationError`'s `errors()`; its place begins with "body", as FastAPI
        has it.
      kind: the request's model.
    """
    place, what = [part for part in error["loc"] if part != "body"], error["type"]
    if what == "json_invalid":
        reason = error["ctx"]["error"]
        return f"the body is not valid JSON ({reason}), expected one object", None
    name = str(place[0]) if place else None
    if what == "value_error":
        return str(error["ctx"]["error"]), name
    if name is None:
        return f"the body is {shortened(error['input'])}, expected a JSON object", None
    fields = kind.model_fields
    if name == "stream_options" and len(place) > 1:
        name, fields = f"{name}.{place[1]}", StreamOptions.model_fields
    field, value = name.rpartition(".")[2], shortened(error["input"])
    if what == "extra_forbidden":
        unknown, listed = shortened(name)[1:-1], ", ".join(sorted(fields))
        return f"{unknown}={value} is not understood, expected one of {listed}", unknown
    expected = fields[field].description
    if what == "missing":
        return f"{name} is missing, expected {expected}", name
    return f"{name}={value}, expected {expected}", name
