"""Errors in the form that OpenAI's clients read; what is not meant for a client stays here."""

from __future__ import annotations

import logging

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from psa_vlm.errors import AuditError, InputError, NoLanguageModel, Overloaded, RequestError
from psa_vlm.serving import protocol

_logger = logging.getLogger(__name__)


def told(error: Exception) -> RequestError:
    """What a client is told of an error."""
    match error:
        case RequestError():
            return error
        case NoLanguageModel():
            return RequestError(str(error), None, "no_language_model", 501)
        case InputError():
            return RequestError(str(error))
        case Overloaded():
            return RequestError(str(error), None, "overloaded", 429)
        case AuditError():
            told = "the request could not be recorded, so it is not answered"
            return RequestError(told, None, "audit_unavailable", 503)
        case HTTPException():
            return RequestError(str(error.detail), None, "http_error", error.status_code)
        case _:
            return RequestError("the request failed", None, "internal_error", 500)


def response(error: Exception) -> Response:
    """The whole answer to a request that failed."""
    one = told(error)
    headers = dict(error.headers or {}) if isinstance(error, HTTPException) else {}
    if isinstance(error, Overloaded):
        headers["Retry-After"] = str(error.retry_after)
    if one.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(protocol.error_body(one), one.status, headers)


def answer_errors(app: FastAPI) -> None:
    """Let every error of an app be answered by `response`."""

    async def failed(_: Request, error: Exception) -> Response:
        if isinstance(error, AuditError):
            _logger.error("%s", error)
        return response(error)

    async def malformed(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return response(protocol.invalid(error.errors()[0], error.body))

    for kind in (InputError, Overloaded, AuditError, HTTPException, Exception):
        app.add_exception_handler(kind, failed)
    app.add_exception_handler(RequestValidationError, malformed)
