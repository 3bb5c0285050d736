"""`minitune serve`: the socket, the loading, the end. The routes are in `http/`.

The HTTP side runs in a thread of its own from the start, so that /health can say "loading"; the main thread loads
the model, and then waits for a signal.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from minitune.config import UserError
from minitune.infer.chat import which
from minitune.infer.sampling import Sampling

if TYPE_CHECKING:
    import uvicorn

    from minitune.infer.http.service import Service

KEY_VARIABLE = "MINITUNE_API_KEY"
GRACE = 10.0  # seconds that answers under way get when the server is asked to stop; docker kills after as many
KEEP_ALIVE = 75  # seconds a connection may idle: longer than clients and proxies keep theirs, so that they close it


def main(
    model: str | None = None,
    adapter: Sequence[str] = (),
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    api_key_file: str | None = None,
    cors: Sequence[str] = (),
    served_model_name: str | None = None,
    max_queue: int = 256,
    slots: int = 0,
    cache_tokens: int = 0,
    sampling: Sampling | None = None,
    dtype: str = "auto",
    device: str = "auto",
    source: str = "modelscope",
    log_requests: bool = False,
) -> int:
    """Serves until a signal; returns the exit code. Raises UserError, one line, for what is missing or wrong."""
    if max_queue < 0 or slots < 0 or cache_tokens < 0:
        raise UserError("--max_queue, --slots and --cache_tokens take 0 or more")
    name, folders = models_of(model, adapter)
    base = served_model_name or public_name(name)
    if base in folders:
        raise UserError(f"an adapter can't have the base's name {base!r}; give --adapter ANOTHER=DIR")
    keys = keys_of(api_key, api_key_file)
    try:
        import uvicorn

        from minitune.infer.http.app import create_app
        from minitune.infer.http.service import HttpSettings, Service
    except ModuleNotFoundError as error:
        raise UserError(f"serve needs {error.name}; pip install 'minitune[serve]'") from None
    service = Service(HttpSettings(keys, tuple(cors), max_queue, sampling or Sampling()), base, tuple(folders))
    with bound(host, port) as listener:
        config = uvicorn.Config(
            create_app(service),
            lifespan="off",
            log_config=None,
            log_level="info" if log_requests else "warning",
            access_log=log_requests,
            timeout_keep_alive=KEEP_ALIVE,
            timeout_graceful_shutdown=2,
            server_header=False,
        )
        if log_requests:
            log_to_stderr()
        said = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
        if not keys and host not in ("127.0.0.1", "localhost", "::1"):
            note(f"anyone who reaches {said} may use the model; --api_key_file asks for a key")
        return Running(uvicorn.Server(config), service, listener, said).run(
            lambda: open_session(name, folders, dtype, device, source, slots, cache_tokens)
        )


def open_session(name: str, folders: dict[str, str], dtype: str, device: str, source: str, slots: int, tokens: int):
    from minitune.infer.session import open_model

    session = open_model(name, folders, dtype=dtype, device=device, source=source, slots=slots, cache_tokens=tokens)
    if session.engine.plainly and session.engine.decoder.device.type == "cuda":
        note(f"answers come slower than they could: {session.engine.plainly}")
    return session


def models_of(model: str | None, adapters: Sequence[str]) -> tuple[str, dict[str, str]]:
    """(the base, {name: adapter folder}) of --model and every --adapter NAME=DIR or DIR."""
    if not adapters:
        base, alone = which(model, None)
        return base, {Path(alone).resolve().name: alone} if alone else {}
    folders: dict[str, str] = {}
    for given in adapters:
        name, equals, folder = given.partition("=")
        if not equals or os.path.isdir(given):
            name, folder = Path(given).resolve().name, given
        if not name or not folder:
            raise UserError(f"--adapter {given}: give NAME=DIR, or the folder alone")
        if name in folders:
            raise UserError(f"two adapters are called {name!r}; give --adapter ANOTHER=DIR")
        folders[name] = folder
    bases = {which(model, folder)[0] for folder in folders.values()}
    if len(bases) > 1:
        raise UserError(f"the adapters have different bases ({', '.join(sorted(bases))}); give --model")
    return bases.pop(), folders


def public_name(model: str) -> str:
    """A folder is called by its own name, a GGUF file by its own without the ending, a hub's model by its whole one."""
    model = os.path.expanduser(model)
    if os.path.isfile(model):
        return Path(model).stem
    return Path(model).resolve().name if os.path.isdir(model) else model


