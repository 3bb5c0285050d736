"""What goes wrong, in OpenAI's form: `{"error": {"message", "type", "param", "code"}}`, one line each."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from minitune.config import UserError

INVALID = "invalid_request_error"


class ApiError(Exception):
    """An answer that is not the one asked for; `status` is HTTP's."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status, self.kind, self.param, self.code = status, kind, param, code
        self.headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
        if status == 401:
            self.headers["WWW-Authenticate"] = "Bearer"

    def body(self) -> dict[str, Any]:
        error = {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, self.headers)


class ClientGone(Exception):
    """Whoever asked has closed the connection."""


def unknown_model(name: str, known: list[str]) -> ApiError:
    there = ", ".join(f"`{n}`" for n in known)
    return ApiError(404, f"the model `{name}` does not exist; there is {there}", param="model", code="model_not_found")


def engine_failed(error: UserError | None, finish: str) -> ApiError:
    """An answer that broke off inside: `finish` is error, or cancelled when the server stops."""
    if finish == "cancelled":
        return ApiError(503, "the server is stopping", kind="server_error", code="stopping")
    return ApiError(500, str(error or "the answer broke off"), kind="server_error", code="engine_error")


def install(app: FastAPI) -> None:
    """Gives every kind of fault its form."""

    @app.exception_handler(ApiError)
    async def api(_: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(UserError)
    async def user(_: Request, error: UserError) -> JSONResponse:
        return ApiError(400, str(error)).response()

    @app.exception_handler(RequestValidationError)
    async def validation(request: Request, error: RequestValidationError) -> JSONResponse:
        return invalid(error.errors(), request.headers.get("content-type", "")).response()

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        where = f"{request.method} {request.url.path}"
        message = {404: f"unknown path ({where})", 405: f"this path does not take {request.method} ({where})"}
        mended = ApiError(error.status_code, message.get(error.status_code, str(error.detail)))
        mended.headers |= dict(error.headers or {})
        return mended.response()

    @app.exception_handler(Exception)
    async def unforeseen(_: Request, __: Exception) -> JSONResponse:  # the traceback goes to the server's log
        return ApiError(500, "internal error; the server's log says more", kind="server_error").response()

    @app.exception_handler(ClientGone)
    async def gone(_: Request, __: ClientGone) -> JSONResponse:
        return ApiError(499, "the client closed the connection").response()  # nobody reads it


def invalid(errors: Any, content_type: str) -> ApiError:
    """The first of pydantic's complaints as one line."""
    first = errors[0]
    path = [part for part in first["loc"] if part not in ("body", "[key]")]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first['ctx']['error']}")
    if first["type"] == "refused":
        return ApiError(400, first["ctx"]["message"], param=first["ctx"]["field"], code="unsupported_parameter")
    if not path:
        if "json" not in content_type:
            return ApiError(400, "send the body as JSON, with the header Content-Type: application/json")
        return ApiError(400, "the body must be a JSON object")
    if path[0] == "prompt" and len(path) > 1:  # a union: four complaints, none of which helps
        texts = "prompt takes a text, a list of texts, a list of token ids, or a list of such lists"
        return ApiError(400, texts, param="prompt")
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")
    if first["type"] == "missing":
        return ApiError(400, f"`{name}` is missing", param=name, code="missing_required_parameter")
    message = str(first["msg"]).removeprefix("Value error, ")
    return ApiError(400, f"{name}: {message[:1].lower()}{message[1:]}", param=name)
