"""A real server on a real socket of this machine, in a thread, for as long as a test needs it."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import uvicorn

from minitune.infer import serve
from minitune.infer.http.app import create_app
from minitune.infer.http.service import HttpSettings, Service
from minitune.infer.session import Session


class Served:
    """url: where it listens; service: what stands behind it."""

    def __init__(self, url: str, service: Service):
        self.url, self.service = url, service
        self.http = httpx.Client(base_url=url, timeout=30, trust_env=False)

    def chat(self, **fields: Any) -> httpx.Response:
        asked = {"model": self.service.base, "messages": [{"role": "user", "content": "你好"}]} | fields
        return self.http.post("/v1/chat/completions", json=asked)

    def events(self, path: str, **fields: Any) -> list[dict[str, Any]]:
        """The objects of a stream; it must end in [DONE]."""
        with self.http.stream("POST", path, json={"stream": True, **fields}) as response:
            assert response.status_code == 200, response.read()
            assert response.headers["content-type"].startswith("text/event-stream")
            lines = [line for line in response.iter_lines() if line]
        assert all(line.startswith(("data: ", ":")) for line in lines)
        data = [line.removeprefix("data: ") for line in lines if not line.startswith(":")]
        assert data[-1] == "[DONE]"
        return [json.loads(text) for text in data[:-1]]


@contextlib.contextmanager
def served(
    session: Session | None, base: str = "tiny", adapters: tuple[str, ...] = (), **settings: Any
) -> Iterator[Served]:
    """Serves `session` (None: it goes on loading) until the block is left."""
    service = Service(HttpSettings(**settings), base, adapters)
    if session is not None:
        session.engine.start()
        service.loaded(session)
    with serve.bound("127.0.0.1", 0) as listener:
        config = uvicorn.Config(
            create_app(service), lifespan="off", log_config=None, timeout_graceful_shutdown=1, timeout_keep_alive=75
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        ready = Served(f"http://127.0.0.1:{listener.getsockname()[1]}", service)
        try:
            until(lambda: server.started)
            yield ready
        finally:
            ready.http.close()
            server.should_exit = True
            thread.join(10)
            if session is not None:
                session.engine.close()
            assert not thread.is_alive()


def until(true: Callable[[], Any], seconds: float = 10.0) -> None:
    """Waits for a condition; fails when it does not come."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)
