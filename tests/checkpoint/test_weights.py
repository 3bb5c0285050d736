"""The hub's layout both ways: strict, lean, and no code of a checkpoint ever runs (invariant 9)."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from twins import hub_twin, rewrite_config

import minitune
from minitune import UserError, load_model
from minitune.checkpoint.shards import Shards
from minitune.checkpoint.weights import (
    choose_device,
    choose_dtype,
    hub_parameters,
    hub_tensors,
    load_decoder,
    read_config,
)
from minitune.checkpoint.writing import write_safetensors
from minitune.model.decoder import Decoder

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Q = "model.layers.1.self_attn.q_proj.weight"
IDS = torch.tensor([[1, 9, 30, 4, 77, 12]])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small tied Granite checkpoint, as `transformers` saves it."""
    path = tmp_path / "model"
    hub_twin(path, num_hidden_layers=2, tie_word_embeddings=True)
    return path


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    held = tensors(folder)
    change(held)
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})


def to_bin(folder: Path, shards: int = 1, dtype: torch.dtype | None = None) -> None:
    """The same checkpoint as `pytorch_model.bin`, whole or sharded with an index."""
    held = {n: t.to(dtype or t.dtype) for n, t in tensors(folder).items()}
    (folder / "model.safetensors").unlink()
    if shards == 1:
        torch.save(held, folder / "pytorch_model.bin")
        return
    names = sorted(held)
    files = [f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin" for i in range(shards)]
    weight_map = {n: files[i % shards] for i, n in enumerate(names)}
    for file in files:
        torch.save({n: held[n] for n in names if weight_map[n] == file}, folder / file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index), encoding="utf-8")


def to_shards(folder: Path, max_bytes: int = 20_000) -> None:
    held = tensors(folder)
    (folder / "model.safetensors").unlink()
    write_safetensors(folder, held.items(), max_bytes)
    assert (folder / "model.safetensors.index.json").is_file()


def refused(folder: Path, *says: str) -> None:
    """Both ways in end in one line that names all of `says`."""
    for load in (load_decoder, load_model):
        with pytest.raises(UserError) as error:
            load(folder, dtype="float32", device="cpu")
        assert "\n" not in str(error.value)
    with pytest.raises(UserError) as error:
        load_decoder(folder, dtype="float32", device="cpu")
    for word in says:
        assert word in str(error.value), str(error.value)


# Bad checkpoints


def test_missing_tensor(folder: Path) -> None:
    """A tensor that is not there is named; nothing is left at whatever memory held."""
    rewrite(folder, lambda held: held.pop(Q))
    refused(folder, Q, "missing", str(folder))


def test_surplus_tensor(folder: Path) -> None:
    """A tensor that we would not use is named: it may change what the model computes."""
    rewrite(folder, lambda held: held.update({Q.replace("weight", "bias"): torch.ones(64)}))
    refused(folder, Q.replace("weight", "bias"), "not part")


def test_old_rotary_buffer_is_no_surplus(folder: Path) -> None:
    """`rotary_emb.inv_freq`, which old checkpoints carry, is computed and may stand there."""
    want = load_decoder(folder).logits(IDS)
    rewrite(folder, lambda held: held.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    assert torch.equal(load_decoder(folder).logits(IDS), want)


@pytest.mark.parametrize("shape", [(64, 65), (63, 64), (64,), (64, 1), (1, 64)])
def test_misshapen_tensor(folder: Path, shape: tuple[int, ...]) -> None:
    """A wrong shape is named with both shapes, also one that would broadcast."""
    rewrite(folder, lambda held: held.update({Q: torch.ones(shape)}))
    refused(folder, Q, str(list(shape)), "[64, 64]", "model.safetensors")


def test_config_of_another_size(folder: Path) -> None:
    """A vocabulary that the file does not have."""
    rewrite_config(folder, vocab_size=98)
    refused(folder, EMBED, "[97, 64]", "[98, 64]")


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_missing_shard(folder: Path, kind: str) -> None:
    """The index names a file that is not there."""
    to_bin(folder, 3) if kind == "bin" else to_shards(folder)
    victim = sorted(p for p in folder.glob(f"*-of-*.{kind}"))[1]
    victim.unlink()
    refused(folder, victim.name, "missing")


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_index_names_a_tensor_that_its_shard_lacks(folder: Path, kind: str) -> None:
    """The index and the shards disagree."""
    to_bin(folder, 2) if kind == "bin" else to_shards(folder)
    (path,) = folder.glob("*.index.json")
    index = json.loads(path.read_text(encoding="utf-8"))
    other = next(f for f in index["weight_map"].values() if f != index["weight_map"][Q])
    index["weight_map"][Q] = other
    path.write_text(json.dumps(index), encoding="utf-8")
    refused(folder, Q, other)


@pytest.mark.parametrize("weight_map", [None, [], ["a"], {}, {Q: 3}, {Q: "../elsewhere.bin"}])
def test_broken_index(folder: Path, weight_map: Any) -> None:
    """An index that is no index, or that points out of the folder, is one line too."""
    to_bin(folder, 2)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    (folder.parent / "elsewhere.bin").write_bytes(b"")
    refused(folder, "index.json")


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.999])
def test_truncated_file(folder: Path, kind: str, kept: float) -> None:
    """A download that stopped, at any place."""
    if kind == "bin":
        to_bin(folder)
    (path,) = folder.glob(f"*.{kind}")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept)])
    refused(folder, path.name)


