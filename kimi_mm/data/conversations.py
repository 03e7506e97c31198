"""Rows of data to what the processor lays out, strictly checked: conversations, and documents for pretraining.

    {"messages": [{"role": "user", "content": [{"type": "audio", "audio": "a.wav"}, {"type": "text", "text": "..."}]},
                  {"role": "assistant", "content": "..."}]}
    {"conversation": [{"role": "user", "message_type": "audio", "content": "a.wav"}, ...]}      as Kimi-Audio has it
    {"text": "...", "image": "a.png"}    {"parts": [{"type": "text", "text": "..."}, ...]}      documents
    {"segments": [{"audio": "a.wav", "text": "..."}, ...]}                                      speech cut in segments

Parts are OpenAI's ("text", "image_url", "input_audio") or plain ("image", "audio", "video"). A medium is a path, which
the file's folder must hold, or a `data:` URL; addresses are never fetched.
"""

from __future__ import annotations

import base64
import binascii
import difflib
import re
from typing import Any

from kimi_mm.data.rows import Row, RowError, Source
from kimi_mm.errors import UserError

ROLES = ("system", "user", "assistant")
MEDIA = ("audio", "image", "video")
KINDS = ("text", *MEDIA, "image_url", "input_audio")
Part = dict[str, Any]  # {"type": "text", "text": str} or {"type": kind, kind: Path | bytes}


def parse_conversation(row: Row) -> list[dict[str, Any]]:
    """Reads a row as messages, media in place as paths or bytes.

    Raises:
        RowError: the first thing that is wrong.
    """
    value = row.value()
    if "messages" not in value and "conversation" in value:
        value = {"messages": _from_kimi_audio(value["conversation"])}
    messages = value.get("messages")
    if not isinstance(messages, list) or not messages:
        near = difflib.get_close_matches("messages", [str(key) for key in value], n=1)
        hint = f"rename '{near[0]}'" if near and "messages" not in value else "give a non-empty list of messages"
        raise RowError("no 'messages'" if "messages" not in value else "'messages' is not a list, or empty", hint)
    parsed = [_message(message, number, row) for number, message in enumerate(messages)]
    if not any(message["role"] == "assistant" for message in parsed):
        raise RowError("no assistant message, so there is nothing to learn", "add the answer with role 'assistant'")
    return parsed


def parse_document(row: Row) -> list[Part]:
    """Reads a row as a document: parts in order. RowError names the first thing that is wrong."""
    value = row.value()
    if "parts" in value:
        if not isinstance(value["parts"], list) or not value["parts"]:
            raise RowError("'parts' is not a list, or empty", "give a list of parts such as {'type': 'text', ...}")
        return [_part(part, f"part {number}", row) for number, part in enumerate(value["parts"])]
    plain = [{"type": kind, kind: value[kind]} for kind in (*MEDIA, "text") if kind in value]
    if not plain:
        raise RowError("no 'parts', 'text', 'audio', 'image' or 'video'", "give at least one of these keys")
    return [_part(part, f"'{part['type']}'", row) for part in plain]


def parse_segments(row: Row) -> list[tuple[Part, Part]]:
    """Reads a row's "segments", each a recording and its transcript. RowError names the first thing that is wrong."""
    segments = row.value().get("segments")
    if not isinstance(segments, list) or len(segments) < 2:
        raise RowError("no list 'segments' of two or more", 'give [{"audio": ..., "text": ...}, ...]')
    found = []
    for number, segment in enumerate(segments):
        if not isinstance(segment, dict) or not {"audio", "text"} <= set(segment):
            raise RowError(f"segment {number} is not an object with 'audio' and 'text'", "give both")
        parts = [_part({"type": kind, kind: segment[kind]}, f"segment {number}", row) for kind in ("audio", "text")]
        found.append((parts[0], parts[1]))
    return found


def kinds_of(parts: list[Part]) -> set[str]:
    """Returns the kinds of media among parts."""
    return {part["type"] for part in parts if part["type"] in MEDIA}


