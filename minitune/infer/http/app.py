"""The FastAPI application: routes, faults, the page."""

from __future__ import annotations

import mimetypes

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.middleware.cors import CORSMiddleware

from minitune.infer.http import errors, routes, tutorial
from minitune.infer.http.guard import PAGE, Guard
from minitune.infer.http.service import READY, Service

CORS_HEADERS = ["Authorization", "Content-Type"]


def create_app(service: Service) -> FastAPI:
    """The application over a service, which may still be loading."""
    # FastAPI's own pages load scripts from elsewhere.
    app = FastAPI(title="minitune", openapi_url=None)
    app.state.service = service
    errors.install(app)
    app.include_router(routes.router)
    app.include_router(tutorial.router)
    app.add_middleware(Guard, service=service)
    if service.settings.cors:  # added last, so outermost: a preflight carries no key
        app.add_middleware(
            CORSMiddleware,
            allow_origins=service.settings.cors,
            allow_methods=["GET", "POST"],
            allow_headers=["*"] if "*" in service.settings.cors else CORS_HEADERS,
            expose_headers=["Retry-After"],
        )

    @app.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> Response:
        """200 when answers can be had, 503 before and after."""
        alive = service.phase == READY
        return JSONResponse({"status": "ok" if alive else service.phase}, 200 if alive else 503)

    @app.get("/metrics")
    async def metrics(_: Request) -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.api_route("/", methods=["GET", "HEAD"])
    async def page() -> Response:
        return FileResponse(PAGE / "index.html", media_type="text/html; charset=utf-8")

    mimetypes.add_type("text/javascript", ".js")  # some systems' tables say text/plain, which nosniff refuses
    app.mount("/page", StaticFiles(directory=PAGE), name="page")
    return app
