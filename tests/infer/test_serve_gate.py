"""Who may come in, how many, and what happens when they leave: keys, queue, disconnects, metrics, health."""

from __future__ import annotations

import re
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytest.importorskip("httpx", reason="the extra dev is not installed")

from prometheus_client.parser import text_string_to_metric_families
from scripted import scripted_session
from serving import Served, served, until

CHAT = "/v1/chat/completions"
USER = [{"role": "user", "content": "你好"}]
LONG = "今天" * 900  # at 5 ms a token some nine seconds: far longer than any test waits


def slow(folder: Path, slots: int = 2) -> Any:
    return scripted_session(folder, lambda _: LONG, pace=0.005, slots=slots)


def stats(server: Served) -> Any:
    return server.service.session.engine.stats  # type: ignore[union-attr]


def open_request(server: Served, body: str) -> socket.socket:
    """Sends a request and leaves the connection open, unread."""
    port = int(server.url.rpartition(":")[2])
    client = socket.create_connection(("127.0.0.1", port))
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    client.sendall((head + body).encode())
    return client


@pytest.mark.parametrize("stream", ["true", "false"])
@pytest.mark.parametrize("queued", [False, True])
def test_a_client_that_goes_away_frees_its_slot(tmp_path: Path, stream: str, queued: bool) -> None:
    """Streaming or not, while it is answered or still waits: the engine stops at once, and the next is served."""
    body = f'{{"model": "tiny", "messages": [{{"role": "user", "content": "a"}}], "stream": {stream}}}'
    with served(slow(tmp_path, slots=1)) as server:
        first = open_request(server, body)
        until(lambda: stats(server).running == 1)
        leaving = open_request(server, body) if queued else first
        until(lambda: stats(server).waiting == int(queued))
        start = time.monotonic()
        leaving.close()
        until(lambda: stats(server).cancelled == 1 and server.service.gate.inside == int(queued))
        assert time.monotonic() - start < 1
        if queued:
            assert stats(server).running == 1  # the one in front goes on
            first.close()
        assert server.chat(max_tokens=2).status_code == 200
        until(lambda: server.service.gate.inside == 0 and not server.service.live)
        assert stats(server).running == stats(server).waiting == 0


