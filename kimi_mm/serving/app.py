"""The server's routes put together.

connection ─► Timed ─► CORS (when asked for) ─► Guard ─► route ─► Answers ─► Engine
"""

from __future__ import annotations

from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.middleware.cors import CORSMiddleware

from kimi_mm import __version__
from kimi_mm.serving import chat, page, problems, speech, transcriptions
from kimi_mm.serving.guard import Guard
from kimi_mm.serving.metrics import Timed
from kimi_mm.serving.service import Service


def create_app(service: Service, api_key: str | None = None) -> FastAPI:
    """Returns the ASGI app of a service.

    Args:
        service: from `Service.of`; the caller closes its engine.
        api_key: asked of every request but for /health and the page's own files; None: nobody is asked.
    """
    app = FastAPI(
        title="kimi_mm",
        version=__version__,
        summary="Speech, pictures and text, behind OpenAI's API.",
        # The pages that describe an API load their scripts from elsewhere; the description itself is at /openapi.json.
        docs_url=None,
        redoc_url=None,
    )
    problems.install(app)
    _add_status(app, service)
    app.include_router(chat.routes(service))
    app.include_router(speech.routes(service))
    app.include_router(transcriptions.routes(service))
    app.include_router(page.routes(service))
    # The one added last stands outermost.
    app.add_middleware(Guard, config=service.config, api_key=api_key, open_paths=("/health", *page.assets()))
    if service.config.allow_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=service.config.allow_origins, allow_methods=["*"], allow_headers=["*"]
        )
    app.add_middleware(Timed, metrics=service.metrics)
    return app


def _add_status(app: FastAPI, service: Service) -> None:
    @app.get("/health", tags=["status"], summary="Whether the server takes requests")
    async def health() -> Response:
        if service.gate.closed:
            return JSONResponse({"status": "shutting down"}, 503)
        return JSONResponse({"status": "ok", "model": service.model_id})

    @app.get("/metrics", tags=["status"], summary="Counters in Prometheus' text form")
    async def metrics() -> Response:
        return Response(service.metrics.render(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models", tags=["models"], summary="The loaded model")
    async def models() -> dict:
        return {"object": "list", "data": [_model(service)]}

    @app.get("/v1/models/{name}", tags=["models"], summary="The loaded model, by name")
    async def model(name: str) -> dict:
        service.check_model(name)
        return _model(service)


def _model(service: Service) -> dict:
    config = service.model.config
    return {
        "id": service.model_id,
        "object": "model",
        "created": service.started,
        "owned_by": "kimi_mm",
        "hears": True,
        "sees": config.vision is not None,
        "speaks": config.detokenizer is not None and config.backbone.audio_head,
    }