def test_no_weights(folder: Path) -> None:
    """A folder with a config alone, and a folder with nothing."""
    (folder / "model.safetensors").unlink()
    refused(folder, str(folder), "no weights")
    (folder / "config.json").unlink()
    refused(folder, str(folder))


@pytest.mark.parametrize("held", [[torch.ones(2)], {EMBED: [1.0, 2.0]}, {"state_dict": {}}, torch.ones(3), {3: 4}])
def test_bin_that_holds_something_else(folder: Path, held: Any) -> None:
    """A pickle of plain values that is no table of tensors."""
    (folder / "model.safetensors").unlink()
    torch.save(held, folder / "pytorch_model.bin")
    refused(folder, str(folder))


class Evil:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("zipped", [True, False])
def test_evil_pickle_is_refused_and_does_not_run(folder: Path, zipped: bool) -> None:
    """A `.bin` that would run code: one line, and the code has not run."""
    marker = folder / "ran"
    held: dict[str, Any] = dict(tensors(folder))
    held["model.extra"] = Evil(marker)
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    if zipped:
        torch.save(held, path)
    else:
        path.write_bytes(pickle.dumps(held))
    refused(folder, "pytorch_model.bin")
    assert not marker.exists()
    torch.load(path, weights_only=False) if zipped else pickle.loads(path.read_bytes())
    assert marker.exists(), "the trap itself does not work"


