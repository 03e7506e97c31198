"""OpenAI's realtime events as JSON: what clients may send, and the settings of a session.

Names and shapes are those of the API's current form (`openai.types.realtime`). A key that is not known is refused, and
so is a value that would change the answer and is not supported.
"""

from __future__ import annotations

import secrets
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from kimi_mm.serving.chat_request import Words
from kimi_mm.serving.problems import ApiError

Modalities = Annotated[list[Literal["text", "audio"]], Field(min_length=1, max_length=1)]
Budget = Annotated[int, Field(ge=1, le=4096)] | Literal["inf"]
Name = Annotated[Words, Field(min_length=1, max_length=128)]
RATE = 24_000


def new_id(kind: str) -> str:
    """Returns a new id: "event", "item", "resp", "sess", "conv"."""
    return f"{kind}_{secrets.token_hex(10)}"


class Strict(BaseModel):
    """Knows all its keys."""

    model_config = ConfigDict(extra="forbid")


# ---- settings ------------------------------------------------------------------------------------------------------


class Pcm(Strict):
    """16-bit little-endian mono."""

    type: Literal["audio/pcm"] = "audio/pcm"
    rate: Literal[24_000] = RATE


class Transcription(Strict):
    """Asks for a transcript of what the user says; the session's model makes it, whatever name is given."""

    model: Words | None = None
    language: Words | None = None
    prompt: Words | None = None


class ServerVad(Strict):
    """Turns begin and end where speech does."""

    type: Literal["server_vad"] = "server_vad"
    threshold: float = Field(default=0.5, ge=0.05, le=1.0)
    prefix_padding_ms: int = Field(default=300, ge=0, le=5000)
    silence_duration_ms: int = Field(default=500, ge=50, le=10_000)
    create_response: bool = True
    interrupt_response: bool = True
    idle_timeout_ms: None = None


class Input(Strict):
    """What is heard."""

    format: Pcm = Pcm()
    transcription: Transcription | None = None
    noise_reduction: None = None
    turn_detection: ServerVad | None = ServerVad()


class Output(Strict):
    """What is said; the model has one voice, so any name of one is taken."""

    format: Pcm = Pcm()
    voice: Any = None
    speed: float | None = Field(default=None, ge=1.0, le=1.0)


class Audio(Strict):
    """Both ways."""

    input: Input = Input()
    output: Output = Output()


class Settings(Strict):
    """Settings of a session."""

    type: Literal["realtime", "transcription"] = "realtime"
    model: Words | None = None
    instructions: Words = ""
    output_modalities: Modalities = ["audio"]
    max_output_tokens: Budget = "inf"
    audio: Audio = Audio()
    include: Annotated[list[Any], Field(max_length=0)] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] = []
    tool_choice: Literal["auto", "none"] = "auto"
    tracing: None = None
    prompt: None = None
    truncation: Literal["auto", "disabled"] = "auto"

    def updated(self, change: dict[str, Any]) -> Settings:
        """Returns the settings with those keys replaced that a change names, however deep.

        Raises:
            ApiError: a key is not known or a value not supported.
        """
        return read(TypeAdapter(Settings), _merged(self.model_dump(), change), "session")


class Asked(Strict):
    """What a single response may have of its own."""

    instructions: Words | None = None
    output_modalities: Modalities | None = None
    max_output_tokens: Budget | None = None
    conversation: Literal["auto", "none"] = "auto"
    input: list[dict[str, Any]] | None = Field(default=None, max_length=256)
    metadata: dict[str, str] | None = Field(default=None, max_length=16)
    audio: Any = None
    tools: Annotated[list[Any], Field(max_length=0)] = []
    tool_choice: Literal["auto", "none"] = "auto"


# ---- items ---------------------------------------------------------------------------------------------------------


class Content(Strict):
    """A part of a message."""

    type: Literal["input_text", "input_audio", "input_image", "output_text", "output_audio"]
    text: Words | None = None
    audio: str | None = None
    transcript: Words | None = None
    image_url: Words | None = None
    detail: str | None = None


class Message(Strict):
    """A message as clients send it."""

    type: Literal["message"]
    role: Literal["system", "user", "assistant"]
    content: list[Content] = Field(min_length=1, max_length=64)
    id: Name | None = None
    object: Any = None
    status: Any = None


# ---- client events -------------------------------------------------------------------------------------------------


class Event(Strict):
    """What all have."""

    event_id: Words | None = Field(default=None, max_length=512)


class SessionUpdate(Event):
    """Changes settings."""

    type: Literal["session.update"]
    session: dict[str, Any]


class Append(Event):
    """Gives sound."""

    type: Literal["input_audio_buffer.append"]
    audio: str


class Commit(Event):
    """Makes a turn of the sound so far."""

    type: Literal["input_audio_buffer.commit"]


class Clear(Event):
    """Forgets the sound so far."""

    type: Literal["input_audio_buffer.clear"]


class ItemCreate(Event):
    """Adds a message."""

    type: Literal["conversation.item.create"]
    item: Message
    previous_item_id: Name | None = None


class ItemRetrieve(Event):
    """Asks for a message."""

    type: Literal["conversation.item.retrieve"]
    item_id: Name


class ItemDelete(Event):
    """Takes a message out."""

    type: Literal["conversation.item.delete"]
    item_id: Name


class ItemTruncate(Event):
    """Says how much of a spoken answer was heard."""

    type: Literal["conversation.item.truncate"]
    item_id: Name
    content_index: Literal[0]
    audio_end_ms: int = Field(ge=0)


class ResponseCreate(Event):
    """Asks for an answer."""

    type: Literal["response.create"]
    response: Asked | None = None


class ResponseCancel(Event):
    """Stops the answer."""

    type: Literal["response.cancel"]
    response_id: Name | None = None


ClientEvent = Annotated[
    SessionUpdate
    | Append
    | Commit
    | Clear
    | ItemCreate
    | ItemRetrieve
    | ItemDelete
    | ItemTruncate
    | ResponseCreate
    | ResponseCancel,
    Field(discriminator="type"),
]
CLIENT_EVENT: TypeAdapter[ClientEvent] = TypeAdapter(ClientEvent)
MESSAGE = TypeAdapter(Message)


def read(adapter: TypeAdapter, value: Any, where: str = "") -> Any:
    """Returns a value as a model.

    Raises:
        ApiError: 400 with the first fault.
    """
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        names = [str(part) for part in first["loc"] if str(part) not in _TAGS]
        place = ".".join([*([where] if where else []), *names])
        message = {
            "extra_forbidden": "is not known here",
            "union_tag_invalid": "there is no event of this type",
            "union_tag_not_found": "an event needs a 'type'",
        }.get(first["type"], first["msg"][:1].lower() + first["msg"][1:])
        raise ApiError(400, f"{place or 'the event'}: {message[:400]}.", param=place[:200] or None) from None


_TAGS = frozenset(
    [
        "session.update",
        *(f"input_audio_buffer.{name}" for name in ("append", "commit", "clear")),
        *(f"conversation.item.{name}" for name in ("create", "retrieve", "delete", "truncate")),
        "response.create",
        "response.cancel",
    ]
)


def _merged(old: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    both = dict(old)
    for key, value in change.items():
        before = both.get(key)
        both[key] = _merged(before, value) if isinstance(before, dict) and isinstance(value, dict) else value
    return both
