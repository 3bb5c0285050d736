"""Adapter folders in PEFT's own format, both ways: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minitune.checkpoint.weights import read_json
from minitune.checkpoint.writing import save_tensors
from minitune.config import UserError
from minitune.model.decoder import Decoder
from minitune.model.four_bits import SEARCH
from minitune.model.lora import Choice, LoraConfig, adapted, attach, detach, stack
from minitune.model.quantized import GROUPS

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BASE = "base_quantization.json"  # beside them where the base had 4 bits; PEFT warns of names in CONFIG that it lacks
PREFIX = "base_model.model."
# What PEFT can do and our decoder can't; each would change what is computed if it were passed over.
REFUSED = {
    "use_dora": "DoRA",
    "rank_pattern": "a rank for each module",
    "alpha_pattern": "an alpha for each module",
    "modules_to_save": "whole modules beside LoRA",
    "layers_to_transform": "a choice of layers",
    "layer_replication": "replicated layers",
    "lora_bias": "bias terms",
    "exclude_modules": "a list of exceptions",
    "target_parameters": "bare parameters as targets",
    "trainable_token_indices": "learned tokens",
    "alora_invocation_tokens": "an adapter that starts at a token",
    "use_qalora": "QA-LoRA",
    "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "Arrow",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
}
# These starts change the base weights too, which the folder does not hold.
CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def read_config(folder: str | Path) -> LoraConfig:
    """The adapter's settings; UserError for what is not plain LoRA."""
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise UserError(f"{folder}: no adapter there ({CONFIG} is missing)")
    raw = read_json(path)
    if raw.get("peft_type", "LORA") != "LORA":
        raise UserError(f"{path}: peft_type {raw['peft_type']} is not supported (supported: LORA)")
    for name, meaning in REFUSED.items():
        if raw.get(name):
            raise UserError(f"{path}: {name} ({meaning}) is not supported")
    start = raw.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(CHANGED_BASE):
        raise UserError(f"{path}: init_lora_weights {start!r} is not supported: it changes the base weights")
    if raw.get("bias", "none") != "none":
        raise UserError(f"{path}: bias {raw['bias']!r} is not supported (supported: none)")
    targets = raw.get("target_modules")
    if not targets:
        raise UserError(f"{path}: target_modules is missing")
    try:
        return LoraConfig(
            r=int(_number(raw, "r")),
            lora_alpha=_number(raw, "lora_alpha"),
            lora_dropout=float(raw.get("lora_dropout") or 0.0),
            target_modules=targets if isinstance(targets, str) else tuple(sorted(targets)),
            use_rslora=bool(raw.get("use_rslora")),
        )
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: {error}") from None


def base_form(group: int) -> dict[str, Any]:
    """How a base was rounded while it was loaded (`model.four_bits`), for BASE."""
    return {"bits": 4, "type": "int", "symmetric": True, "group_size": group, "scales": "bfloat16", "search": SEARCH}


def base_group(folder: str | Path) -> int:
    """The group of the 4-bit base that an adapter was trained over; 0 where it was not. UserError for another form."""
    path = Path(folder) / BASE
    if not path.is_file():
        return 0
    raw = read_json(path)
    group = raw.get("group_size")
    if group not in GROUPS or raw != base_form(group):
        raise UserError(f"{path}: the base was rounded in a form that this version does not know; update minitune")
    return int(group)


def common_group(folders: Mapping[str, str | Path]) -> int:
    """That of several adapters, by name. UserError where they have different bases."""
    groups = {name: base_group(folder) for name, folder in folders.items()}
    if len(set(groups.values())) > 1:
        kinds = ", ".join(f"{name}: {'4 bits' if group else '16 bits'}" for name, group in groups.items())
        raise UserError(f"the adapters were trained over different bases ({kinds}); serve them apart")
    return next(iter(groups.values()), 0)


def _number(raw: dict[str, Any], name: str) -> float:
    value = raw.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} is {value!r}; it takes a number")
    return value


