"""The web pages at `/` and `/talk`: files of `static/`, read once, and what they ask for beside OpenAI's API.

GET /     ─► index.html ─► /static/page.css, page.js ... ─► /v1/audio/transcriptions, /v1/audio/codes
                           /static/sample.flac: a shipped recording, to try it without a microphone
GET /talk ─► talk.html  ─► /static/talk.js ...           ─► /v1/realtime

Everything is the server's own: the policy sent with the page forbids any other source. Browsers ask whether a file has
changed before they use what they kept, so that a newer server never meets an older page.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from fastapi import APIRouter, File, Request, Response, UploadFile
from fastapi.responses import JSONResponse

from kimi_mm.audio.segment import split_at_silence
from kimi_mm.cli.demo import CLIPS
from kimi_mm.pipeline import SAMPLE_RATE
from kimi_mm.serving.described import Codes, answers
from kimi_mm.serving.service import Service

STATIC = Path(__file__).parent / "static"
SAMPLE = CLIPS / "vm-instructions.flac"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".flac": "audio/flac",
}
HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; media-src blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "microphone=(self), camera=(), geolocation=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


@dataclass(frozen=True)
class Asset:
    """A file of the page: its bytes, their media type, and a tag that changes with them."""

    data: bytes
    media_type: str
    tag: str


def assets() -> dict[str, Asset]:
    """Returns every file of the page by its address."""
    found = {f"/static/{path.name}": path for path in STATIC.iterdir() if path.suffix in TYPES}
    found["/"], found["/talk"] = found.pop("/static/index.html"), found.pop("/static/talk.html")
    found["/static/sample.flac"] = SAMPLE
    return {address: _asset(path) for address, path in found.items()}


def routes(service: Service) -> APIRouter:
    """Returns the routes of the page over a service."""
    router = APIRouter()
    for address, asset in assets().items():
        _serve(router, address, asset)

    @router.post(
        "/v1/audio/codes",
        tags=["audio"],
        summary="The audio codes that the model hears in a recording",
        response_class=Response,
        responses=answers("The codes of each piece.", Codes),
    )
    async def codes(
        request: Request, file: Annotated[UploadFile, File(description="Any format that libsndfile reads.")]
    ) -> Response:
        data = await file.read()

        async def whole() -> Response:
            wave, seconds = await service.read_audio(data)
            tokenizer = service.model.tokenizer

            def encode(start: int, end: int) -> list[int]:
                with torch.inference_mode():
                    return tokenizer.encode(wave[start:end], SAMPLE_RATE).codes.tolist()

            pieces = [
                {
                    "start": round(start / SAMPLE_RATE, 3),
                    "end": round(end / SAMPLE_RATE, 3),
                    "codes": await service.engine.call(lambda start=start, end=end: encode(start, end)),
                }
                for start, end in split_at_silence(wave)
            ]
            return JSONResponse(
                {
                    "duration": round(seconds, 3),
                    "seconds_per_code": tokenizer.config.samples_per_code / SAMPLE_RATE,
                    "codebook_size": tokenizer.config.quantizer.codebook_size,
                    "pieces": pieces,
                }
            )

        return await service.answers.whole(request, whole)

    return router


def _asset(path: Path) -> Asset:
    data = path.read_bytes()
    return Asset(data, TYPES[path.suffix], f'"{hashlib.sha256(data).hexdigest()[:20]}"')


def _serve(router: APIRouter, address: str, asset: Asset) -> None:
    @router.api_route(address, methods=["GET", "HEAD"], include_in_schema=False)
    async def serve(request: Request) -> Response:
        headers = {**HEADERS, "ETag": asset.tag}
        asked = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
        if asset.tag in asked:
            return Response(status_code=304, headers=headers)
        return Response(asset.data, media_type=asset.media_type, headers=headers)