def test_no_code_of_the_checkpoint_runs(folder: Path) -> None:
    """`auto_map` and Python files in the folder are passed over, whatever the architecture."""
    marker = folder / "ran"
    source = f"import os\nos.makedirs({str(marker)!r}, exist_ok=True)\nclass MiniCPMConfig: pass\n"
    for module in ("configuration_minicpm", "modeling_minicpm"):
        (folder / f"{module}.py").write_text(source, encoding="utf-8")
    rewrite_config(
        folder,
        architectures=["MiniCPMForCausalLM"],
        model_type="minicpm",
        auto_map={
            "AutoConfig": "configuration_minicpm.MiniCPMConfig",
            "AutoModelForCausalLM": "modeling_minicpm.MiniCPMForCausalLM",
        },
    )
    load_model(folder)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"architectures": ["MiniCPM3ForCausalLM"]}, "MiniCPM3ForCausalLM"),
        ({"architectures": ["Qwen2ForCausalLM"]}, "Qwen2ForCausalLM"),
        ({"architectures": None}, "architecture"),
        ({"architectures": ["MiniCPMForCausalLM"], "num_experts": 8}, "experts"),
        ({"architectures": ["GraniteForCausalLM"], "num_local_experts": 8}, "experts"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_attention_heads": None}, "num_attention_heads"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}, "yarn"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "factor"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "short_factor"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}}, "low_freq_factor"),
        (
            {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "short_factor": [1.0] * 7,
                    "long_factor": [1.0] * 8,
                }
            },
            "short_factor",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused_configs(folder: Path, changes: dict[str, Any], says: str) -> None:
    """What is not this graph is refused by name, before any weight is read; the line says what is supported."""
    rewrite_config(folder, **changes)
    refused(folder, says, "config.json")


# Tied and untied


def test_differing_head_wins(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A config that says tied (or nothing) with a head of its own in the file: the file wins, and it is said."""
    head = tensors(folder)[EMBED] + 0.5
    before = load_decoder(folder).logits(IDS)
    rewrite(folder, lambda held: held.update({HEAD: head}))
    decoder = load_decoder(folder)
    assert "lm_head.weight differs" in capsys.readouterr().err
    assert decoder.lm_head is not None and torch.equal(decoder.lm_head.weight, head)
    assert (decoder.logits(IDS) - before).abs().max() > 1e-2
    assert torch.equal(hub_parameters(decoder)[HEAD], head)


def test_equal_head_stays_tied(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A redundant head is no second parameter; nothing is said."""
    rewrite(folder, lambda held: held.update({HEAD: held[EMBED].clone()}))
    decoder = load_decoder(folder)
    assert decoder.lm_head is None and HEAD not in dict(hub_tensors(decoder))
    assert not capsys.readouterr().err


def test_absent_tie_means_tied_for_minicpm_and_untied_for_llama(folder: Path) -> None:
    """The hub's MiniCPM config leaves the key out; a Llama without head and key lacks a tensor."""
    rewrite_config(folder, tie_word_embeddings=None, architectures=["MiniCPMForCausalLM"])
    assert load_decoder(folder).lm_head is None
    rewrite_config(folder, architectures=["LlamaForCausalLM"])
    refused(folder, HEAD, "missing")
    rewrite(folder, lambda held: held.update({HEAD: held[EMBED] * 2}))
    assert load_decoder(folder).lm_head is not None


# Forms and dtypes


@pytest.mark.parametrize("form", ["bin", "bin shards", "safetensors shards"])
def test_every_form_gives_the_same_weights(folder: Path, form: str) -> None:
    """Bit for bit, whatever holds the tensors; they come frozen and in eval mode."""
    want = {n: t.clone() for n, t in tensors(folder).items()}
    {"bin": to_bin, "bin shards": lambda f: to_bin(f, 3), "safetensors shards": to_shards}[form](folder)
    decoder = load_decoder(folder)
    got = hub_parameters(decoder)
    assert got.keys() == want.keys() and all(torch.equal(got[n], want[n]) for n in want)
    assert not decoder.training and not any(p.requires_grad for p in decoder.parameters())
    shutil.rmtree(folder)  # nothing of the model stays in the files
    assert decoder.logits(IDS).isfinite().all()


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_loading_is_a_cast(folder: Path, stored: torch.dtype, dtype: str) -> None:
    """Each tensor equals the stored one cast once."""
    to_bin(folder, 2, stored)
    with Shards(folder) as shards:
        want = {n: shards.get(n).clone() for n in shards.names()}
    decoder = load_decoder(folder, dtype=dtype)
    assert decoder.dtype == getattr(torch, dtype)
    for name, tensor in hub_parameters(decoder).items():
        assert want[name].dtype == stored and torch.equal(tensor, want[name].to(decoder.dtype)), name


def test_whole_file_wins_over_a_stale_index(folder: Path) -> None:
    """As `transformers` looks: the whole file first, then shards; safetensors before .bin."""
    want = load_decoder(folder).logits(IDS)
    held = {n: torch.zeros_like(t) for n, t in tensors(folder).items()}
    write_safetensors(folder.parent / "other", held.items(), 20_000)
    torch.save(held, folder / "pytorch_model.bin")
    for path in (folder.parent / "other").iterdir():
        shutil.copy(path, folder)
    assert torch.equal(load_decoder(folder).logits(IDS), want)


def test_choices() -> None:
    """`auto` on the CPU is float32; a wrong word is one line that lists the right ones."""
    cpu = torch.device("cpu")
    assert choose_dtype("auto", cpu) == torch.float32
    with pytest.raises(UserError, match="'int8'.*bfloat16"):
        choose_dtype("int8", cpu)
    with pytest.raises(UserError, match="'gpu'"):
        choose_device("gpu")


# Writing


@pytest.mark.parametrize("shard", [1 << 30, 30_000, 1])
@pytest.mark.parametrize("tied", [True, False])
def test_written_is_read(tmp_path: Path, shard: int, tied: bool) -> None:
    """What is written re-reads equal, here and in `transformers`; one file, shards, or a shard a tensor."""
    from transformers import AutoModelForCausalLM

    hub = hub_twin(tmp_path / "a", num_hidden_layers=2, tie_word_embeddings=tied)
    decoder = load_decoder(tmp_path / "a")
    write_safetensors(tmp_path / "b", hub_tensors(decoder), shard)
    shutil.copy(tmp_path / "a" / "config.json", tmp_path / "b")
    again = hub_parameters(load_decoder(tmp_path / "b"))
    assert all(torch.equal(t, again[n]) for n, t in hub_parameters(decoder).items())
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "b", attn_implementation="eager")
    with torch.no_grad():
        assert torch.equal(theirs(IDS).logits, hub(IDS).logits)
    files = list((tmp_path / "b").glob("*.safetensors"))
    assert len(files) == {1 << 30: 1, 1: len(again)}.get(shard, len(files)) and (shard > 1 << 20 or len(files) > 1)
    assert not list((tmp_path / "b").glob("part-*"))
    if len(files) > 1:
        index = json.loads((tmp_path / "b" / "model.safetensors.index.json").read_text(encoding="utf-8"))
        assert set(index["weight_map"].values()) == {f.name for f in files}
        assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in again.values())


