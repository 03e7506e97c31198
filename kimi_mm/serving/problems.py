"""Errors as OpenAI's clients expect them: a status and {"error": {message, type, param, code}}."""

from __future__ import annotations

import json
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from kimi_mm.errors import UserError
from kimi_mm.serving.engine import EngineClosed

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A refusal with a status of its own.

    Args:
        status: of HTTP, 4xx or 503.
        message: one sentence: what was wrong, what to do.
        param: the field at fault.
        code: OpenAI's machine-readable word for it, such as "context_length_exceeded".
        retry_after: seconds after which it may work.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry_after: int = 0
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after


def body_of(error: Exception) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Returns status, JSON body and headers of an error; what nobody foresaw is a 500 that tells nothing."""
    headers: dict[str, str] = {}
    param = code = None
    if isinstance(error, ApiError):
        status, message, param, code = error.status, str(error), error.param, error.code
        if error.retry_after:
            headers["Retry-After"] = str(error.retry_after)
        if status == 401:
            headers["WWW-Authenticate"] = "Bearer"
    elif isinstance(error, UserError):
        status, message = 400, str(error)
    elif isinstance(error, TimeoutError):
        status, message, code = 408, "the answer took longer than the server allows; ask for less.", "timeout"
    elif isinstance(error, EngineClosed):
        status, message, headers = 503, str(error), {"Retry-After": "5"}
    elif isinstance(error, RequestValidationError):
        status, (message, param) = 400, _first_fault(error)
    elif isinstance(error, HTTPException):
        status, message, headers = error.status_code, _sentence(error), dict(error.headers or {})
    else:
        status, message = 500, "the server made a mistake; its log says more."
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    # Both may quote the asker, whose JSON may hold halves of characters.
    message = message.encode("utf-8", "replace").decode()
    param = param and param.encode("utf-8", "replace").decode()
    return status, {"error": {"message": message, "type": kind, "param": param, "code": code}}, headers


def response_of(error: Exception) -> JSONResponse:
    """Returns the response that tells of an error."""
    status, body, headers = body_of(error)
    return JSONResponse(body, status, headers)


def event_of(error: Exception) -> str:
    """Returns the error as the data of a server-sent event: the status line has long gone."""
    return json.dumps(body_of(error)[1], ensure_ascii=False)


def install(app: FastAPI) -> None:
    """Makes an app answer with these errors."""

    async def answer(request: Request, error: Exception) -> JSONResponse:
        return response_of(error)

    for kind in (ApiError, UserError, TimeoutError, EngineClosed, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, answer)


def _first_fault(error: RequestValidationError) -> tuple[str, str | None]:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first.get("loc", ()) if part not in ("body", "query"))
    message = str(first.get("msg", "not valid")).rstrip(".")
    return f"{where or 'the body'}: {message[0].lower()}{message[1:]}.", where or None


def _sentence(error: HTTPException) -> str:
    detail = str(error.detail).rstrip(".")
    if error.status_code == 404:
        return "there is nothing at this address; the API is described at /openapi.json."
    if error.status_code == 405:
        return "this address does not take this method."
    return f"{detail[:1].lower()}{detail[1:]}."
