"""The two hubs behind one seam: is it cached, list it, fetch it. Only `hub.resolve` calls this.

ModelScope through `modelscope_hub`, the client that `modelscope` itself hands every download to (importing
`modelscope` would import torch and take seconds); Hugging Face through `huggingface_hub`.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shutil
import threading
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Protocol

from minitune.config import UserError

ANSWER_SECONDS = 6.0  # a hub that has not answered by then is passed over; both together are a dozen seconds
LISTING_SECONDS = 15.0

SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
SAFETENSORS = ("*.safetensors", "*.safetensors.index.json")
PICKLES = ("pytorch_model*.bin", "pytorch_model.bin.index.json")
NEVER = ("*/*", "consolidated*", "adapter_*")  # subfolders hold duplicates and other programs' formats


class Unavailable(Exception):
    """This hub cannot give the model, the other may. Reads as a predicate: "does not answer"."""


class Source(Protocol):
    """One hub."""

    title: str

    def cached(self, name: str, revision: str | None, cache_dir: Path | None) -> Path | None:
        """The newest snapshot on disk, whole or not; no network."""

    def fetch(self, name: str, revision: str | None, cache_dir: Path | None, weights: bool) -> tuple[Path, list[str]]:
        """(snapshot folder, files that it must hold). Unavailable before the first byte, UserError after."""


def wanted(files: Iterable[str], weights: bool = True) -> list[str]:
    """What training and chat read of these files, or what there is without weights: never code, and `.bin` only where
    no safetensors are."""
    top = [f for f in files if not any(fnmatch(f, pattern) for pattern in NEVER)]
    large = SAFETENSORS if any(f.endswith(".safetensors") for f in top) else PICKLES
    patterns = large if weights else ()
    return sorted(f for f in top if f in SMALL_FILES or any(fnmatch(f, pattern) for pattern in patterns))


class ModelScope:
    title = "ModelScope"

    def __init__(self) -> None:
        # Given on only where the user set it: else the client looks on modelscope.cn, then on modelscope.ai.
        self.endpoint = os.environ.get("MODELSCOPE_ENDPOINT") or os.environ.get("MODELSCOPE_DOMAIN") or None

    def _api(self) -> Any:
        from modelscope_hub import HubApi

        if not os.environ.get("MODELSCOPE_LOG_LEVEL"):
            logging.getLogger("modelscope_hub").setLevel(logging.CRITICAL)  # we say it, in a line
        return HubApi(endpoint=self.endpoint)

    def cached(self, name: str, revision: str | None, cache_dir: Path | None) -> Path | None:
        from modelscope_hub import CacheNotFound

        try:
            place = {"revision": revision, "cache_dir": cache_dir}
            return Path(self._api().download_repo(name, "model", **place, local_files_only=True))
        except (CacheNotFound, OSError):
            return None

    def fetch(self, name: str, revision: str | None, cache_dir: Path | None, weights: bool) -> tuple[Path, list[str]]:
        from modelscope_hub import HubApi, HubConfig

        _must_answer(self.endpoint or "https://modelscope.cn")
        api = self._api()
        try:
            if not self.endpoint:
                api = HubApi(endpoint=api.resolve_endpoint_for_read(name))
            files = {f.path: f for f in api.list_repo_files(name, "model", revision=revision) if not f.is_dir}
        except Exception as error:
            raise Unavailable(_reason(error, revision)) from None
        names = wanted(files, weights)
        cache = (cache_dir or HubConfig().cache_dir).expanduser()
        old = "models/" + name.replace(".", "___")  # where older clients kept it, and this one goes on
        kept = [cache / "models" / name.replace("/", "--"), cache / old, cache / "hub" / old]
        _must_fit(name, cache, sum(files[f].size for f in names), kept)
        listing = [
            {"Path": f, "Sha256": files[f].sha256, **({"Size": files[f].size} if files[f].size else {})} for f in names
        ]
        try:
            # Resumes across runs: a file grows as NAME.incomplete in the snapshot; its sha256 is checked.
            folder = api.download_repo(
                name, "model", revision=revision, cache_dir=cache_dir, file_list=listing, max_workers=4
            )
        except Exception as error:
            raise _broken(error, name, self.title, cache) from None
        return Path(folder), names


class HuggingFace:
    title = "Hugging Face"

    def __init__(self) -> None:
        self.endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or None

    def cached(self, name: str, revision: str | None, cache_dir: Path | None) -> Path | None:
        from huggingface_hub import snapshot_download

        try:
            place: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir}
            return Path(snapshot_download(name, **place, local_files_only=True, allow_patterns="config.json"))
        except (OSError, ValueError):
            return None

    def fetch(self, name: str, revision: str | None, cache_dir: Path | None, weights: bool) -> tuple[Path, list[str]]:
        from huggingface_hub import HfApi, constants, snapshot_download

        if constants.is_offline_mode():
            raise Unavailable("is switched off by HF_HUB_OFFLINE")
        _must_answer(self.endpoint or constants.ENDPOINT)
        try:
            info = HfApi(endpoint=self.endpoint).model_info(
                name, revision=revision, files_metadata=True, timeout=LISTING_SECONDS
            )
        except Exception as error:
            raise Unavailable(_reason(error, revision)) from None
        sizes = {s.rfilename: s.size or 0 for s in info.siblings or []}
        names = wanted(sizes, weights)
        cache = Path(cache_dir or constants.HF_HUB_CACHE).expanduser()
        blobs = cache / ("models--" + name.replace("/", "--")) / "blobs"
        _must_fit(name, cache, sum(sizes[f] for f in names), [blobs])
        file = names[0] if names else ""
        try:
            for file in (n for n in names if n.endswith((".safetensors", ".bin"))):
                self._blob(name, file, str(info.sha), blobs)
            folder = snapshot_download(
                name, revision=revision, cache_dir=cache_dir, endpoint=self.endpoint, allow_patterns=names
            )
        except Exception as error:
            raise _broken(error, name, self.title, cache, file) from None
        return Path(folder), names

    def _blob(self, name: str, file: str, commit: str, blobs: Path) -> None:
        """Puts one large file where snapshot_download looks for it before it downloads.

        snapshot_download resumes only within a process: when it is killed, gigabytes of the file it was at
        are deleted. This keeps them, and the next run asks for the rest.
        """
        from filelock import FileLock
        from huggingface_hub import get_hf_file_metadata, hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers

        url = hf_hub_url(name, file, revision=commit, endpoint=self.endpoint)
        meta = get_hf_file_metadata(url, timeout=LISTING_SECONDS, endpoint=self.endpoint)
        if not meta.etag or (blobs / meta.etag).exists():
            return
        blobs.mkdir(parents=True, exist_ok=True)
        part = blobs / f"{meta.etag}.minitune.incomplete"
        with FileLock(f"{part}.lock"):
            if (blobs / meta.etag).exists():
                return
            have = part.stat().st_size if part.exists() else 0
            if meta.size is not None and have > meta.size:
                part.unlink()
                have = 0
            with open(part, "ab") as out:
                http_get(
                    url,
                    out,
                    resume_size=have,
                    headers={**build_hf_headers(), "Accept-Encoding": "identity"},
                    expected_size=meta.size,
                    displayed_filename=file,
                )
            if len(meta.etag) == 64 and _sha256(part) != meta.etag:  # the ETag of a large file is its sha256
                part.unlink()
                raise OSError(f"{file} arrived damaged")
            os.replace(part, blobs / meta.etag)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _must_answer(url: str) -> None:
    """Unavailable where nothing answers at `url` within ANSWER_SECONDS.

    In a thread, since no timeout bounds a name look-up, and a socket's counts for each address anew. The
    libraries would retry for minutes, and a blackholed address would hold huggingface_hub for TCP's own two.
    """
    import ssl
    import urllib.error
    import urllib.request

    verdict = ["does not answer"]

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=ANSWER_SECONDS).close()
            verdict[0] = ""
        except urllib.error.HTTPError as error:
            verdict[0] = f"answers with error {error.code}" if error.code >= 500 else ""
        except urllib.error.URLError as error:  # other certificates than the libraries': they judge
            verdict[0] = "" if isinstance(error.reason, ssl.SSLError) else verdict[0]
        except Exception:
            pass

    if "://" not in url:
        url = f"https://{url}"
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(ANSWER_SECONDS)
    if verdict[0]:
        raise Unavailable(verdict[0])


def _must_fit(name: str, cache: Path, need: int, kept: list[Path]) -> None:
    """UserError where the disk cannot take what is still to come; `kept` holds what came earlier."""
    for folder in kept:
        need -= sum(f.stat().st_size for f in folder.rglob("*") if f.is_file() and not f.is_symlink())
    place = next(p for p in (cache, *cache.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    if need > free:
        raise UserError(
            f"{name}: {need / 2**30:.1f} GiB are still to come and {cache} has {free / 2**30:.1f} GiB free; "
            "free some space or give another --cache_dir"
        )


def _chain(error: BaseException) -> list[BaseException]:
    """The error, what failed inside it, and what caused those."""
    found: list[BaseException] = []
    todo: list[BaseException | None] = [error]
    while todo:
        e = todo.pop(0)
        if e is None or e in found:
            continue
        found.append(e)
        failed = getattr(e, "failed_files", None)
        todo += [*(failed.values() if isinstance(failed, Mapping) else ()), e.__cause__, e.__context__]
    return found


def _reason(error: BaseException, revision: str | None) -> str:
    """Why a hub did not list the model, as a predicate. Both libraries' error classes, by their names."""
    names = {c.__name__ for e in _chain(error) for c in type(e).__mro__}
    status = getattr(getattr(error, "response", error), "status_code", None)
    if "GatedRepoError" in names or (status in (401, 403) and "RepositoryNotFoundError" not in names):
        return "refuses it (private or gated: log in there first)"
    if names & {"NotExistError", "RepositoryNotFoundError", "RevisionNotFoundError"} or status == 404:
        return f"does not have it at revision {revision}" if revision else "does not have it"
    if status:
        return f"answers with error {status}"
    if names & {"ConnectionError", "TimeoutError", "TransportError", "TimeoutException"}:
        return "does not answer"
    return f"gives no list of its files ({_short(error)})"


def _broken(error: BaseException, name: str, title: str, cache: Path, at: str = "") -> UserError:
    """One line for a download that stopped on the way: the disk's fault, or the network's."""
    if isinstance(error, UserError):
        return error
    for e in _chain(error):
        if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT):
            return UserError(f"{name}: no space is left at {cache}; free some or give another --cache_dir")
        if isinstance(e, OSError) and e.filename is not None:
            return UserError(f"{e.filename}: cannot be written ({e.strerror}); give another --cache_dir")
    failed: Mapping[str, BaseException] = getattr(error, "failed_files", None) or {at or "its list": error}
    first = next(iter(failed))
    more = f" and {len(failed) - 1} more files" if len(failed) > 1 else ""
    return UserError(
        f"{name}: the download from {title} broke off at {first}{more} ({_short(failed[first])}); "
        "run it again, it goes on where it stopped, or choose the other hub with --source"
    )


def _short(error: BaseException) -> str:
    lines = str(error).split("\n")
    return f"{type(error).__name__}: {' '.join(lines[0].split())}"[:200]