@pytest.mark.parametrize("order", [(1 << 30, 30_000), (30_000, 1 << 30), (10_000, 30_000)])
def test_writing_over_an_older_model(tmp_path: Path, folder: Path, order: tuple[int, int]) -> None:
    """No file of the older one is left to be read in its place, by us or by others."""
    from transformers import AutoModelForCausalLM

    decoder = load_decoder(folder)
    out = tmp_path / "out"
    write_safetensors(out, ((n, t * 0) for n, t in hub_tensors(decoder)), order[0])
    write_safetensors(out, hub_tensors(decoder), order[1])
    shutil.copy(folder / "config.json", out)
    assert torch.equal(load_decoder(out).logits(IDS), decoder.logits(IDS))
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager")(IDS).logits
    assert (theirs - decoder.logits(IDS)).abs().max() < 1e-4
    files = {f.name for f in out.glob("*.safetensors")}
    index = out / "model.safetensors.index.json"
    named = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else {"model.safetensors"}
    assert files == named


def test_written_in_another_dtype(folder: Path) -> None:
    """`hub_tensors(dtype)` casts what is written, not the model."""
    decoder = load_decoder(folder)
    write_safetensors(folder.parent / "half", hub_tensors(decoder, torch.bfloat16))
    for name, tensor in load_file(folder.parent / "half" / "model.safetensors").items():
        assert torch.equal(tensor, hub_parameters(decoder)[name].bfloat16())
    assert decoder.dtype == torch.float32


# Memory

PEAK = """
import sys
from pathlib import Path
import torch, safetensors.torch
from minitune.checkpoint.weights import load_decoder

torch.set_num_threads(1)

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))

load_decoder(sys.argv[1] + "/warm", dtype="bfloat16", device="cpu")
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
load_decoder(sys.argv[1], dtype="bfloat16", device="cpu")
print(status("VmHWM") - before)
"""


def constant_checkpoint(folder: Path, hidden: int, layers: int) -> int:
    """A float32 MiniCPM of a `.bin` a layer; the number of parameters."""
    config = {
        "architectures": ["MiniCPMForCausalLM"],
        "vocab_size": 4096,
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
    }
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with torch.device("meta"):
        shapes = {n: t.shape for n, t in hub_parameters(Decoder(read_config(folder))).items()}
    shard_of = {n: n.split(".")[2] if ".layers." in n else "rest" for n in shapes}
    for shard in set(shard_of.values()):
        held = {n: torch.full(shape, 0.5) for n, shape in shapes.items() if shard_of[n] == shard}
        torch.save(held, folder / f"pytorch_model-{shard}.bin")
    index = {"weight_map": {n: f"pytorch_model-{shard}.bin" for n, shard in shard_of.items()}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index), encoding="utf-8")
    return sum(shape.numel() for shape in shapes.values())


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's memory counters")
@pytest.mark.parametrize("form", ["bin", "safetensors"])
def test_one_large_file_is_mapped_not_read(tmp_path: Path, form: str) -> None:
    """All tensors of a 40 MB file can be held and looked at without 40 MB of memory that the kernel can't drop."""

    def anonymous() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))

    held = {f"t{i}": torch.full((1 << 18,), float(i)) for i in range(40)}
    if form == "bin":
        torch.save(held, tmp_path / "pytorch_model.bin")
    else:
        save_file(held, tmp_path / "model.safetensors")
    before = anonymous()
    with Shards(tmp_path) as shards:
        mapped = {name: shards.get(name) for name in shards.names()}
        assert sum(t.sum().item() for t in mapped.values()) == sum(range(40)) << 18
        assert anonymous() - before < 15e6


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's counter of peak memory")
def test_float32_shards_load_into_bf16_without_a_second_copy(tmp_path: Path) -> None:
    """The peak is the bf16 model (45 MB) and a mapped shard or two (14 MB each); a float32 copy of the whole, or
    shards that stay mapped once read, would add 90 MB."""
    parameters = constant_checkpoint(tmp_path, 512, 6)
    constant_checkpoint(tmp_path / "warm", 8, 1)
    environment = {**os.environ, "PYTHONPATH": str(Path(minitune.__file__).parents[1])}
    ran = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    peak = int(ran.stdout)
    assert 2 * parameters * 0.9 < peak < 2 * parameters + 40e6, f"{peak / 1e6:.0f} MB"