def adapter_parameters(decoder: Decoder) -> dict[str, Tensor]:
    """{PEFT name: the rows of our stacked A or B that hold it}."""
    out: dict[str, Tensor] = {}
    for linear in adapted(decoder):
        assert linear.lora is not None
        for name, a, b, _ in linear.lora.rows():
            module = PREFIX + linear.hub_name(name)
            out[f"{module}.lora_A.weight"] = linear.lora.A[a]
            out[f"{module}.lora_B.weight"] = linear.lora.B[b]
    return out


def read_tensors(folder: str | Path) -> dict[str, Tensor]:
    """The adapter's tensors by PEFT name (.safetensors, or .bin read as weights only)."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(folder) / WEIGHTS
    old = Path(folder) / "adapter_model.bin"
    try:
        if not path.is_file() and old.is_file():
            return _read_bin(old)
        return load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged ({str(error).splitlines()[0]})") from None


def _read_bin(path: Path) -> dict[str, Tensor]:
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged or unsafe pickle
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: can't be read as plain weights ({reason[:120]})") from None
    if not isinstance(held, dict) or not all(isinstance(t, Tensor) for t in held.values()):
        raise UserError(f"{path}: holds something else than tensors by name")
    return held


def attach_saved(decoder: Decoder, folder: str | Path) -> dict[str, Tensor]:
    """Attaches an adapter of `folder`'s shape, values unset; returns the saved tensors, each of which has its place.

    The decoder may be on `meta`. UserError names the tensor that does not fit this model.
    """
    config = read_config(folder)
    try:
        attach(decoder, config)
    except ValueError as error:
        raise UserError(f"{folder}: made for another model: {error}") from None
    try:
        return _fitting(decoder, folder)
    except UserError:
        detach(decoder)
        raise


def _fitting(decoder: Decoder, folder: str | Path) -> dict[str, Tensor]:
    saved, wanted = read_tensors(folder), adapter_parameters(decoder)
    for kind, names in (
        ("is missing", wanted.keys() - saved.keys()),
        ("fits nothing here", saved.keys() - wanted.keys()),
    ):
        if names:
            raise UserError(f"{folder}: made for another model: {min(names)} {kind} ({len(names)} such tensors)")
    for name, target in wanted.items():
        if saved[name].shape != target.shape:
            raise UserError(
                f"{folder}: made for another model: {name} is {list(saved[name].shape)}, "
                f"this model needs {list(target.shape)}"
            )
    return saved


@torch.no_grad()
def load_adapter(decoder: Decoder, folder: str | Path) -> LoraConfig:
    """Attaches the adapter of `folder`; UserError names the tensor that does not fit this model."""
    saved = attach_saved(decoder, folder)
    for name, target in adapter_parameters(decoder).items():
        target.copy_(saved[name])
    assert decoder.lora_config is not None
    return decoder.lora_config


def load_stack(decoder: Decoder, folders: Sequence[str | Path]) -> Choice:
    """Attaches the adapters of all folders at once, in this order; rows choose (`lora.Choice`).

    UserError names the folder that does not fit this model.
    """
    if adapted(decoder):
        raise ValueError("the decoder carries an adapter already")
    held = []
    for folder in folders:
        load_adapter(decoder, folder)
        held.append([linear.lora for linear in decoder.linears()])
        detach(decoder)
    return stack(decoder, held)


def save_adapter(decoder: Decoder, folder: str | Path, base: str) -> None:
    """Writes the attached adapter as PEFT does (float32); `base` is what the adapter belongs to."""
    folder, config = Path(folder), decoder.lora_config
    assert config is not None, "no adapter is attached"
    folder.mkdir(parents=True, exist_ok=True)
    targets = config.target_modules
    raw: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "target_modules": targets if isinstance(targets, str) else list(targets),
        "use_rslora": config.use_rslora,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }
    tensors = {n: t.detach().to("cpu", torch.float32).contiguous() for n, t in adapter_parameters(decoder).items()}
    save_tensors(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(raw, indent=2, ensure_ascii=False), encoding="utf-8")
    if decoder.rounded:
        (folder / BASE).write_text(json.dumps(base_form(decoder.rounded), indent=2), encoding="utf-8")
