"""`--format hf --quant int4`: stock transformers with compressed-tensors, our own loader, and plain arithmetic agree."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import small
import torch
from safetensors.torch import load_file

import minitune
from minitune.checkpoint.weights import hub_parameters, load_decoder
from minitune.config import UserError
from minitune.export import export
from minitune.model.lora import merge
from minitune.model.quantized import Int4Linear

IDS = torch.tensor([[1, *range(3, 60, 3)], [1, *range(340, 283, -3)]])


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """(base, adapter, folder): a MiniCPM with scalings of its own, float32, the adapter merged and packed."""
    root = tmp_path_factory.mktemp("int4")
    base = small.minicpm(root / "base", sharp=2.0, hidden_size=128, intermediate_size=256, num_attention_heads=8)
    run = small.adapter(root / "run", base)
    report = export(base, run, quant="int4", dtype="float32", output=root / "out", quiet=True)
    assert report.merged == 12 and report.comparison is not None and 0 < report.comparison.kl < 1
    return base, run, root / "out"


def test_transformers_loads_it(exported: tuple[Path, Path, Path]) -> None:
    """Stock transformers, compressed-tensors' own dequantisation: our loader's logits; near the trained model's."""
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from transformers import AutoModelForCausalLM

    base, run, folder = exported
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ours = load_decoder(folder, "float32", "cpu")
    assert all(isinstance(x, Int4Linear) for x in ours.linears())
    with torch.no_grad():
        theirs, mine = model.eval()(IDS).logits, ours.logits(IDS)
        trained = minitune.load_model(base, run, device="cpu").logits(IDS)
    assert (theirs - mine).abs().max() < 3e-5 * theirs.abs().max()
    assert 0.01 < (mine - trained).norm() / trained.norm() < 0.5, "four bits, not more and not another model"


def test_what_is_on_disk(exported: tuple[Path, Path, Path]) -> None:
    """compressed-tensors' names, types and shapes; embedding, head and norms as they were; a group a scale."""
    _, _, folder = exported
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    name = "model.layers.1.mlp.down_proj.weight"
    packed, scale, shape = (tensors[f"{name}_{part}"] for part in ("packed", "scale", "shape"))
    assert (packed.dtype, list(packed.shape)) == (torch.int32, [128, 32])
    assert (scale.dtype, list(scale.shape), shape.tolist()) == (torch.float32, [128, 2], [128, 256])
    assert name not in tensors and "lm_head.weight" in tensors and "model.embed_tokens.weight" in tensors
    scheme = config["quantization_config"]["config_groups"]["group_0"]
    assert scheme["weights"]["group_size"] == 128 and config["quantization_config"]["ignore"] == ["lm_head"]
    assert config["architectures"] == ["GraniteForCausalLM"]


def test_an_independent_reading(exported: tuple[Path, Path, Path]) -> None:
    """A weight unpacked here, nibble by nibble, is the merged weight within half a step (the range's ends aside)."""
    base, run, folder = exported
    tensors = load_file(folder / "model.safetensors")
    decoder = minitune.load_model(base, run, device="cpu")
    merge(decoder)
    name = "model.layers.2.self_attn.q_proj.weight"
    meant = hub_parameters(decoder)[name]
    words = tensors[f"{name}_packed"].to(torch.int64) & 0xFFFFFFFF
    q = torch.stack([(words >> 4 * i & 15) - 8 for i in range(8)], dim=-1).flatten(1)
    scale = tensors[f"{name}_scale"].repeat_interleave(128, dim=1)
    inside = (q > -8) & (q < 7)
    assert inside.float().mean() > 0.8
    assert ((q * scale - meant).abs() <= scale.abs() * 0.5001)[inside].all()


def test_groups_and_dtypes(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Rows of 96 weights take groups of 32, which is said; a float32 base keeps the rest in bfloat16."""
    base = small.minicpm(tmp_path / "base", sharp=2.0)
    report = export(base, quant="int4", output=tmp_path / "out")
    assert "rows of 96 weights are no multiple of 128: groups of 32" in capsys.readouterr().err
    assert report.dtype == "int4 in groups of 32, the rest bfloat16"
    kinds = {str(t.dtype) for t in load_file(tmp_path / "out" / "model.safetensors").values()}
    assert kinds == {"torch.int32", "torch.bfloat16", "torch.int64"}
    with torch.no_grad():
        assert torch.isfinite(load_decoder(tmp_path / "out", "bfloat16", "cpu").logits(IDS)).all()


def test_refused(tmp_path: Path) -> None:
    """Rows that no group divides; a packed base, for export and for merging: one line each, nothing written."""
    odd = small.minicpm(tmp_path / "odd", hidden_size=80, num_attention_heads=5, num_key_value_heads=1)
    with pytest.raises(UserError, match="rows of a multiple of 32 weights; this model has rows of 80") as caught:
        export(odd, quant="int4", output=tmp_path / "out", quiet=True)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
    base = small.minicpm(tmp_path / "base")
    export(base, quant="int4", output=tmp_path / "packed", quiet=True)
    with pytest.raises(UserError, match="export needs a base in float32"):
        export(tmp_path / "packed", output=tmp_path / "out", quiet=True)
    decoder = minitune.load_model(tmp_path / "packed", small.adapter(tmp_path / "run", base), device="cpu")
    with pytest.raises(ValueError, match="4-bit weights"):
        merge(decoder)
