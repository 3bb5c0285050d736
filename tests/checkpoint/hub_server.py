"""A stand-in for both hubs on 127.0.0.1: the routes, redirects and headers that their clients rely on."""

from __future__ import annotations

import functools
import hashlib
import http.server
import json
import threading
import urllib.parse
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = (".safetensors", ".bin")  # behind a redirect, on storage that honours Range, as at both hubs


@dataclass
class Seen:
    """One request that reached the stand-in."""

    method: str
    path: str
    range: str | None
    authorization: str | None


@dataclass
class HubServer:
    """Serves {repository: {file name: bytes}} as ModelScope and as Hugging Face at once.

    `cut` maps a file name to how many bytes of it are sent before the connection is dropped; that happens
    `cuts` times. `hold` sends so many and then neither more nor an end, until release(). `lost` files are
    listed, and not there. `private` repositories answer 403.
    """

    repos: dict[str, dict[str, bytes]]
    cut: dict[str, int] = field(default_factory=dict)
    cuts: int = 1
    hold: dict[str, int] = field(default_factory=dict)
    lost: set[str] = field(default_factory=set)
    private: set[str] = field(default_factory=set)
    seen: list[Seen] = field(default_factory=list)

    def __enter__(self) -> HubServer:
        hub = self

        class Handler(_Handler):
            server_state = hub

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def release(self) -> None:
        """Lets go of what is held, and holds nothing more."""
        self.hold = {}
        self._released.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def storage(self) -> str:
        """The same server by another name: a client treats a redirect to another host differently."""
        return self.url.replace("127.0.0.1", "localhost")

    def asked_for(self, ending: str) -> list[Seen]:
        """The requests whose decoded path or query ends so."""
        return [s for s in self.seen if urllib.parse.unquote(s.path).endswith(ending)]


def repository(*folders: Path, **extra: bytes) -> dict[str, bytes]:
    """The files of these folders, save the expected values, and `extra` ones (`__` in a name is a dot)."""
    files = {f.name: f.read_bytes() for folder in folders for f in sorted(folder.iterdir()) if f.is_file()}
    files.pop("expected.safetensors", None)
    return files | {name.replace("__", "."): content for name, content in extra.items()}


class _Handler(http.server.BaseHTTPRequestHandler):
    server_state: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        headers = (self.headers.get("Range"), self.headers.get("Authorization"))
        self.server_state.seen.append(Seen(self.command, self.path, *headers))
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        parts = [urllib.parse.unquote(p) for p in url.path.strip("/").split("/")]
        if url.path == "/":
            self._send(200, b"")
        elif parts[:3] == ["api", "v1", "models"] and len(parts) > 4:
            self._modelscope("/".join(parts[3:5]), parts[5:], query)
        elif parts[:2] == ["api", "models"]:
            self._huggingface_api("/".join(parts[2:4]), parts[4:])
        elif len(parts) > 4 and parts[2] == "resolve":
            self._huggingface_file("/".join(parts[:2]), "/".join(parts[4:]))
        elif parts[0] == "storage":
            self._file("/".join(parts[1:3]), "/".join(parts[3:]))
        else:
            self._send(404, b"{}")

    def _modelscope(self, repo: str, route: list[str], query: dict[str, str]) -> None:
        files = self.server_state.repos.get(repo)
        if files is None or query.get("Revision", "master") != "master":
            self._json(404, {"Code": 10010205001, "Message": "not found", "Success": False})
        elif repo in self.server_state.private:
            self._json(403, {"Code": 10010103001, "Message": "forbidden", "Success": False})
        elif route == ["repo", "files"]:
            listing = [{"Path": n, "Type": "blob", "Size": len(c), "Sha256": _sha256(c)} for n, c in files.items()]
            self._json(200, {"Code": 200, "Success": True, "Data": {"Files": listing}})
        elif route == ["repo"]:
            name = query["FilePath"]
            if name.endswith(LARGE) and name not in self.server_state.lost:
                self._send(302, b"", Location=f"{self.server_state.storage}/storage/{repo}/{name}")
            else:
                self._file(repo, name, ranges=False)
        else:
            self._json(200, {"Code": 200, "Success": True, "Data": {"Name": repo}})

    def _huggingface_api(self, repo: str, route: list[str]) -> None:
        files = self.server_state.repos.get(repo)
        if files is None:
            self._send(401, b"{}", **{"X-Error-Code": "RepoNotFound"})
        elif repo in self.server_state.private:
            self._send(403, b"{}", **{"X-Error-Code": "GatedRepo"})
        elif route[:1] in (["revision"], ["tree"]) and route[1] not in ("main", COMMIT):
            self._send(404, b"{}", **{"X-Error-Code": "RevisionNotFound"})
        elif route[:1] == ["tree"]:
            self._json(200, [{"type": "file", "path": n, **_entry(n, c)} for n, c in files.items()])
        else:
            siblings = [{"rfilename": n, "size": len(c)} for n, c in files.items()]
            self._json(200, {"id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings})

    def _huggingface_file(self, repo: str, name: str) -> None:
        content = self.server_state.repos.get(repo, {}).get(name)
        if content is None or name in self.server_state.lost:
            self._send(404, b"", **{"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            return
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{_entry(name, content)["oid"]}"'}
        if name.endswith(LARGE):
            sha = _sha256(content)
            headers |= {"X-Linked-Etag": f'"{sha}"', "X-Linked-Size": str(len(content))}
            self._send(302, b"", Location=f"{self.server_state.storage}/storage/{repo}/{name}", **headers)
        else:
            self._send(200, content, **headers)

    def _file(self, repo: str, name: str, ranges: bool = True) -> None:
        content = self.server_state.repos.get(repo, {}).get(name)
        if content is None or name in self.server_state.lost:
            self._send(404, b"{}")
            return
        start = 0
        if ranges and (wanted := self.headers.get("Range")):
            start = int(wanted.removeprefix("bytes=").split("-")[0])
        body = content[start:]
        headers = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}
        limit = self.server_state.cut.get(name)
        hold = self.server_state.hold.get(name)
        if hold is not None and self.command == "GET":
            self._send(206 if start else 200, body, keep=hold, wait=True, **headers)
        elif limit is not None and self.server_state.cuts > 0 and self.command == "GET":
            self.server_state.cuts -= 1
            self._send(206 if start else 200, body, keep=limit, **headers)
        else:
            self._send(206 if start else 200, body, **headers)

    def _json(self, status: int, content: object) -> None:
        self._send(status, json.dumps(content).encode(), **{"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, keep: int | None = None, wait: bool = False, **headers: str) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body if keep is None else body[:keep])
        if wait:
            self.wfile.flush()
            self.server_state._released.wait(60)
        if keep is not None:
            self.close_connection = True


@functools.lru_cache(maxsize=32)
def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _entry(name: str, content: bytes) -> dict[str, object]:
    oid = hashlib.sha1(_sha256(content).encode()).hexdigest()
    entry: dict[str, object] = {"size": len(content), "oid": oid}
    if name.endswith(LARGE):
        entry["lfs"] = {"oid": _sha256(content), "size": len(content), "pointerSize": 134}
    return entry
