"""What answers look like, for the server's own description at /openapi.json; the fuzz tests hold every answer to it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field


class Fault(BaseModel):
    """What went wrong, in OpenAI's form."""

    message: str = Field(description="One sentence: what was wrong, and what to do.")
    type: str
    param: str | None = Field(description="The field at fault.")
    code: str | None = Field(description="A word for programs, such as 'context_length_exceeded'.")


class Problem(BaseModel):
    """The body of every refusal."""

    error: Fault


class Health(BaseModel):
    """The state of the server."""

    status: Literal["ok", "shutting down"]
    model: str | None = None


class LoadedModel(BaseModel):
    """The loaded model and what it can do."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    hears: bool
    sees: bool
    speaks: bool


class ModelList(BaseModel):
    """All models of this server: one."""

    object: Literal["list"]
    data: list[LoadedModel]


class PromptDetails(BaseModel):
    """Positions that were not read again, as the state of an earlier turn was kept."""

    cached_tokens: int


class CompletionDetails(BaseModel):
    """Codes of a spoken answer."""

    audio_tokens: int


class Usage(BaseModel):
    """Positions of the conversation; text ids and codes of the answer."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails | None = None


class SpokenAnswer(BaseModel):
    """What was said."""

    id: str = Field(description="Names the answer in later turns.")
    data: str = Field(description="A sound file in base64.")
    transcript: str
    expires_at: int = Field(description="Unix seconds until which the id is known.")


class ChatMessage(BaseModel):
    """The answer's words, or its speech."""

    role: Literal["assistant"]
    content: str | None
    refusal: str | None
    audio: SpokenAnswer | None = None


class ChatChoice(BaseModel):
    """The one answer."""

    index: int
    message: ChatMessage
    logprobs: None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(BaseModel):
    """An answer as a whole."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class SecondsUsed(BaseModel):
    """Sound taken in."""

    type: Literal["duration"]
    seconds: float


class Transcription(BaseModel):
    """The form json."""

    text: str
    usage: SecondsUsed


class TimedSegment(BaseModel):
    """A stretch of speech, in seconds from the beginning."""

    id: int
    start: float
    end: float
    text: str
    tokens: list[int]
    temperature: float


class VerboseTranscription(Transcription):
    """The form verbose_json."""

    task: Literal["transcribe"]
    duration: float
    segments: list[TimedSegment]


class CodePiece(BaseModel):
    """Codes of one piece of the recording, in seconds from the beginning."""

    start: float
    end: float
    codes: list[int]


class Codes(BaseModel):
    """A recording as the model hears it."""

    duration: float
    seconds_per_code: float
    codebook_size: int
    pieces: list[CodePiece]


_LATER = {"Retry-After": {"description": "Seconds.", "required": True, "schema": {"type": "integer"}}}
REFUSALS: dict[int | str, dict[str, Any]] = {
    "4XX": {
        "model": Problem,
        "description": "Refused: 400 something in it is wrong, 401 no API key or a wrong one, 403 an unknown host or "
        "origin, 404 another model or nothing at this address, 408 it took too long, 413 it is too large.",
    },
    429: {"model": Problem, "description": "Too many ask at once; try again later.", "headers": _LATER},
    503: {"model": Problem, "description": "The server is shutting down.", "headers": _LATER},
}
EVENTS = {
    "text/event-stream": {
        "itemSchema": {
            "type": "object",
            "description": "With stream=true: events whose data is JSON as OpenAI's, then [DONE].",
            "properties": {"data": {"type": "string"}},
            "required": ["data"],
        },
    }
}


def answers(
    description: str, model: Any = None, content: dict[str, dict[str, Any]] | None = None
) -> dict[int | str, dict[str, Any]]:
    """Returns `responses` of a route: 200, and the refusals that every route knows.

    Args:
        description: of the answer.
        model: of its JSON, or a union of models; None: it is no JSON.
        content: further media types, with what OpenAPI says of each.
    """
    answer: dict[str, Any] = {"description": description, "content": content or {}}
    return {200: {**answer, "model": model} if model else answer, **REFUSALS}


def texts(*media_types: str) -> dict[str, dict[str, Any]]:
    """Returns `content` of answers that are plain text."""
    return {name: {"schema": {"type": "string"}} for name in media_types}


def sounds(*media_types: str) -> dict[str, dict[str, Any]]:
    """Returns `content` of answers that are sound."""
    return {name: {"schema": {"type": "string", "format": "binary"}} for name in media_types}
