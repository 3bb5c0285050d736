"""Names to folders: both hubs' real clients against a stand-in; offline, broken off, refused; verify()."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minitune.checkpoint import hub, sources
from minitune.config import UserError

_spec = importlib.util.spec_from_file_location("hub_server", Path(__file__).with_name("hub_server.py"))
assert _spec and _spec.loader
_module = importlib.util.module_from_spec(_spec)
sys.modules["hub_server"] = _module
_spec.loader.exec_module(_module)
HubServer, repository = _module.HubServer, _module.repository

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden"
pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"{GOLDEN} is absent")
CODE = b"raise SystemExit('a checkpoint ran its code')\n"
BOTH = ("modelscope", "huggingface")
WEIGHTS = "model.safetensors"


@pytest.fixture
def tiny() -> dict[str, bytes]:
    """tiny-2b with a tokenizer, and all that must stay where it is."""
    files = repository(
        GOLDEN / "tiny-2b",
        modeling_minicpm__py=CODE,
        tokenization__py=CODE,
        README__md=b"# tiny",
        consolidated__safetensors=b"x" * 99,
        pytorch_model__bin=b"x" * 99,
        model__onnx=b"x" * 99,
        model__gguf=b"x" * 99,
        tokenizer__json=b"{}",
        tokenizer_config__json=b"{}",
    )
    return files | {"original/model.safetensors": b"x" * 99, "onnx/config.json": b"{}"}


NEEDED = {
    "config.json",
    "generation_config.json",
    WEIGHTS,
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Caches in tmp_path, and no hub, until `point` gives one."""
    for name in ("MODELSCOPE_DOMAIN", "HF_TOKEN", "MODELSCOPE_API_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    online(monkeypatch)
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    monkeypatch.setenv("MODELSCOPE_HOME", str(tmp_path / "ms"))
    point(monkeypatch, closed_port(), closed_port())
    return tmp_path / "cache"


def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undoes what keeps other tests from the hubs: here the hubs are ours."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


def point(monkeypatch: pytest.MonkeyPatch, modelscope: str, huggingface: str) -> None:
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", modelscope)
    monkeypatch.setenv("HF_ENDPOINT", huggingface)


def closed_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{s.getsockname()[1]}"


def refused(*args: object, **kwargs: object) -> str:
    """The one line of the UserError that resolve raises."""
    with pytest.raises(UserError) as caught:
        hub.resolve(*args, **kwargs)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    return message


def content(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in folder.iterdir() if not f.name.startswith(".")}


def forget(folder: Path, source: str) -> Path:
    """Removes the weights of a snapshot; returns where a part of them would be kept."""
    target = (folder / WEIGHTS).resolve()  # the blob, at Hugging Face
    target.unlink()
    (folder / WEIGHTS).unlink(missing_ok=True)
    suffix = {"modelscope": ".incomplete", "huggingface": ".minitune.incomplete"}[source]
    return target.with_name(target.name + suffix)


@pytest.mark.parametrize("source", BOTH)
def test_arrives_byte_equal_without_code_and_then_needs_no_hub(source, tiny, home, monkeypatch):
    """What is needed arrives equal, nothing else is asked for, and the second time nobody is asked at all."""
    with HubServer({"owner/tiny": tiny}) as server:
        point(monkeypatch, server.url, server.url)
        folder = hub.resolve("owner/tiny", source=source, cache_dir=home, quiet=True)
        assert content(folder) == {name: tiny[name] for name in NEEDED}
        for ending in (".py", ".onnx", ".gguf", ".md", ".bin", "consolidated.safetensors"):
            assert not server.asked_for(ending), ending
        assert server.asked_for(WEIGHTS) and not server.asked_for("original/model.safetensors")
        asked = len(server.seen)
        assert hub.resolve("owner/tiny", source=source, cache_dir=home) == folder
        assert len(server.seen) == asked
    assert hub.resolve("owner/tiny", source=source, cache_dir=home) == folder  # the hub is gone


@pytest.mark.parametrize("source", BOTH)
def test_without_weights_the_small_files_are_enough(source, tiny, home, monkeypatch):
    """Only they are asked for, the second time nobody is, and a later call with weights fetches what is not there."""
    small = {name for name in NEEDED if name != WEIGHTS}
    with HubServer({"owner/tiny": tiny}) as server:
        point(monkeypatch, server.url, server.url)
        folder = hub.resolve("owner/tiny", source=source, cache_dir=home, quiet=True, weights=False)
        assert set(content(folder)) == small and not server.asked_for(WEIGHTS)
        asked = len(server.seen)
        assert hub.resolve("owner/tiny", source=source, cache_dir=home, weights=False) == folder
        assert len(server.seen) == asked
        assert hub.resolve("owner/tiny", source=source, cache_dir=home, quiet=True) == folder
        assert content(folder) == {name: tiny[name] for name in NEEDED}
    assert hub.resolve("owner/tiny", source=source, cache_dir=home, weights=False) == folder


@pytest.mark.parametrize("source", BOTH)
def test_small_files_alone_are_no_model(source, tiny, home, monkeypatch):
    """Where the hub is gone before the weights came."""
    with HubServer({"owner/tiny": tiny}) as server:
        point(monkeypatch, server.url, server.url)
        hub.resolve("owner/tiny", source=source, cache_dir=home, quiet=True, weights=False)
    assert "does not answer" in refused("owner/tiny", source=source, cache_dir=home)


@pytest.mark.parametrize("source", BOTH)
def test_sharded_bin_where_no_safetensors_are(source, home, monkeypatch):
    """MiniCPM-2B-sft-fp32's kind: the .bin shards and their index are fetched."""
    files = repository(GOLDEN / "tiny-2b-bin", modeling_minicpm__py=CODE)
    with HubServer({"owner/bin": files}) as server:
        point(monkeypatch, server.url, server.url)
        folder = hub.resolve("owner/bin", source=source, cache_dir=home, quiet=True)
    assert content(folder) == {n: c for n, c in files.items() if not n.endswith(".py")}


def large(tiny: dict[str, bytes]) -> None:
    """Makes the weights 24 MB: huggingface_hub keeps what arrives in steps of 10 MiB."""
    data = os.urandom(24_000_000)
    header = json.dumps({"x": {"dtype": "U8", "shape": [len(data)], "data_offsets": [0, len(data)]}}).encode()
    tiny[WEIGHTS] = len(header).to_bytes(8, "little") + header + data


@pytest.mark.parametrize("source", BOTH)
def test_broken_transfer_resumes_with_a_range(source, tiny, home, monkeypatch):
    """The connection drops after 15 MB: the client asks for the rest, and only for the rest."""
    large(tiny)
    with HubServer({"owner/tiny": tiny}, cut={WEIGHTS: 15_000_000}) as server:
        point(monkeypatch, server.url, server.url)
        folder = hub.resolve("owner/tiny", source=source, cache_dir=home, quiet=True)
        starts = {int(s.range.split("=")[1].split("-")[0]) for s in server.asked_for(WEIGHTS) if s.range}
    kept = {"modelscope": 15_000_000, "huggingface": 10 * 2**20}[source]
    assert starts == {kept}
    assert content(folder)[WEIGHTS] == tiny[WEIGHTS]


KILLED = """
import sys
from minitune.checkpoint import hub
hub.resolve("owner/tiny", source=sys.argv[1], cache_dir=sys.argv[2], quiet=True)
"""


@pytest.mark.parametrize("source", BOTH)
def test_killed_download_goes_on_in_the_next_run(source, tiny, home, monkeypatch):
    """A process killed while the hub holds the line back leaves a part; the next asks for the rest."""
    large(tiny)
    with HubServer({"owner/tiny": tiny}, hold={WEIGHTS: 15_000_000}) as server:
        point(monkeypatch, server.url, server.url)
        child = subprocess.Popen([sys.executable, "-c", KILLED, source, str(home)], stderr=subprocess.DEVNULL)
        part = None
        for _ in range(400):
            parts = [p for p in home.rglob("*.incomplete") if p.stat().st_size >= 10 * 2**20]
            if parts:
                part = parts[0]
                break
            time.sleep(0.05)
        child.kill()
        child.wait()
        assert part, "no part of the file reached the disk"
        have = part.stat().st_size
        server.release()
        server.seen.clear()
        folder = hub.resolve("owner/tiny", source=source, cache_dir=home, quiet=True)
        ranges = [s.range for s in server.asked_for(WEIGHTS) if s.range]
    assert ranges and all(r.startswith(f"bytes={have}-") for r in ranges)
    assert content(folder)[WEIGHTS] == tiny[WEIGHTS]


@pytest.mark.parametrize("source", BOTH)
def test_damaged_part_is_not_taken(source, tiny, home, monkeypatch):
    """A kept part with other bytes fails the checksum: an error or a second transfer, never a bad file."""
    with HubServer({"owner/tiny": tiny}, cut={WEIGHTS: 300_000}) as server:
        point(monkeypatch, server.url, server.url)
        folder = hub.resolve("owner/tiny", source=source, cache_dir=home, quiet=True)
        part = forget(folder, source)
        part.write_bytes(b"\0" * 300_000)
        try:
            hub.resolve("owner/tiny", source=source, cache_dir=home, quiet=True)
        except UserError as error:
            assert "damaged" in str(error)
            hub.resolve("owner/tiny", source=source, cache_dir=home, quiet=True)
    assert content(folder)[WEIGHTS] == tiny[WEIGHTS]


@pytest.mark.parametrize("source", BOTH)
def test_the_other_hub_is_asked_and_that_is_said(source, tiny, home, monkeypatch, capsys):
    """Where the first hub does not answer, and where it has not the model, one line says so."""
    with HubServer({"owner/tiny": tiny}) as full, HubServer({}) as empty:
        for first, why in ((closed_port(), "does not answer"), (empty.url, "does not have it")):
            pair = (first, full.url) if source == "modelscope" else (full.url, first)
            point(monkeypatch, *pair)
            shutil.rmtree(home, ignore_errors=True)
            hub.resolve("owner/tiny", source=source, cache_dir=home, quiet=True)
            said = capsys.readouterr().err.splitlines()
            title = {"modelscope": "ModelScope", "huggingface": "Hugging Face"}
            other = title["huggingface" if source == "modelscope" else "modelscope"]
            assert said == [f"minitune: {title[source]} {why}; asking {other}"]


def test_neither_hub(tiny, home, monkeypatch):
    """Refused, silent, ignorant, private: one line in seconds with the model, both hubs and the mend."""
    start = time.monotonic()
    message = refused("owner/absent", cache_dir=home)
    assert time.monotonic() - start < 10
    assert "owner/absent: ModelScope does not answer and Hugging Face does not answer" in message
    assert "check the name and the network, or give a folder" in message
    with HubServer({"owner/tiny": tiny}, private={"owner/tiny"}) as server:
        point(monkeypatch, server.url, server.url)
        message = refused("owner/absent", cache_dir=home)
        assert "ModelScope does not have it and Hugging Face does not have it" in message
        assert refused("owner/tiny", cache_dir=home).count("refuses it") == 2
    with HubServer({"owner/tiny": tiny}) as server:
        point(monkeypatch, server.url, server.url)
        message = refused("owner/tiny", cache_dir=home, revision="v9")
        assert message.count("does not have it at revision v9") == 2


def test_a_hub_that_accepts_and_stays_silent_is_passed_over(home, monkeypatch):
    """A socket that never answers, or a name server, costs ANSWER_SECONDS a hub and not minutes."""
    monkeypatch.setattr(sources, "ANSWER_SECONDS", 0.5)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        point(monkeypatch, url, url)
        start = time.monotonic()
        assert refused("owner/tiny", cache_dir=home).count("does not answer") == 2
        assert time.monotonic() - start < 6
    # A name look-up that no socket's timeout ends.
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(8))
    start = time.monotonic()
    assert refused("owner/tiny", cache_dir=home).count("does not answer") == 2
    assert time.monotonic() - start < 6


