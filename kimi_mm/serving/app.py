"""The server's routes put together.

connection ─► Timed ─► CORS (when asked for) ─► Guard ─► route ─► Answers ─► Engine
"""

from __future__ import annotations

from fastapi import APIRouter, FastAPI, Response, Security
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.middleware.cors import CORSMiddleware

from kimi_mm import __version__
from kimi_mm.serving import chat, page, problems, speech, transcriptions
from kimi_mm.serving.described import REFUSALS, Health, LoadedModel, ModelList, answers, texts
from kimi_mm.serving.guard import Guard
from kimi_mm.serving.metrics import Timed
from kimi_mm.serving.realtime import route as realtime
from kimi_mm.serving.service import Service
from kimi_mm.serving.speaking import speaks


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
    app.include_router(_status(service))
    # The guard asks for the key; this describes it.
    needed = [] if api_key is None else [Security(HTTPBearer(auto_error=False, description="The server's API key."))]
    for routes in (_facts, chat.routes, speech.routes, transcriptions.routes, page.routes):
        app.include_router(routes(service), dependencies=needed)
    app.include_router(realtime.routes(service))
    # The one added last stands outermost.
    app.add_middleware(Guard, config=service.config, api_key=api_key, open_paths=("/health", *page.assets()))
    if service.config.allow_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=service.config.allow_origins, allow_methods=["*"], allow_headers=["*"]
        )
    app.add_middleware(Timed, metrics=service.metrics)
    return app


def _status(service: Service) -> APIRouter:
    """Routes that need no key."""
    router = APIRouter(tags=["status"])

    @router.get(
        "/health",
        summary="Whether the server takes requests",
        response_class=Response,
        responses={
            200: {"model": Health, "description": "It does."},
            503: {"model": Health, "description": "It is shutting down."},
            "4XX": REFUSALS["4XX"],
        },
    )
    async def health() -> Response:
        if service.gate.closed:
            return JSONResponse({"status": "shutting down"}, 503)
        return JSONResponse({"status": "ok", "model": service.model_id})

    return router


def _facts(service: Service) -> APIRouter:
    router = APIRouter()

    @router.get(
        "/metrics",
        tags=["status"],
        summary="Counters in Prometheus' text form",
        response_class=Response,
        responses=answers("The counters.", None, texts("text/plain")),
    )
    async def metrics() -> Response:
        return Response(service.metrics.render(), media_type=CONTENT_TYPE_LATEST)

    @router.get(
        "/v1/models", tags=["models"], summary="The loaded model", responses=answers("It, in a list.", ModelList)
    )
    async def models() -> dict:
        return {"object": "list", "data": [_model(service)]}

    @router.get(
        "/v1/models/{name}", tags=["models"], summary="The loaded model, by name", responses=answers("It.", LoadedModel)
    )
    async def model(name: str) -> dict:
        service.check_model(name)
        return _model(service)

    return router


def _model(service: Service) -> dict:
    config = service.model.config
    return {
        "id": service.model_id,
        "object": "model",
        "created": service.started,
        "owned_by": "kimi_mm",
        "hears": True,
        "sees": config.vision is not None,
        "speaks": speaks(service.model),
    }
