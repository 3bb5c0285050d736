"""`--method qlora`: a base rounded while it is loaded, its run, its adapter, and what every other command makes of both."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from runs import Launch, argv_of, result_of, same, with_
from safetensors.torch import load_file, save_file
from torch import Tensor

from minitune import TrainConfig, UserError, load_model, train
from minitune.checkpoint import adapter as adapters
from minitune.checkpoint.weights import hub_parameters, load_decoder
from minitune.export import export
from minitune.infer.session import open_model
from minitune.model import four_bits
from minitune.model.decoder import Decoder, DecoderConfig
from minitune.model.fused import FusedStack
from minitune.model.lora import LoraConfig, attach, merge
from minitune.model.quantized import Int4Linear, dequantize, is_packed, packed_linears
from minitune.train import fast

IDS = torch.tensor([[1, *range(3, 60, 3)], [1, *range(340, 283, -3)]])

pytestmark = pytest.mark.usefixtures("undrawn")


def rounded(folder: Path, group: int) -> Decoder:
    """The loaded model, its linears then replaced by what their rows round to, part by part."""
    decoder = load_decoder(folder, "float32", "cpu")
    with torch.no_grad():
        for linear in decoder.linears():
            for _, start, end in linear.parts:
                linear.weight[start:end] = dequantize(
                    *four_bits.nearest(linear.weight[start:end], group), torch.float32
                )
    return decoder


def sharded_bin(folder: Path, model: Path) -> Path:
    """The same weights as pickles."""
    shutil.copytree(model, folder)
    torch.save(load_file(model / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


@pytest.mark.parametrize("kind", ["safetensors", "bin", "bfloat16"])
def test_rounded_while_loading(model: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As rounding the loaded model: the same logits, bit for bit, also a few rows at a time; 4.5 bits a weight."""
    folder = model
    if kind == "bin":
        folder = sharded_bin(tmp_path / "bin", model)
    elif kind == "bfloat16":
        folder = Path(shutil.copytree(model, tmp_path / "half"))
        tensors = {name: t.bfloat16() for name, t in load_file(model / "model.safetensors").items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr("minitune.checkpoint.filling.PIECE", 1000)
    decoder = load_decoder(folder, "float32", "cpu", group=32)
    linears = packed_linears(decoder)
    assert len(linears) == 16 and decoder.rounded == 32
    twin = rounded(folder, 32)
    assert torch.equal(decoder.logits(IDS), twin.logits(IDS))
    whole = load_decoder(folder, "float32", "cpu").logits(IDS)
    assert 0.02 < (decoder.logits(IDS) - whole).norm() / whole.norm() < 0.7, "four bits, not more, not another model"
    weights = sum(n.weight.numel() for n in linears)
    half = load_decoder(folder, "bfloat16", "cpu", group=32)
    stored = sum(n.weight_packed.nbytes + n.weight_scale.nbytes for n in packed_linears(half))
    assert 8 * stored / weights == 4.5
    assert all(
        torch.equal(a.weight_packed, b.weight_packed) for a, b in zip(linears, packed_linears(half), strict=True)
    )


def test_the_whole_model_is_never_there(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor that is made while loading is as large as two of the file's largest linear."""
    made: list[int] = []
    copy_ = four_bits.Rounding.copy_

    def watched(self: four_bits.Rounding, weight: Tensor) -> None:
        made.append(weight.numel())
        copy_(self, weight)

    monkeypatch.setattr(four_bits.Rounding, "copy_", watched)
    decoder = load_decoder(model, "float32", "cpu", group=32)
    assert len(made) == 28 and max(made) == 64 * 160
    assert sum(p.numel() for p in decoder.parameters()) < 2 * 512 * 64 + 64 * 9 + 1


def test_what_minicpm_2b_takes() -> None:
    """Its shape without numbers: 4.25 bits a weight of the layers, the embedding in 16, no strip on a weight, and room
    for one weight of each kind."""
    pytest.importorskip("triton", reason="Triton is not installed (pip install triton runs this in its interpreter)")
    with torch.device("meta"):
        decoder = four_bits.make_room(Decoder(DecoderConfig(122753, 2304, 5760, 40, 36, 36, 64)))
    decoder.allocate(torch.device("meta"), torch.bfloat16, fast.strips_of(decoder, LoraConfig()))
    assert decoder.strips == {} and decoder.rounded == 64
    body = sum(b.nbytes for n in packed_linears(decoder) for b in (n.weight_packed, n.weight_scale))
    layer = 4 * 2304 * 2304 + 3 * 2304 * 5760
    assert body == 40 * layer * 17 // 32
    assert sum(p.nbytes for p in decoder.parameters()) == 2 * 2304 * (122753 + 2 * 40 + 1)
    attach(decoder, LoraConfig())
    rooms = [room.tensor.shape for room in FusedStack(decoder, keep=False).rooms]
    assert rooms == [(6912, 2368), (2304, 2368), (11520, 2304), (2304, 5760)]


def test_a_run_and_its_adapter(config: TrainConfig, model: Path, tmp_path: Path) -> None:
    """It learns; the folder says what its base was; loaded, exported and served, it is the same model (invariant 6)."""
    config = with_(config, method="qlora", learning_rate=1e-2)
    summary = train(config, quiet=True)
    out = Path(config.output)
    log = [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert sum(log[6:]) < 0.98 * sum(log[:6]) and summary["method"] == "qlora"
    for folder in (out, out / "checkpoint-12"):
        assert adapters.base_group(folder) == 32
    assert "base_quantization" not in (out / "adapter_config.json").read_text(encoding="utf-8")

    tuned = load_model(model, out, "float32", "cpu")
    assert is_packed(tuned)
    by_hand = rounded(model, 32)
    adapters.load_adapter(by_hand, out)
    assert torch.allclose(tuned.logits(IDS), by_hand.logits(IDS), atol=1e-5)
    merge(by_hand)
    over_16_bits = load_decoder(model, "float32", "cpu")
    adapters.load_adapter(over_16_bits, out)
    report = export(model, out, output=tmp_path / "hf", quiet=True)
    assert report.comparison is not None and report.comparison.kl < 1e-6
    merged = load_decoder(tmp_path / "hf", "float32", "cpu")
    want = tuned.logits(IDS).detach()
    assert torch.allclose(merged.logits(IDS), want, atol=1e-4 * float(want.abs().max()))
    assert not torch.allclose(over_16_bits.logits(IDS), want, atol=1e-2 * float(want.abs().max()))
    assert is_packed(open_model(str(model), {"one": out}, device="cpu").engine.decoder)


def test_exported_as_int4_keeps_what_was_not_touched(config: TrainConfig, model: Path, tmp_path: Path) -> None:
    """Its 4 bits and scales are those that training saw; a linear with an adapter is rounded anew."""
    config = with_(config, method="qlora", max_steps=2, lora_target_modules=("q_proj",))
    train(config, quiet=True)
    export(model, Path(config.output), quant="int4", output=tmp_path / "int4", quiet=True)
    kept = hub_parameters(load_decoder(model, "bfloat16", "cpu", group=32))
    found = load_file(tmp_path / "int4" / "model.safetensors")
    for name, tensor in kept.items():
        if name.endswith(("_packed", "_scale")) and "q_proj" not in name:
            assert torch.equal(found[name], tensor), name


def test_resumed_bit_for_bit(config: TrainConfig, tmp_path: Path) -> None:
    """From its first checkpoint on, the same tensors and the same log; not as a run of another method."""
    config = with_(config, method="qlora")
    train(config, quiet=True)
    broken = Path(f"{config.output}-broken")
    shutil.copytree(config.output, broken)
    for name in ("adapter_config.json", "adapter_model.safetensors", "summary.json", adapters.BASE):
        (broken / name).unlink()
    shutil.rmtree(broken / "checkpoint-12")
    with pytest.raises(UserError, match="was trained with method qlora, now it is lora"):
        train(with_(config, output=str(broken), resume="auto", method="lora"), quiet=True)
    train(with_(config, output=str(broken), resume="auto"), quiet=True)
    same(config.output, broken)


def test_several_processes_make_the_same_steps(config: TrainConfig, tmp_path: Path, processes: object) -> None:
    """Two, each with the base in 4 bits and the adapter whole, learn what one does."""
    config = with_(config, method="qlora", lora_dropout=0.0, max_steps=3)
    train(config, quiet=True)
    two = Launch(processes, tmp_path, [argv_of(config, output=str(tmp_path / "two"))] * 2)
    assert two.codes() == [0, 0], two.said
    ours, want = result_of(tmp_path / "two"), result_of(config.output)
    assert all((ours[name] - want[name]).norm() <= 1e-3 * want[name].norm() + 1e-6 for name in want)


def test_a_folder_of_4_bits_is_trained_as_it_is(config: TrainConfig, model: Path, tmp_path: Path) -> None:
    """qlora and lora over an int4 export are one run: nothing is rounded again, and the adapter says nothing of it."""
    export(model, None, quant="int4", output=tmp_path / "base", quiet=True)
    for method in ("lora", "qlora"):
        output = str(tmp_path / method)
        train(with_(config, model=str(tmp_path / "base"), output=output, method=method, max_steps=2), quiet=True)
        assert not (tmp_path / method / adapters.BASE).exists()
    same(tmp_path / "lora", tmp_path / "qlora")


def test_what_does_not_go_together(config: TrainConfig, model: Path, tmp_path: Path) -> None:
    """One line each."""
    ds = tmp_path / "ds.json"
    ds.write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="qlora and --deepspeed don't go together"):
        train(with_(config, method="qlora", deepspeed=str(ds)), quiet=True)
    with pytest.raises(UserError, match="is for --method full"):
        train(with_(config, method="qlora", optim="adamw_8bit"), quiet=True)
    for method in ("lora", "qlora"):
        train(with_(config, method=method, max_steps=1, output=str(tmp_path / method)), quiet=True)
    with pytest.raises(UserError, match="a: 16 bits, b: 4 bits"):
        open_model(str(model), {"a": tmp_path / "lora", "b": tmp_path / "qlora"}, device="cpu")
    form = tmp_path / "qlora" / adapters.BASE
    form.write_text(form.read_text(encoding="utf-8").replace('"search": 1', '"search": 99'), encoding="utf-8")
    with pytest.raises(UserError, match="update minitune"):
        load_model(model, tmp_path / "qlora", device="cpu")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peft_reads_the_adapter_over_the_rounded_base(config: TrainConfig, model: Path, dtype: str) -> None:
    """Every tensor has PEFT's name, and its settings hold no name that it lacks."""
    peft = pytest.importorskip("peft")
    train(with_(config, method="qlora", max_steps=1, dtype=dtype), quiet=True)
    assert peft.PeftConfig.from_pretrained(config.output).r == config.lora_r
    assert not isinstance(load_decoder(model, dtype, "cpu").linears()[0], Int4Linear)