def test_offline_mode_is_kept(tiny, home, monkeypatch):
    """HF_HUB_OFFLINE: Hugging Face is not asked, and that is the reason given."""
    with HubServer({"owner/tiny": tiny}) as server:
        point(monkeypatch, closed_port(), server.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        assert "Hugging Face is switched off by HF_HUB_OFFLINE" in refused("owner/tiny", cache_dir=home)
        assert not server.seen


def test_a_token_stays_with_its_hub(tiny, home, monkeypatch):
    """Hugging Face's token goes to the hub and not to the storage that it redirects to."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with HubServer({"owner/tiny": tiny}) as server:
        point(monkeypatch, closed_port(), server.url)
        hub.resolve("owner/tiny", source="huggingface", cache_dir=home, quiet=True)
        at_storage = [s for s in server.seen if s.path.startswith("/storage")]
        at_hub = [s for s in server.seen if s.path.startswith(("/api", "/owner"))]
    assert at_storage and not any(s.authorization for s in at_storage)
    assert at_hub and all(s.authorization == "Bearer hf_secret" for s in at_hub)


@pytest.mark.parametrize("source", BOTH)
def test_a_shard_that_the_hub_lacks_is_named(source, home, monkeypatch):
    """In the index but not in the repository; and listed, but gone from the storage."""
    files = repository(GOLDEN / "tiny-2b-bin")
    shard = "pytorch_model-00002-of-00002.bin"
    with HubServer({"owner/bin": {n: c for n, c in files.items() if n != shard}}) as server:
        point(monkeypatch, server.url, server.url)
        message = refused("owner/bin", source=source, cache_dir=home, quiet=True)
        assert shard in message and "1 of the 2 shards" in message
        server.repos["owner/bin"] = files
        if source == "huggingface":  # its commit's listing is cached for good: another cache sees the change
            home = home / "other"
        server.lost.add(shard)
        message = refused("owner/bin", source=source, cache_dir=home, quiet=True)
        assert f"broke off at {shard}" in message and "--source" in message
        server.lost.clear()
        assert content(hub.resolve("owner/bin", source=source, cache_dir=home, quiet=True)) == files


def test_what_another_program_downloaded_serves_without_a_hub(tiny, home, monkeypatch, capsys):
    """No receipt, and no hub: a snapshot that verifies is taken, and that is said; a partial one is not."""
    with HubServer({"owner/tiny": tiny}) as server:
        point(monkeypatch, server.url, server.url)
        folder = hub.resolve("owner/tiny", cache_dir=home, quiet=True)
    (folder / hub.RECEIPT).unlink()
    point(monkeypatch, closed_port(), closed_port())
    capsys.readouterr()
    assert hub.resolve("owner/tiny", cache_dir=home) == folder
    assert f"taking {folder} as it is" in capsys.readouterr().err
    os.truncate(folder / WEIGHTS, 1000)
    assert "does not answer" in refused("owner/tiny", cache_dir=home)


@pytest.mark.parametrize("source", BOTH)
def test_disk_faults_are_one_line(source, tiny, home, monkeypatch):
    """A cache below a file, too little space, and a device that is really full while bytes arrive."""
    with HubServer({"owner/tiny": tiny}) as server:
        point(monkeypatch, server.url, server.url)
        home.parent.mkdir(exist_ok=True)
        home.write_text("a file")
        message = refused("owner/tiny", source=source, cache_dir=home / "below", quiet=True)
        assert str(home) in message and "--cache_dir" in message
        home.unlink()
        server.seen.clear()
        usage = shutil.disk_usage(home.parent)
        monkeypatch.setattr(sources.shutil, "disk_usage", lambda _: usage._replace(free=1000))
        message = refused("owner/tiny", source=source, cache_dir=home, quiet=True)
        assert "free" in message and "--cache_dir" in message
        assert not server.asked_for(WEIGHTS)  # refused before the first byte
        monkeypatch.undo()
        online(monkeypatch)
        monkeypatch.setenv("MODELSCOPE_HOME", str(home.parent / "ms"))
        monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
        point(monkeypatch, server.url, server.url)
        if not Path("/dev/full").exists():
            pytest.skip("no /dev/full here")
        folder = hub.resolve("owner/tiny", source=source, cache_dir=home, quiet=True)
        part = forget(folder, source)
        part.symlink_to("/dev/full")  # the kernel answers each write with ENOSPC
        message = refused("owner/tiny", source=source, cache_dir=home, quiet=True)
        assert "no space is left" in message and "--cache_dir" in message


def test_names_that_are_neither_folder_nor_hub_name(tmp_path, home):
    """A mistyped path is not asked of a hub."""
    for name in (str(tmp_path / "absent"), "./absent", "nonsense", "a/b/c", "ow ner/x"):
        assert "no such folder, and not a hub name of the form owner/name" in refused(name)
    (tmp_path / "model.bin").write_bytes(b"x")
    assert "is a file" in refused(str(tmp_path / "model.bin"))
    (tmp_path / "model.gguf").write_bytes(b"x")
    assert "not a whole GGUF file" in refused(str(tmp_path / "model.gguf"))
    assert "modelscope, huggingface" in refused("owner/x", source="github")


def copy(name: str, tmp_path: Path) -> Path:
    folder = tmp_path / name
    shutil.copytree(GOLDEN / name, folder)
    folder.chmod(0o755)
    for file in folder.iterdir():
        file.chmod(0o644)
    return folder


def test_a_folder_is_itself_and_verify_names_what_is_wrong(tmp_path):
    """Each fault is one line with the file in it, and the two golden folders have none."""
    single, sharded = copy("tiny-2b", tmp_path), copy("tiny-2b-bin", tmp_path)
    assert hub.resolve(single) == single and hub.resolve(str(sharded)) == sharded
    weights, shard = single / WEIGHTS, sharded / "pytorch_model-00001-of-00002.bin"
    whole, whole_shard = weights.read_bytes(), shard.read_bytes()

    def fault(folder: Path, *words: str, tokenizer: bool = False) -> None:
        with pytest.raises(UserError) as caught:
            hub.verify(folder, tokenizer=tokenizer)
        assert "\n" not in str(caught.value)
        for word in words:
            assert word in str(caught.value)

    for bad, words in (
        (whole[:-1], ("cut short", f"{len(whole) - 1} of {len(whole)} bytes")),
        (whole + b"x", ("too long",)),
        (whole[:50], ("cut short within its header",)),
        (b"", ("is empty",)),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", ("git lfs pull",)),
        ((16).to_bytes(8, "little") + b"{}" * 8, ("not a safetensors file",)),
    ):
        weights.write_bytes(bad)
        fault(single, WEIGHTS, *words)
    weights.unlink()
    fault(single, "has no weights")
    weights.write_bytes(whole)
    fault(single, "tokenizer.json", "tokenizer.model", tokenizer=True)
    (single / "tokenizer.model").write_bytes(b"x")
    hub.verify(single, tokenizer=True)

    shard.write_bytes(whole_shard[:-100])
    fault(sharded, shard.name, "cut short")
    shard.write_bytes(b"")
    fault(sharded, shard.name, "is empty")
    shard.unlink()
    fault(sharded, shard.name, "is missing", "1 of the 2 shards")
    index = sharded / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "../../etc/passwd"}}))
    fault(sharded, "outside the folder")

    config = single / "config.json"
    config.write_text('{"hidden_size": 3,')
    fault(single, "config.json", "line 1", "column")
    config.write_bytes(b"\xff\xfe{}")
    fault(single, "config.json", "UTF-8")
    config.unlink()
    fault(single, "has no config.json")
    (single / "adapter_config.json").write_text("{}")
    fault(single, "--adapter")


def test_download_prints_the_size_and_the_folder(tiny, home, monkeypatch, capsys):
    """`minitune download`: progress on stderr, and a last line on stdout that a script can take."""
    with HubServer({"owner/tiny": tiny}) as server:
        point(monkeypatch, server.url, server.url)
        folder = hub.download("owner/tiny", cache_dir=home)
    said = capsys.readouterr()
    assert said.out.splitlines() == [f"owner/tiny: 0.9 MiB in {len(NEEDED)} files", str(folder)]
    assert WEIGHTS in said.err and "%" in said.err


def test_import_is_light():
    """The command line imports this room's names before it knows whether a hub is needed."""
    code = "import sys, minitune.checkpoint.hub; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"torch", "modelscope", "modelscope_hub", "huggingface_hub", "requests"}
    assert not heavy & set(run.stdout.split())