def keys_of(api_key: str | None, file: str | None) -> tuple[str, ...]:
    """The keys that are taken: of the flag, of a file (one a line), of MINITUNE_API_KEY; none: open."""
    if api_key is not None and file is not None:
        raise UserError("give --api_key or --api_key_file, not both")
    if file is not None:
        try:
            keys = Path(file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file}: no key can be read ({getattr(error, 'strerror', None) or 'not text'})") from None
        where = file
    elif api_key is not None:
        keys, where = [api_key], "--api_key"
    elif KEY_VARIABLE in os.environ:
        keys, where = [os.environ[KEY_VARIABLE]], KEY_VARIABLE
    else:
        return ()
    keys = [key.strip() for key in keys if key.strip()]
    if not keys:  # a variable that was meant to be set must not open the server
        raise UserError(f"{where}: the API key is empty; write one there, or leave it out")
    if not all(key.isascii() and key.isprintable() and " " not in key for key in keys):
        raise UserError(f"{where}: an API key is made of ASCII letters, digits and signs, without blanks")
    return tuple(keys)


@contextlib.contextmanager
def bound(host: str, port: int) -> Iterator[socket.socket]:
    """A listening socket, before anything is loaded. Raises UserError where the address can't be had."""
    if not 0 <= port < 65536:
        raise UserError(f"port is {port}; it takes 0 (any free one) to 65535")
    try:
        kind, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except OSError:
        raise UserError(f"host {host!r} is no address of this machine; give 127.0.0.1, or 0.0.0.0 for all") from None
    listener = socket.socket(kind, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            listener.listen(2048)
        except OSError as error:
            mends = {
                errno.EADDRINUSE: f"port {port} of {host} is in use; give another --port",
                errno.EACCES: f"port {port} may not be opened by this user; give one above 1023",
                errno.EADDRNOTAVAIL: f"host {host!r} is no address of this machine; give 127.0.0.1, or 0.0.0.0 for all",
            }
            known = mends.get(error.errno or 0, f"port {port} of {host} can't be opened: {error.strerror}")
            raise UserError(known) from None
        yield listener
    finally:
        listener.close()


class Stop(BaseException):
    """A signal (its number) came while the model was loading."""


class Running:
    """A server from its start to its end. `address`: what a person types into a browser."""

    def __init__(self, server: uvicorn.Server, service: Service, listener: socket.socket, address: str):
        self.server, self.service, self.address = server, service, address
        self.thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="http", daemon=True)
        self.loading = True
        self.asked = 0  # signals so far

    def run(self, load: Callable[[], Any]) -> int:
        session = None
        # Python's default lets the HTTP thread hold the interpreter for 5 ms, longer than a step of the model takes.
        sys.setswitchinterval(0.0005)
        old = {number: signal.signal(number, self.on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            self.thread.start()
            note(f"loading {self.service.base} … ({self.address}/health says when)")
            session = load()
            self.loading = False
            session.engine.start()
            self.service.loaded(session)
            note(f"serving {', '.join(self.service.names)} on {self.address}/ (chat page) and {self.address}/v1 (API)")
            while self.thread.is_alive() and not self.asked:
                self.thread.join(0.2)
            self.finish()
            return 0 if self.asked else 1
        except Stop as stop:
            return 128 + int(stop.args[0])
        finally:
            self.loading = False
            self.service.stop()
            self.server.should_exit = True
            self.thread.join(5)
            if session is not None:
                session.engine.close()
            self.service.worker.shutdown(wait=False, cancel_futures=True)
            for number, handler in old.items():
                signal.signal(number, handler)

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        self.asked += 1
        if self.loading:
            raise Stop(number)

    def finish(self) -> None:
        """Lets answers under way end, for GRACE seconds or until a second signal; then breaks them off."""
        self.service.stop()
        first, end = self.asked, time.monotonic() + GRACE
        if self.service.gate.inside:
            note(f"stopping after {self.service.gate.inside} answers under way; Ctrl-C again stops at once")
        while self.service.gate.inside and self.asked == first and time.monotonic() < end:
            time.sleep(0.05)
        for cancel in list(self.service.live):
            cancel()
        end = time.monotonic() + 1
        while self.service.live and time.monotonic() < end:  # their clients are told
            time.sleep(0.02)
        note("stopped")


def note(text: str) -> None:
    print(f"minitune: {text}", file=sys.stderr, flush=True)


def log_to_stderr() -> None:
    """uvicorn's line for each request."""
    import logging

    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    for name in ("uvicorn", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
