"""In front of every route: the key, the headers that a browser obeys, the count of responses."""

from __future__ import annotations

import hmac
from pathlib import Path

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minitune.infer.http.errors import ApiError
from minitune.infer.http.service import Service

PAGE = Path(__file__).with_name("page")
BODY_LIMIT = 8 << 20  # bytes of a request: a long context in any script, escaped, and no more
# The page's own files, and nothing from anywhere else: text that a model wrote can load or send nothing.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
SAFE = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
}
ROUTES = {"/", "/health", "/metrics", "/v1/models", "/v1/chat/completions", "/v1/completions"}
TOO_LARGE = f"the body is larger than {BODY_LIMIT >> 20} MiB"


def limited(receive: Receive) -> Receive:
    """The same, until more than BODY_LIMIT has come: a client need not say the length beforehand."""
    total = 0

    async def counted() -> Message:
        nonlocal total
        message = await receive()
        total += len(message.get("body", b""))
        if total > BODY_LIMIT:
            raise HTTPException(413, TOO_LARGE)  # FastAPI, which reads the body, lets no other through
        return message

    return counted


class Guard:
    """An ASGI middleware that keeps `receive` as it is, so that routes see a client go."""

    def __init__(self, app: ASGIApp, service: Service):
        self.app, self.service = app, service
        self.keys = [key.encode() for key in service.settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"]
        counted = path if path in ROUTES else "/page" if path.startswith("/page/") else "other"

        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in SAFE.items():
                    headers.setdefault(name, value)
                if path == "/" or path.startswith("/page/"):
                    headers["Cache-Control"] = "no-cache"  # asked again each time, answered from the ETag
                else:
                    headers.setdefault("Cache-Control", "no-store")
                self.service.metrics.responses.labels(counted, str(message["status"])).inc()
            await send(message)

        try:
            self.check(scope, path)
        except ApiError as error:
            await error.response()(scope, receive, marked)
            return
        await self.app(scope, limited(receive), marked)

    def check(self, scope: Scope, path: str) -> None:
        """Raises ApiError: 413, or 401. The page is open, since it asks for the key itself; so is /health."""
        length = Headers(scope=scope).get("content-length", "0")
        if length.isascii() and length.isdigit() and int(length) > BODY_LIMIT:
            raise ApiError(413, TOO_LARGE)
        get = scope["method"] in ("GET", "HEAD")
        if not self.keys or path == "/health" or (get and (path == "/" or path.startswith("/page/"))):
            return
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        given = key.strip().encode() if scheme.lower() == "bearer" else b""
        if not given:
            message = "no API key; send the header Authorization: Bearer KEY"
            raise ApiError(401, message, code="missing_api_key")
        # Every key is compared, each in the time that its length takes: how long it took tells nothing.
        if not any([hmac.compare_digest(given, known) for known in self.keys]):
            raise ApiError(401, "the API key is wrong", code="invalid_api_key")