def _message(message: Any, number: int, row: Row) -> dict[str, Any]:
    where = f"message {number}"
    if not isinstance(message, dict):
        raise RowError(f"{where} is not an object", 'write {"role": ..., "content": ...}')
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        near = difflib.get_close_matches(str(role), ROLES, n=1)
        raise RowError(f"{where}: role {role!r}", f"use '{near[0]}'" if near else f"use one of {', '.join(ROLES)}")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list) or not content:
        raise RowError(f"{where}: no content", "give a text or a non-empty list of parts")
    parts = [_part(part, f"{where}, part {i}", row) for i, part in enumerate(content)]
    if role == "assistant" and kinds_of(parts) & {"image", "video"}:
        raise RowError(f"{where}: the assistant shows a picture", "pictures belong in user messages")
    return {"role": role, "content": parts}


def _part(part: Any, where: str, row: Row) -> Part:
    if not isinstance(part, dict):
        raise RowError(f"{where} is not an object", 'write {"type": "text", "text": ...}')
    kind = part.get("type")
    if kind not in KINDS:
        near = difflib.get_close_matches(str(kind), KINDS, n=1)
        raise RowError(f"{where}: type {kind!r}", f"use '{near[0]}'" if near else f"use one of {', '.join(KINDS)}")
    if kind == "text":
        text = part.get("text")
        if not isinstance(text, str) or not text.strip():
            raise RowError(f"{where}: no text", "give a non-empty string, or leave the part out")
        return {"type": "text", "text": text}
    source = part.get(kind)
    if isinstance(source, dict):
        source = source.get("data" if kind == "input_audio" else "url")
        if kind == "input_audio" and isinstance(source, str) and not source.startswith("data:"):
            source = f"data:;base64,{source}"
    if not isinstance(source, str) or not source:
        raise RowError(f"{where}: no '{kind}'", f"give '{kind}' a path or a data: URL")
    kind = {"image_url": "image", "input_audio": "audio"}.get(kind, kind)
    return {"type": kind, kind: _source(source, where, row)}


def _source(text: str, where: str, row: Row) -> Source:
    if text[:5].lower() == "data:":
        kind, comma, data = text.partition(",")
        if not comma or not kind.lower().endswith(";base64"):
            raise RowError(f"{where}: a data: URL without base64", "write data:image/png;base64,...")
        try:
            return base64.b64decode(data, validate=True)
        except binascii.Error as error:
            raise RowError(f"{where}: not valid base64 ({error})", "encode the file again") from None
    if re.match(r"(?i)[a-z][a-z0-9+.-]+://", text):
        raise RowError(f"{where}: '{text[:60]}' is an address", "download the file and give its path")
    try:
        return row.fetch(text)
    except RowError as error:
        raise RowError(f"{where}: {error.reason}", error.fix) from None
    except UserError as error:
        raise RowError(f"{where}: {str(error).rstrip('.')}", "keep media beside the data file or below it") from None


def _from_kimi_audio(conversation: Any) -> list[dict[str, Any]]:
    """Kimi-Audio's lines to messages: neighbours of one role become one message with several parts."""
    if not isinstance(conversation, list):
        raise RowError("'conversation' is not a list", "give a list of messages")
    messages: list[dict[str, Any]] = []
    for number, item in enumerate(conversation):
        kind = item.get("message_type") if isinstance(item, dict) else None
        if kind not in ("text", "audio", "audio-text"):
            raise RowError(f"message {number}: message_type {kind!r}", "use 'text', 'audio' or 'audio-text'")
        content, parts = item.get("content"), []
        if kind == "audio-text":
            if not isinstance(content, list) or len(content) != 2:
                raise RowError(f"message {number}: 'audio-text' without two contents", "give [path, text]")
            parts = [{"type": "text", "text": content[1]}, {"type": "audio", "audio": content[0]}]
        else:
            parts = [{"type": kind, kind: content}]
        if messages and messages[-1]["role"] == item.get("role"):
            messages[-1]["content"] += parts
        else:
            messages.append({"role": item.get("role"), "content": parts})
    return messages