def test_a_client_that_leaves_while_its_prompt_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its request reaches the engine after it has gone, and is cancelled there."""
    with served(slow(tmp_path)) as server:
        reading, go_on = threading.Event(), threading.Event()
        template = server.service.session.templates[""]  # type: ignore[union-attr]
        prompt_ids = template.prompt_ids

        def waits(turns: Any) -> list[int]:
            reading.set()
            assert go_on.wait(10)
            return prompt_ids(turns)

        monkeypatch.setattr(template, "prompt_ids", waits)
        body = '{"model": "tiny", "messages": [{"role": "user", "content": "a"}], "stream": true}'
        leaving = open_request(server, body)
        assert reading.wait(10)
        leaving.close()
        until(lambda: server.service.gate.inside == 0)
        assert stats(server).requests == 0
        go_on.set()
        until(lambda: stats(server).requests == 1 and stats(server).cancelled == 1)


def test_a_client_that_stops_reading_holds_no_slot(tmp_path: Path) -> None:
    """A stream that nobody reads fills the socket; its answer ends all the same, and the slot is free."""
    with served(scripted_session(tmp_path, lambda _: "今天" * 900, slots=1)) as server:
        body = '{"model": "tiny", "messages": [{"role": "user", "content": "a"}], "stream": true}'
        lazy = open_request(server, body)
        until(lambda: stats(server).generated_tokens >= 1800)
        until(lambda: stats(server).running == 0)
        assert server.chat(max_tokens=3).status_code == 200
        lazy.close()


def test_a_full_queue(tmp_path: Path) -> None:
    """slots + max_queue answers come in; the next is told when to come again; n counts; a place left is a place."""
    with served(slow(tmp_path, slots=1), max_queue=2) as server:
        body = '{"model": "tiny", "messages": [{"role": "user", "content": "a"}], "stream": true}'
        inside = [open_request(server, body) for _ in range(2)]
        until(lambda: server.service.gate.inside == 2)
        refused = server.chat(n=2)
        assert refused.status_code == 429 and 1 <= int(refused.headers["retry-after"]) <= 60
        assert refused.json()["error"]["code"] == "queue_full"
        inside.append(open_request(server, body))
        until(lambda: server.service.gate.inside == 3)
        assert server.chat().status_code == 429
        never = server.chat(n=4)
        assert never.status_code == 400 and "3 at most" in never.json()["error"]["message"]
        for client in inside:
            client.close()
        until(lambda: server.service.gate.inside == 0)
        assert server.chat(max_tokens=1).status_code == 200


def test_many_at_once_all_answered(tmp_path: Path) -> None:
    """40 clients over 4 slots, streamed and whole: each gets all of its own text."""
    session = scripted_session(tmp_path, lambda r: f"abc {r.sampling.seed} xyz", pace=0.001)
    with served(session) as server:
        said: dict[int, str] = {}

        def ask(seed: int) -> None:
            if seed % 2:
                chunks = server.events(CHAT, model="tiny", messages=USER, seed=seed)
                said[seed] = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks)
            else:
                said[seed] = server.chat(seed=seed).json()["choices"][0]["message"]["content"]

        threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert said == {seed: f"abc {seed} xyz" for seed in range(40)}
        until(lambda: server.service.gate.inside == 0 and not server.service.live)


def test_keys(tmp_path: Path) -> None:
    """Every route but the page and /health asks for one; a wrong one is refused; two keys both open."""
    with served(scripted_session(tmp_path, lambda _: "a"), api_keys=("one-key", "two")) as server:
        get, ask = server.http.get, server.http.post
        for path in ("/v1/models", "/metrics", "/nothing"):
            answer = get(path)
            assert answer.status_code == 401 and answer.json()["error"]["code"] == "missing_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
        assert server.chat().status_code == ask("/", json={"prompt": "a"}).status_code == 401
        for path in ("/health", "/", "/page/app.js"):
            assert get(path).status_code == 200
        for wrong in ("Bearer one-ke", "Bearer one-keyy", "Basic one-key", "one-key", "Bearer ké"):
            answer = get("/v1/models", headers={"Authorization": wrong.encode()})
            assert answer.status_code == 401, wrong
        for right in ("Bearer one-key", "bearer two"):
            assert get("/v1/models", headers={"Authorization": right}).status_code == 200
        assert stats(server).requests == 0


def test_other_sites(tmp_path: Path) -> None:
    """No CORS header unless a site is named; a preflight needs no key."""
    origin = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    session = scripted_session(tmp_path, lambda _: "a")
    with served(session) as server:
        for answer in (server.http.get("/v1/models", headers=origin), server.http.options(CHAT, headers=origin)):
            assert not [name for name in answer.headers if name.startswith("access-control")]
    with served(session, cors=("https://a.example",), api_keys=("k",)) as server:
        preflight = server.http.options(CHAT, headers=origin | {"Access-Control-Request-Headers": "authorization"})
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == "https://a.example"
        refused = server.http.get("/v1/models", headers=origin)
        assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == "https://a.example"
        other = server.http.get("/v1/models", headers={"Origin": "https://b.example"})
        assert "access-control-allow-origin" not in other.headers


def test_health_and_the_rest_while_loading_and_stopping(tmp_path: Path) -> None:
    with served(None) as server:
        health = server.http.get("/health")
        assert health.status_code == 503 and health.json() == {"status": "loading"}
        for answer in (server.chat(), server.http.get("/v1/models"), server.http.post("/", json={"prompt": "a"})):
            assert answer.status_code == 503 and answer.headers["retry-after"] == "5"
            assert answer.json()["error"]["code"] == "loading"
        assert server.http.get("/").status_code == 200
        assert server.http.get("/metrics").status_code == 200
        session = scripted_session(tmp_path, lambda _: "a")
        server.service.loaded(session)
        assert server.http.get("/health").json() == {"status": "ok"} and server.chat().status_code == 200
        server.service.stop()
        assert server.http.get("/health").json() == {"status": "stopping"}
        assert server.chat().json()["error"]["code"] == "stopping"


def test_metrics(tmp_path: Path) -> None:
    """Prometheus' own parser reads it, and the counts are what was done."""
    with served(scripted_session(tmp_path, lambda _: "abcde")) as server:
        usage = [server.chat().json()["usage"] for _ in range(3)]
        server.chat(model="none")
        answer = server.http.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
        families = {f.name: f for f in text_string_to_metric_families(answer.text)}
        value = {
            (s.name, *(s.labels[k] for k in sorted(s.labels))): s.value for f in families.values() for s in f.samples
        }
        assert value["minitune_generated_tokens_total",] == sum(u["completion_tokens"] for u in usage) == 15
        assert value["minitune_requests_total",] == 3 and value["minitune_slots",] == 4
        assert value["minitune_http_responses_total", CHAT, "200"] == 3
        assert value["minitune_http_responses_total", CHAT, "404"] == 1
        assert value["minitune_answers_total", "stop", "tiny"] == 3
        assert value["minitune_time_to_first_token_seconds_count",] == 3
        assert families["minitune_running"].type == "gauge" and families["minitune_requests"].type == "counter"


def test_what_a_browser_is_told(tmp_path: Path) -> None:
    """The page may load its own files alone; nothing is cached unasked; types are right and not guessed."""
    with served(scripted_session(tmp_path, lambda _: "a")) as server:
        page = server.http.get("/")
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
        assert page.headers["x-content-type-options"] == "nosniff"
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        names = set(re.findall(r'(?:src|href)="([^"#]+)"', page.text))
        script = server.http.get("/page/app.js")
        names |= {f"/page/{name}" for name in re.findall(r'from "\./(.+?)"', script.text)}
        assert len(names) >= 6 and all(name.startswith("/page/") for name in names), names
        types = {"js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
        for name in names:
            answer = server.http.get(name)
            assert answer.status_code == 200 and answer.headers["content-type"].startswith(types[name.split(".")[-1]])
        again = server.http.get("/page/app.js", headers={"If-None-Match": script.headers["etag"]})
        assert again.status_code == 304 and script.headers["cache-control"] == "no-cache"
        assert server.http.head("/").status_code == server.http.head("/health").status_code == 200
        assert "no-store" in server.chat().headers["cache-control"]
