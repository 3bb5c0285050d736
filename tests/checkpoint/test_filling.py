"""Weights read by several threads: the same bits as tensor by tensor, one line for a bad file, and a prompt end."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from minitune import UserError
from minitune.checkpoint import filling
from minitune.checkpoint.shards import Shards
from minitune.checkpoint.weights import filled, hub_parameters, load_decoder, read_config, skeleton
from minitune.checkpoint.writing import write_safetensors
from minitune.model.decoder import Decoder

CONFIG = {
    "architectures": ["MiniCPMForCausalLM"], "vocab_size": 97, "hidden_size": 32, "intermediate_size": 56,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


def write_model(folder: Path, dtype: torch.dtype = torch.float32, shard: int = 40_000, **changes: Any) -> Path:
    """Random weights in the hub's layout, several shards."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | changes), encoding="utf-8")
    with torch.device("meta"):
        shapes = {n: t.shape for n, t in hub_parameters(Decoder(read_config(folder))).items()}
    made = torch.Generator().manual_seed(0)
    write_safetensors(folder, ((n, torch.randn(s, generator=made).to(dtype)) for n, s in shapes.items()), shard)
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


@torch.no_grad()
def one_by_one(folder: Path, dtype: torch.dtype, strips: dict[str, int]) -> Decoder:
    """The plain way: a tensor after the other, as the safetensors library gives it."""
    with Shards(folder) as shards:
        decoder = skeleton(shards).allocate(torch.device("cpu"), dtype, strips)
    for name, place in hub_parameters(decoder).items():
        (path,) = (p for p in folder.glob("*.safetensors") if name in set(safe_open(p, framework="pt").keys()))
        place.copy_(safe_open(path, framework="pt").get_tensor(name))
    return decoder


