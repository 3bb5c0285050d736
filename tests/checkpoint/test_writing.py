"""Files of tensors: what the library reads back, on a card by several threads; a state's large tensors beside it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from minitune.checkpoint import resume, writing
from minitune.config import UserError

KINDS = (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.uint8, torch.int64)


def tensors(device: str = "cpu") -> dict[str, Tensor]:
    """Of every kind: odd sizes, a scalar, an empty one, one that does not lie end to end."""
    made = torch.Generator().manual_seed(0)
    held = {f"of {i}": torch.randint(0, 100, (7, 3 + i), generator=made).to(kind) for i, kind in enumerate(KINDS)}
    held |= {"scalar": torch.tensor(3.5), "empty": torch.empty(0, 4), "turned": torch.randn(5, 9, generator=made).t()}
    return {name: tensor.to(device) for name, tensor in held.items()}


def same(got: dict[str, Tensor], want: dict[str, Tensor]) -> bool:
    return got.keys() == want.keys() and all(
        got[n].dtype == t.dtype and torch.equal(got[n].cpu(), t.cpu()) for n, t in want.items()
    )


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("piece", [writing.PIECE, 7])
def test_a_file_is_the_librarys(tmp_path: Path, device: str, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """safetensors reads what was written, of the same size as its own file; the folder's permissions."""
    monkeypatch.setattr(writing, "PIECE", piece)
    tmp_path.chmod(0o750)
    held = tensors(device)
    writing.save_tensors(held, tmp_path / "ours.safetensors")
    save_file({n: t.cpu().contiguous() for n, t in held.items()}, tmp_path / "theirs.safetensors", {"format": "pt"})
    assert same(load_file(tmp_path / "ours.safetensors"), held)
    with safe_open(tmp_path / "ours.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    ours, theirs = (tmp_path / f"{name}.safetensors" for name in ("ours", "theirs"))
    assert ours.stat().st_size == theirs.stat().st_size and ours.stat().st_mode & 0o777 == 0o640


@pytest.mark.gpu
def test_many_files_of_a_card(tmp_path: Path) -> None:
    """More shards than threads: each tensor is in the file that the index names; a fault in one thread is raised."""
    held = {f"t{i}": torch.randn(300, 400, device="cuda") for i in range(20)}
    writing.write_safetensors(tmp_path / "a", held.items(), 1 << 19)
    files = sorted((tmp_path / "a").glob("model-*.safetensors"))
    assert len(files) == 20 and same({n: t for file in files for n, t in load_file(file).items()}, held)
    (tmp_path / "b" / "part-7.safetensors").mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        writing.write_safetensors(tmp_path / "b", held.items(), 1 << 19)


def test_a_states_large_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was saved is read, wherever a tensor stands in it; a file cut short is one line."""
    monkeypatch.setattr(resume, "LEAST", 64)
    state = {
        "step": 3,
        "optimizer": {"m": torch.arange(64, dtype=torch.int8), "v": [torch.randn(40), torch.tensor(2.0)], "name": "x"},
        "nested": {"adamw": {"state": {0: {"exp_avg": torch.randn(30, 2)}}}},
        "none": None,
    }
    with resume.saved(tmp_path, 3, state, 2) as part:
        (part / "model.safetensors").write_bytes(b"weights")
    folder = tmp_path / "checkpoint-3"
    assert (folder / resume.STATE).stat().st_size < 5000 and (folder / resume.LARGE).is_dir()
    read = resume.read_state(folder)
    assert torch.equal(read["optimizer"]["m"], state["optimizer"]["m"])  # type: ignore[index]
    assert torch.equal(read["optimizer"]["v"][0], state["optimizer"]["v"][0])  # type: ignore[index]
    want = state["nested"]["adamw"]["state"][0]["exp_avg"]  # type: ignore[index]
    assert torch.equal(read["nested"]["adamw"]["state"][0]["exp_avg"], want)
    assert (read["step"], read["none"], read["optimizer"]["name"]) == (3, None, "x")
    assert float(read["optimizer"]["v"][1]) == 2.0

    into = tmp_path / "result"
    into.mkdir()
    assert resume.linked(folder, into) and [p.name for p in into.iterdir()] == ["model.safetensors"]
    assert (into / "model.safetensors").samefile(folder / "model.safetensors")
    assert not resume.linked(tmp_path / "checkpoint-4", into)

    file = next((folder / resume.LARGE).glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(UserError, match="use an older one"):
        resume.read_state(folder)
    (folder / resume.LARGE / file.name).unlink()
    with pytest.raises(UserError, match="use an older one"):
        resume.read_state(folder)
