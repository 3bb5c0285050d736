"""Adapter folders: what we save opens in PEFT, what PEFT saves opens here, anything else is refused by name."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from twins import SHAPE, assert_close, hub_twin

from minitune import UserError, load_model
from minitune.checkpoint.adapter import adapter_parameters, load_adapter, save_adapter
from minitune.checkpoint.weights import load_decoder
from minitune.model.decoder import Decoder
from minitune.model.lora import LoraConfig, adapted, attach

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
IDS = torch.tensor([[1, 9, 30, 4, 77, 12, 50]])
Q_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
TARGETS = [
    (ALL, False),
    (("q_proj", "v_proj"), True),
    (("gate_proj",), False),
    (r".*layers\.[02]\..*\.(k|down)_proj", False),
    ("all-linear", True),
]


def ours(folder: Path, targets: Any = ALL, rslora: bool = False) -> Decoder:
    decoder = load_decoder(folder)
    config = LoraConfig(r=5, lora_alpha=12, lora_dropout=0.2, target_modules=targets, use_rslora=rslora)
    attach(decoder, config, seed=4)
    for linear in adapted(decoder):
        assert linear.lora is not None
        torch.nn.init.normal_(linear.lora.B, std=0.1)
    return decoder


def logits(decoder: Decoder) -> Tensor:
    with torch.no_grad():
        return decoder.logits(IDS)


@pytest.mark.parametrize(("targets", "rslora"), TARGETS)
def test_ours_opens_in_peft(tmp_path: Path, targets: Any, rslora: bool) -> None:
    """PEFT on the `transformers` twin gives our logits, with no key missing or left over, and its settings agree."""
    from peft import PeftModel

    hub = hub_twin(tmp_path / "base")
    decoder = ours(tmp_path / "base", targets, rslora)
    save_adapter(decoder, tmp_path / "adapter", "owner/base")
    theirs = PeftModel.from_pretrained(hub, tmp_path / "adapter").eval()
    with torch.no_grad():
        assert_close(logits(decoder), theirs(IDS).logits, 3e-5)
        with theirs.disable_adapter():
            assert (logits(decoder) - theirs(IDS).logits).abs().max() > 1e-3
    held = {n.replace(".default", ""): p for n, p in theirs.named_parameters() if "lora_" in n}
    mine = adapter_parameters(decoder)
    assert held.keys() == mine.keys() and all(torch.equal(held[n], mine[n]) for n in mine)
    config = theirs.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout, config.use_rslora) == (5, 12, 0.2, rslora)
    assert config.base_model_name_or_path == "owner/base" and config.task_type == "CAUSAL_LM"


@pytest.mark.parametrize(("targets", "rslora"), TARGETS)
def test_pefts_opens_here(tmp_path: Path, targets: Any, rslora: bool) -> None:
    """A folder that PEFT saved: equal logits, and the settings are taken over."""
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    hub = hub_twin(tmp_path / "base")
    chosen = targets if isinstance(targets, str) else list(targets)
    config = PeftConfig(
        r=3, lora_alpha=7, lora_dropout=0.3, target_modules=chosen, use_rslora=rslora, task_type="CAUSAL_LM"
    )
    theirs = get_peft_model(hub, config).eval()
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    theirs.save_pretrained(tmp_path / "adapter")
    decoder = load_model(tmp_path / "base", adapter=tmp_path / "adapter", dtype="float32", device="cpu")
    with torch.no_grad():
        assert_close(logits(decoder), theirs(IDS).logits, 3e-5)
    assert decoder.lora_config is not None
    assert (decoder.lora_config.r, decoder.lora_config.lora_alpha, decoder.lora_config.lora_dropout) == (
        3,
        7,
        0.3,
    )


def test_round_trip_and_bin(tmp_path: Path) -> None:
    """Saved and loaded, bit for bit, also from an old `adapter_model.bin`; the tensors are float32 over a bf16 base."""
    hub_twin(tmp_path / "base")
    decoder = ours(tmp_path / "base")
    folder = tmp_path / "adapter"
    save_adapter(decoder, folder, "base")
    for form in ("safetensors", "bin"):
        if form == "bin":
            torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
            (folder / "adapter_model.safetensors").unlink()
        again = load_decoder(tmp_path / "base", dtype="bfloat16")
        assert load_adapter(again, folder) == decoder.lora_config or set(ALL) == set(again.lora_config.target_modules)  # type: ignore[union-attr]
        mine, other = adapter_parameters(decoder), adapter_parameters(again)
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[n], other[n]) and other[n].dtype == torch.float32 for n in mine)
        assert (again.logits(IDS).float() - logits(decoder)).abs().max() < 0.1 * logits(decoder).abs().max()


# Refused


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """(base, an adapter that fits it)."""
    hub_twin(tmp_path / "base")
    save_adapter(ours(tmp_path / "base", ("q_proj", "down_proj")), tmp_path / "adapter", "base")
    return tmp_path / "base", tmp_path / "adapter"


def refused(base: Path, adapter: Path, *says: str) -> None:
    with pytest.raises(UserError) as error:
        load_model(base, adapter=adapter, dtype="float32", device="cpu")
    assert "\n" not in str(error.value)
    for word in (str(adapter), *says):
        assert word in str(error.value), str(error.value)


def change_config(adapter: Path, **changes: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "lora_only"}, "lora_only"),
        ({"lora_bias": True}, "lora_bias"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern"),
        ({"layers_to_transform": [0]}, "layers_to_transform"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"target_modules": None}, "target_modules"),
        ({"target_modules": ["c_attn"]}, "c_attn"),
        ({"target_modules": "*["}, "*["),
        ({"r": None}, "r"),
        ({"r": 0}, "r"),
        ({"lora_alpha": "much"}, "lora_alpha"),
        ({"lora_dropout": 2}, "lora_dropout"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"alora_invocation_tokens": [5, 6]}, "alora_invocation_tokens"),
        ({"use_qalora": True}, "use_qalora"),
        ({"exclude_modules": ["o_proj"]}, "exclude_modules"),
        ({"target_parameters": ["mlp.experts"]}, "target_parameters"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value,
)
def test_refused_settings(pair: tuple[Path, Path], changes: dict[str, Any], says: str) -> None:
    """What would be computed otherwise than PEFT does it is refused, never passed over."""
    base, adapter = pair
    change_config(adapter, **changes)
    refused(base, adapter, says)


@pytest.mark.parametrize("change", [{"num_hidden_layers": 2}, {"num_hidden_layers": 4}, {"intermediate_size": 96}])
def test_adapter_of_another_model(pair: tuple[Path, Path], change: dict[str, int]) -> None:
    """Fewer layers, more layers, another width: one line that says so and names a tensor."""
    _, adapter = pair
    other = adapter.parent / "other"
    hub_twin(other, **change)
    assert SHAPE[next(iter(change))] != next(iter(change.values()))
    refused(other, adapter, "another model", "lora_")


def test_missing_and_damaged(pair: tuple[Path, Path]) -> None:
    """No folder, a model in place of an adapter, a tensor too few, a file cut short, no weights at all."""
    base, adapter = pair
    refused(base, adapter.parent / "nowhere", "adapter_config.json")
    refused(base, base, "adapter_config.json")
    path = adapter / "adapter_model.safetensors"
    whole = path.read_bytes()
    tensors = load_file(path)
    tensors.pop(Q_A)
    save_file(tensors, path)
    refused(base, adapter, Q_A, "missing")
    for kept in (0, 4, len(whole) // 2):
        path.write_bytes(whole[:kept])
        refused(base, adapter, path.name)
    path.unlink()
    refused(base, adapter, path.name)


class Evil:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def test_evil_adapter(pair: tuple[Path, Path]) -> None:
    """An `adapter_model.bin` that would run code is refused in one line, and does not run."""
    base, adapter = pair
    held = load_file(adapter / "adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({**held, "x": Evil(adapter / "ran")}, adapter / "adapter_model.bin")
    refused(base, adapter, "adapter_model.bin")
    assert not (adapter / "ran").exists()
    (adapter / "adapter_model.bin").write_bytes(b"no pickle")
    refused(base, adapter, "adapter_model.bin")


def test_a_refused_adapter_leaves_the_model(pair: tuple[Path, Path]) -> None:
    """After the error the decoder computes as before, with nothing attached."""
    base, adapter = pair
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors.pop(Q_A)
    save_file(tensors, path)
    decoder = load_decoder(base)
    with pytest.raises(UserError):
        load_adapter(decoder, adapter)
    assert not adapted(decoder) and decoder.lora_config is None
    assert torch.equal(logits(decoder), logits(load_decoder(base)))
