"""What a chat request may say, and its conversation read into a prompt.

JSON ─► ChatRequest ─► sounds decoded aside ─► codes (engine) ─► pictures cut, streams laid out aside ─► Prompt
"""

from __future__ import annotations

import base64
import binascii
from typing import Annotated, Any, Literal

import anyio.to_thread
import torch
from pydantic import AfterValidator, BaseModel, Discriminator, Field, Tag

from kimi_mm.audio.tokens import AudioTokens
from kimi_mm.pipeline import SAMPLE_RATE
from kimi_mm.serving.batch import Prompt
from kimi_mm.serving.problems import ApiError
from kimi_mm.serving.service import Service
from kimi_mm.serving.speaking import check_voice

MAX_PARTS = 4096  # of all messages
MAX_MEDIA = 64


def _whole(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("half a character (a lone surrogate) is no text") from None
    return text


Words = Annotated[str, AfterValidator(_whole)]


class TextPart(BaseModel):
    """Words."""

    type: Literal["text"]
    text: Words


class SoundData(BaseModel):
    """A recording."""

    data: str = Field(description="A sound file in base64.")
    format: str | None = Field(None, description="Not needed: the file says what it is.")


class SoundPart(BaseModel):
    """Something to listen to."""

    type: Literal["input_audio"]
    input_audio: SoundData


class PictureAddress(BaseModel):
    """A picture."""

    url: Words = Field(description="data:image/...;base64,...")
    detail: str | None = None


class PicturePart(BaseModel):
    """Something to look at."""

    type: Literal["image_url"]
    image_url: PictureAddress


Part = Annotated[TextPart | SoundPart | PicturePart, Field(discriminator="type")]


class SpokenBefore(BaseModel):
    """An earlier spoken answer."""

    id: Words


class Message(BaseModel):
    """One turn; only the assistant's may name a spoken answer in place of its content."""

    role: Literal["system", "developer", "user", "assistant"]
    content: (
        Annotated[
            Annotated[Words, Tag("text")] | Annotated[list[Part], Tag("parts")],
            Discriminator(lambda value: "text" if isinstance(value, str) else "parts"),
        ]
        | None
    ) = None
    audio: SpokenBefore | None = None

    def check(self) -> None:
        """Raises ApiError 400 where there is nothing in it, or the user names an answer."""
        if self.audio is not None and self.role != "assistant":
            raise ApiError(400, "messages: 'audio' belongs into a message of the assistant.", param="messages")
        if self.audio is None and self.content is None:
            raise ApiError(400, "messages: a message needs 'content'.", param="messages")


class AudioOutput(BaseModel):
    """How an answer is spoken; the model has one voice, so any name of one is taken."""

    format: Literal["wav", "flac", "mp3", "opus", "pcm16"]
    voice: Any = None


class StreamOptions(BaseModel):
    """What a stream holds."""

    include_usage: bool = False


class ChatRequest(BaseModel):
    """The body of /v1/chat/completions; `refuse_unknown` says which of OpenAI's other fields change nothing here."""

    model: Words
    messages: list[Message] = Field(min_length=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    max_tokens: int | None = Field(None, ge=1, le=2**20)
    max_completion_tokens: int | None = Field(None, ge=1, le=2**20)
    stop: Words | list[Words] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    modalities: list[Literal["text", "audio"]] | None = None
    audio: AudioOutput | None = None
    n: int | None = None
    top_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logprobs: bool | None = None
    logit_bias: dict[str, float] | None = None
    tools: list[Any] | None = None
    response_format: dict[str, Any] | None = None

    @property
    def budget(self) -> int | None:
        """Most ids of each stream of the answer, where the request says."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def spoken(self) -> bool:
        """Whether the answer is wanted in text and speech."""
        return bool(self.modalities and "audio" in self.modalities)

    @property
    def stops(self) -> list[str]:
        """Texts before which the answer ends."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def new_generator(self, service: Service) -> torch.Generator:
        """Returns the source of this answer's randomness: as `seed` says, or new where there is `temperature`."""
        generator = torch.Generator(service.model.device)
        if self.temperature and self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed or 0)
        return generator

    def refuse_unknown(self, service: Service) -> None:
        """Raises ApiError 400 where the answer would not be what was asked for, 404 for another model."""
        service.check_model(self.model)
        idle: dict[str, tuple[Any, ...]] = {
            "n": (None, 1),
            "top_p": (None, 1.0),
            "frequency_penalty": (None, 0.0),
            "presence_penalty": (None, 0.0),
            "logprobs": (None, False),
            "logit_bias": (None, {}),
            "tools": (None, []),
            "response_format": (None, {"type": "text"}),
        }
        for name, values in idle.items():
            if getattr(self, name) not in values:
                raise ApiError(400, f"{name}: this server takes only the default; leave it out.", param=name)
        if len(self.stops) > 4 or "" in self.stops:
            raise ApiError(400, "stop: at most four texts, none of them empty.", param="stop")
        if self.spoken:
            check_voice(service.model)
            self._check_spoken()
        for message in self.messages:
            message.check()
        if self.messages[-1].role == "assistant":
            raise ApiError(400, "messages: the last one must not be the assistant's.", param="messages")

    def _check_spoken(self) -> None:
        if self.audio is None:
            raise ApiError(400, "audio: say which format the answer shall have.", param="audio")
        if self.stream and self.audio.format != "pcm16":
            raise ApiError(400, "audio.format: a stream has 'pcm16'.", param="audio.format")
        if self.stops:
            raise ApiError(400, "stop: a spoken answer ends by itself; leave it out.", param="stop")


async def read_prompt(service: Service, messages: list[Message], output: str = "text") -> Prompt:
    """Reads a conversation, to be answered in text or, with output "speech", in text and speech.

    Raises:
        ApiError: 400, it is too long, or holds a picture that is not a data URL.
        UserError: a recording or a picture cannot be used, or the model has no organ for it.
    """
    limit = service.config.max_prompt
    parts = [part for message in messages if isinstance(message.content, list) for part in message.content]
    if len(messages) + len(parts) > MAX_PARTS:
        raise ApiError(400, f"messages: more than {MAX_PARTS} messages and parts; send fewer.", param="messages")
    if sum(not isinstance(part, TextPart) for part in parts) > MAX_MEDIA:
        raise ApiError(400, f"messages: more than {MAX_MEDIA} recordings and pictures; send fewer.", param="messages")
    texts = [message.content for message in messages if isinstance(message.content, str)]
    letters = sum(map(len, texts)) + sum(len(part.text) for part in parts if isinstance(part, TextPart))
    if letters > 32 * limit:
        raise _too_long(limit)
    turns = [
        {
            "role": "system" if message.role == "developer" else message.role,
            "content": await _read_content(service, message),
        }
        for message in messages
    ]
    return await read_turns(service, turns, output, limit)


async def read_turns(service: Service, turns: list[dict[str, Any]], output: str, limit: int) -> Prompt:
    """Lays out turns whose recordings have been tokenized; arguments and errors else as of `read_prompt`."""

    # Nothing is left that needs the model itself, so this runs beside it; pictures are decoded here.
    def lay_out() -> Prompt:
        prompt = Prompt(*service.model.read(turns, output))
        if len(prompt) > limit:
            raise _too_long(limit)
        _ = prompt.places  # digests take a while too
        return prompt

    return await anyio.to_thread.run_sync(lay_out)


async def _read_content(service: Service, message: Message) -> str | list[dict[str, Any]]:
    if message.audio is not None:
        return service.spoken.get(message.audio.id).parts
    assert message.content is not None
    if isinstance(message.content, str):
        return message.content
    return [await _read_part(service, part, message.role) for part in message.content]


async def _read_part(service: Service, part: TextPart | SoundPart | PicturePart, role: str) -> dict[str, Any]:
    if isinstance(part, TextPart):
        return {"type": "text", "text": part.text}
    if role != "user":
        raise ApiError(400, f"messages: '{part.type}' belongs into a message of the user.", param="messages")
    if isinstance(part, SoundPart):
        return {"type": "audio", "audio": await _listen(service, part.input_audio.data)}
    url = part.image_url.url
    if not url[:5].lower() == "data:":
        raise ApiError(
            400, "image_url: only data: URLs are taken; nothing is fetched from elsewhere.", param="messages"
        )
    service.model.look([])  # raises the sentence of a model without eyes
    return {"type": "image", "image": url}


async def _listen(service: Service, data: str) -> AudioTokens:
    try:
        raw = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise ApiError(400, "input_audio: 'data' is not base64.", param="messages") from None
    tokenizer = service.model.tokenizer
    wave, seconds = await service.read_audio(raw)
    if seconds * 12.5 > service.config.max_prompt:
        raise _too_long(service.config.max_prompt)

    def encode() -> AudioTokens:
        with torch.inference_mode():
            return tokenizer.encode(wave, SAMPLE_RATE)

    return await service.engine.call(encode)


def _too_long(limit: int) -> ApiError:
    return ApiError(
        400,
        f"messages: the conversation is longer than {limit} positions; shorten it.",
        param="messages",
        code="context_length_exceeded",
    )