def held(decoder: Decoder) -> dict[str, Tensor]:
    return dict(decoder.named_parameters()) | decoder.strips


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """So many threads, with pieces of a few rows: a row of the models here has 64 to 224 bytes."""
    monkeypatch.setattr(filling, "PIECE", 1000)
    monkeypatch.setattr(filling, "THREADS", request.param)
    monkeypatch.setattr("os.cpu_count", lambda: request.param)
    return int(request.param)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("strips", [{}, {"attn.qkv": 64, "mlp.down": 64}], ids=["plain", "strips"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_bits(
    tmp_path: Path, threads: int, stored: torch.dtype, dtype: str, strips: dict[str, int], tied: bool
) -> None:
    """Fused q|k|v and gate|up, widened weights, a head of its own, casts: all as one by one."""
    folder = write_model(tmp_path, stored, tie_word_embeddings=tied)
    have = held(load_decoder(folder, dtype, "cpu", lambda _: strips))
    want = held(one_by_one(folder, getattr(torch, dtype), strips))
    assert have.keys() == want.keys() and len(have) > 10
    for name in want:
        assert torch.equal(have[name], want[name]), name


class Event:
    """A card's event on a machine without one; `waits` counts."""

    waits = 0

    def record(self, stream: Any) -> None:
        self.stream = stream

    def synchronize(self) -> None:
        Event.waits += 1


class Stream:
    def synchronize(self) -> None:
        self.waited = True


def test_a_cards_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lane of a card, with a stream and events that do nothing: the same bits, and no piece is read over one whose
    copy may still run."""
    folder = write_model(tmp_path)
    plain = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, pin_memory=False, **k: plain(*a, **k))
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "Event", Event)
    stream = Stream()
    with Shards(folder) as shards:
        decoder = skeleton(shards).allocate(torch.device("cpu"), torch.bfloat16, {"attn.o": 64})
        wanted = hub_parameters(decoder)
        work = [(shards.entry(n, t.shape), t) for n, t in wanted.items()]
        todo = [piece for entry, place in work if entry for piece in filling.pieces(entry, place, 1000)]
        with filling._Lane(torch.device("cpu"), 1000, stream) as lane:  # type: ignore[arg-type]
            for piece in todo:
                lane.take(piece)
    assert stream.waited and Event.waits == len(todo) > 100
    want = held(one_by_one(folder, torch.bfloat16, {"attn.o": 64}))
    assert all(torch.equal(tensor, want[name]) for name, tensor in held(decoder).items())


@pytest.mark.gpu
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_on_a_card(tmp_path: Path, stored: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real lane: the same bits as on the CPU, padding and strips zero."""
    monkeypatch.setattr(filling, "PIECE", 1000)
    folder = write_model(tmp_path, stored)
    strips = {"attn.qkv": 64, "attn.o": 64}
    have = held(load_decoder(folder, "bfloat16", "cuda", lambda _: strips))
    want = held(one_by_one(folder, torch.bfloat16, strips))
    for name in want:
        assert torch.equal(have[name].cpu(), want[name]), name


def test_entries_are_the_librarys(tmp_path: Path) -> None:
    """Offsets, shapes and dtypes; what has no place in the table is left to the library."""
    path = tmp_path / "model.safetensors"
    tensors = {
        "a": torch.arange(12, dtype=torch.float64).view(3, 4),
        "b": torch.arange(5, dtype=torch.int8),
        "scalar": torch.tensor(3.0),
        "small": torch.zeros(4, dtype=torch.float8_e4m3fn),
        "none": torch.zeros(0, 7),
    }
    save_file(tensors, path)
    found = filling.entries(path)
    assert found.keys() == {"a", "b", "none"}
    for name, entry in found.items():
        place = torch.full_like(tensors[name], 77)
        filling.fill([(entry, place)])
        assert torch.equal(place, tensors[name])


def test_a_file_that_ends_while_it_is_read(tmp_path: Path, threads: int) -> None:
    """Cut after its header was checked: one line that names the file and the tensor."""
    folder = write_model(tmp_path)
    victim = sorted(folder.glob("*.safetensors"))[1]
    with Shards(folder) as shards:
        empty = skeleton(shards)
        size = victim.stat().st_size
        with victim.open("r+b") as file:
            file.truncate(size - 100)
        with pytest.raises(UserError) as error:
            filled(shards, empty, "float32", "cpu", None)
        last = max((shards.entry(n, t.shape) for n, t in hub_parameters(empty).items()), key=_place(victim))
        assert last is not None
        assert str(error.value) == f"{victim}: damaged (it ends inside {last.name}); download it again"


def _place(path: Path) -> Any:
    return lambda entry: (entry.path == path, entry.offset)


def test_a_file_that_can_not_be_read(tmp_path: Path, threads: int) -> None:
    folder = write_model(tmp_path)
    victim = sorted(folder.glob("*.safetensors"))[1]
    with Shards(folder) as shards:
        empty = skeleton(shards)
        victim.unlink()
        with pytest.raises(UserError, match=r"can't be read \(no such file") as error:
            filled(shards, empty, "float32", "cpu", None)
        assert str(victim) in str(error.value)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Every piece takes 20 ms; the sizes of those that were read."""
    read: list[int] = []
    inner = filling._Lane.take

    def take(self: Any, piece: filling.Piece) -> None:
        time.sleep(0.02)
        inner(self, piece)
        read.append(piece.size)

    monkeypatch.setattr(filling._Lane, "take", take)
    yield read
    assert not [t for t in threading.enumerate() if t.name.startswith("weights")]


def test_it_stops_when_told(tmp_path: Path, threads: int, slow: list[int]) -> None:
    """Between two pieces, in every thread."""
    folder, turns = write_model(tmp_path), sys.getswitchinterval()
    seen: list[float] = []
    with Shards(folder) as shards, pytest.raises(filling.Abandoned):
        filled(shards, skeleton(shards), "float32", "cpu", None, lambda: bool(_note(seen)) and len(slow) >= 5)
    assert 5 <= len(slow) <= 5 + threads
    assert min(seen) < turns == sys.getswitchinterval(), "readers were not waiting for the interpreter, or still are"


def _note(seen: list[float]) -> list[float]:
    seen.append(sys.getswitchinterval())
    return seen


def test_ctrl_c_while_it_waits(tmp_path: Path, threads: int, slow: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The threads end with the piece that they are at."""

    def wait(futures: Any) -> None:
        while len(slow) < 3:
            time.sleep(0.001)
        raise KeyboardInterrupt

    monkeypatch.setattr(filling, "wait", wait)
    with pytest.raises(KeyboardInterrupt):
        load_decoder(write_model(tmp_path), "float32", "cpu")
    assert len(slow) <= 3 + 2 * threads


def test_no_copy_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor of the same dtype is read into its place; a cast goes through a piece's memory, made once a thread."""
    monkeypatch.setattr(filling, "PIECE", 1000)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    made: list[int] = []
    inner = filling._Lane.__exit__

    def leave(self: Any, *error: object) -> None:
        made.append(0 if self.host is None else self.host.numel())
        inner(self, *error)

    monkeypatch.setattr(filling._Lane, "__exit__", leave)
    folder = write_model(tmp_path)
    load_decoder(folder, "float32", "cpu")
    assert made == [0, 0]
    load_decoder(folder, "bfloat16", "cpu")
    assert 0 < max(made[2:]) <= 1000 and len(made) == 4
