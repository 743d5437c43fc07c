"""What callers send, in OpenAI's formats with one extension field, `anchorkv`.

What cannot be honoured is refused with one sentence; what would change nothing here (`user`, `metadata`, `store` …) is
ignored, as is what OpenAI may add.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

MOST_CHOICES, MOST_STOPS, MOST_BIASES = 16, 16, 1024
MOST_MESSAGES = 10_000


def _clean(text: str) -> str:
    """Half a surrogate pair is JSON, but no text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("a text holds half of a surrogate pair; send whole characters") from None
    return text


Text = Annotated[str, AfterValidator(_clean)]
Name = Annotated[Text, Field(min_length=1, max_length=200)]


class Wishes(BaseModel):
    """anchorkv's own options of one request, within what the operator allows."""

    model_config = ConfigDict(extra="forbid")

    policy: Name | dict[str, Any] | None = Field(
        default=None, description="a policy's name, as GET /v1/models has them, or its options, where these are allowed"
    )
    reduction: float | None = Field(
        default=None, gt=1, le=1000, allow_inf_nan=False, description="tokens of older text per cell kept of it"
    )
    recall: Literal["off", "on", "auto"] | None = Field(default=None, description="bring dropped segments back")
    quality: Literal["high", "normal"] = Field(
        default="normal", description="high: the safest way to answer, whatever memory it takes"
    )
    document: Name | None = Field(default=None, description="id of an uploaded document to ask")
    area: Name | None = Field(default=None, description="kind of document, as the rollout plan names it")
    explain: bool = Field(
        default=False, description="list every segment: what was kept, dropped, pinned and recalled of it, and why"
    )
    attention: bool = Field(
        default=False, description="say where the answer's attention went, if the engine tells; takes one more pass"
    )


class TextPart(BaseModel):
    """A part of a message."""

    type: Literal["text"]
    text: Text


class ChatMessage(BaseModel):
    """One message of a chat. Control tokens of the model that are written in it are read as text."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1)]

    @model_validator(mode="before")
    @classmethod
    def _only_text(cls, found: Any) -> Any:
        if not isinstance(found, dict):
            return found
        if found.get("tool_calls") or found.get("function_call") or found.get("role") in ("tool", "function"):
            raise ValueError("messages of tools are not supported; send plain text alone")
        if found.get("audio"):
            raise ValueError("audio is not supported; send plain text alone")
        content = found.get("content")
        for part in content if isinstance(content, list) else ():
            kind = part.get("type") if isinstance(part, dict) else None
            if isinstance(kind, str) and kind in ("image_url", "input_audio", "file", "refusal"):
                raise ValueError(f"content of the type {kind} is not supported; send plain text alone")
        return found

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class JsonSchema(BaseModel):
    """A JSON schema that the answer follows."""

    name: Name = "answer"
    description: str | None = None
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """Plain text, any JSON object, or JSON that follows a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _whole(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("response_format of the type json_schema needs a 'json_schema'")
        return self


class StreamOptions(BaseModel):
    """What a stream holds besides the answer."""

    include_usage: bool | None = Field(default=None, description="a last piece with the tokens that were used")


class _Request(BaseModel):
    """What both kinds of requests share."""

    model_config = ConfigDict(extra="allow")

    model: Name | None = Field(default=None, description="as GET /v1/models names it; may be left out")
    max_tokens: int | None = Field(default=None, ge=1, description="most tokens of the answer")
    n: int | None = Field(default=None, ge=1, le=MOST_CHOICES, description="number of answers")
    stop: Text | Annotated[list[Text], Field(max_length=MOST_STOPS)] | None = Field(
        default=None, description="texts that end the answer"
    )
    seed: int | None = Field(
        default=None, ge=-(2**63), lt=2**64,
        description="the same seed draws alike; rounding differs with what else is answered at the time",
    )
    temperature: float | None = Field(
        default=None, ge=0, le=2, allow_inf_nan=False, description="0 takes the likeliest token; 1 when left out"
    )
    top_p: float | None = Field(default=None, ge=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(default=None, ge=0, le=1_000_000, description="draw from the k likeliest; 0 is off")
    presence_penalty: float | None = Field(default=None, ge=-2, le=2, allow_inf_nan=False)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2, allow_inf_nan=False)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]] | None = Field(
        default=None, max_length=MOST_BIASES, description="added to the scores of these token ids"
    )
    ignore_eos: bool = Field(default=False, description="write on until max_tokens, whatever the model says")
    user: str | None = Field(default=None, description="ignored")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    anchorkv: Wishes | None = None

    @model_validator(mode="before")
    @classmethod
    def _can_be_honoured(cls, found: Any) -> Any:
        if isinstance(found, dict):
            for name in cls.refused():
                if found.get(name) not in _NOTHING.get(name, (None,)):
                    raise ValueError(f"'{name}' is not supported by this server; leave it out")
        return found

    @model_validator(mode="after")
    def _streams(self) -> _Request:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for streams; set stream to true or leave it out")
        return self

    @classmethod
    def refused(cls) -> tuple[str, ...]:
        return ()

    @property
    def stops(self) -> tuple[str, ...]:
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


_NOTHING: dict[str, tuple[Any, ...]] = {
    "tools": (None, []), "functions": (None, []), "tool_choice": (None, "none", "auto"),
    "function_call": (None, "none"), "modalities": (None, [], ["text"]), "suffix": (None, ""),
    "echo": (None, False), "best_of": (None, 1),
}
"""Values of refused fields that ask for nothing."""


class ChatRequest(_Request):
    """A chat whose last message is answered."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=MOST_MESSAGES)
    max_completion_tokens: int | None = Field(default=None, ge=1, description="the same as max_tokens")
    logprobs: bool | None = Field(default=None, description="log-probabilities of the tokens written")
    top_logprobs: int | None = Field(default=None, ge=0, le=20, description="of so many others too; needs logprobs")
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def _consistent(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true")
        return self

    @classmethod
    def refused(cls) -> tuple[str, ...]:
        return ("tools", "tool_choice", "functions", "function_call", "audio", "modalities", "web_search_options")


_Ids = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]


class CompletionRequest(_Request):
    """A text to be continued, or several."""

    prompt: (
        Text | _Ids | Annotated[list[Text], Field(min_length=1, max_length=MOST_CHOICES)]
        | Annotated[list[_Ids], Field(min_length=1, max_length=MOST_CHOICES)]
    ) = Field(description="a text, several, or the same as token ids")
    logprobs: int | None = Field(default=None, ge=0, le=20, description="log-probabilities of so many likeliest tokens")
    response_format: ResponseFormat | None = None

    @classmethod
    def refused(cls) -> tuple[str, ...]:
        return ("suffix", "echo", "best_of")

    @property
    def prompts(self) -> list[str | tuple[int, ...]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [tuple(token for token in self.prompt if isinstance(token, int))]
        return [part if isinstance(part, str) else tuple(part) for part in self.prompt if not isinstance(part, int)]
