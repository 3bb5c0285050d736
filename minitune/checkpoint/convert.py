"""A base's config.json in the words of another architecture that is the same graph.

MiniCPM, Llama and Granite differ in four scalars (`model.decoder`), so a MiniCPM is written as a Granite,
which stock `transformers` and vLLM open without remote code, and a Granite or Llama as a MiniCPM.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from minitune.config import UserError
from minitune.model.decoder import DecoderConfig

MODEL_TYPES = {"LlamaForCausalLM": "llama", "GraniteForCausalLM": "granite", "MiniCPMForCausalLM": "minicpm"}
# Kept where the architecture changes; where it stays, everything is kept but what is dropped.
CARRIED = ("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "use_cache")
DROPPED = (
    "auto_map",
    "_name_or_path",
    "quantization_config",
    "transformers_version",
    "torch_dtype",
    "dtype",
    "rope_parameters",
)
SHAPE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
)
MEND = "MiniCPM's layout can't hold it; use --format hf"


def hub_config(
    source: dict[str, Any], config: DecoderConfig, format: str, dtype: str, tokenizer: Any = None
) -> dict[str, Any]:
    """The exported config.json. `source`: the base's own; `config`: the same as our decoder reads it.

    Raises UserError for what MiniCPM's layout can't hold.
    """
    scalars = (config.embedding_multiplier, config.residual_multiplier, config.logits_scaling)
    family = config.family
    if format == "minicpm":
        family = "MiniCPMForCausalLM"
    elif family == "MiniCPMForCausalLM":
        family = "LlamaForCausalLM" if scalars == (1.0, 1.0, 1.0) else "GraniteForCausalLM"
    same = family == config.family
    out = {k: v for k, v in source.items() if k not in DROPPED and (same or k in CARRIED)}
    out |= {"architectures": [family], "model_type": MODEL_TYPES[family]}
    out |= {name: getattr(config, name) for name in SHAPE}
    out |= {"hidden_act": "silu", "torch_dtype": dtype, "dtype": dtype}  # transformers 4's name and 5's
    if format == "minicpm":
        if not _usual_heads(config):
            raise UserError(f"head_dim {config.head_dim} is not hidden_size / heads: {MEND}")
        if not same:
            out |= _minicpm_scalars(config)
        out |= _minicpm_rope(config, source if same else {"rope_parameters": None})
    else:
        out |= {"attention_bias": False, "mlp_bias": False} | _hf_rope(config)
        if not _usual_heads(config):
            out["head_dim"] = config.head_dim
        if family == "GraniteForCausalLM":
            out["embedding_multiplier"], out["residual_multiplier"], out["logits_scaling"] = scalars
            out["attention_multiplier"] = config.attention_scale
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if out.get(name) is None and getattr(tokenizer, name, None) is not None:
            out[name] = getattr(tokenizer, name)
    return out


def _usual_heads(config: DecoderConfig) -> bool:
    return config.head_dim * config.num_attention_heads == config.hidden_size


def _hf_rope(config: DecoderConfig) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` of transformers 4, and 5's `rope_parameters`, which hold the same."""
    rope, theta = config.rope(), {"rope_theta": config.rope_theta}
    out: dict[str, Any] = {**theta, "rope_scaling": None}
    if config.rope_scaling:
        scaling = {"rope_type": rope.kind} | {k: v for k, v in config.rope_scaling.items() if "type" not in k}
        if rope.kind == "longrope":
            # transformers 4 reads the trained length at the top only, and would derive the factor from it
            out["original_max_position_embeddings"] = rope.original_max
            scaling["original_max_position_embeddings"] = rope.original_max
            scaling["attention_factor"] = rope.amplitude
        out["rope_scaling"] = scaling
    out["rope_parameters"] = {"rope_type": "default"} | (out["rope_scaling"] or {}) | theta
    return out


def _minicpm_rope(config: DecoderConfig, source: dict[str, Any]) -> dict[str, Any]:
    """The official classes read `rope_theta` and `rope_scaling`; a MiniCPM's own spelling of it is kept."""
    rope, given = config.rope(), config.rope_scaling
    if "rope_parameters" not in source:
        return {"rope_theta": config.rope_theta, "rope_scaling": source.get("rope_scaling")}
    scaling: dict[str, Any] | None = None
    if given and rope.kind in ("linear", "dynamic"):
        scaling = {"type": rope.kind, "factor": given["factor"]}
    elif given and rope.kind == "longrope":
        ratio = config.max_position_embeddings / rope.original_max
        official = math.sqrt(1 + math.log(ratio) / math.log(rope.original_max)) if ratio > 1 else 1.0
        if not math.isclose(official, rope.amplitude, rel_tol=1e-6):
            raise UserError(f"LongRoPE's attention_factor is {rope.amplitude:g}, not {official:g}: {MEND}")
        factors = {k: given[k] for k in ("short_factor", "long_factor")}
        scaling = {"rope_type": "longrope", **factors, "original_max_position_embeddings": rope.original_max}
    elif given:
        raise UserError(f"rope_scaling is {rope.kind}: {MEND}")
    return {"rope_theta": config.rope_theta, "rope_scaling": scaling}


def _minicpm_scalars(config: DecoderConfig) -> dict[str, float | int]:
    """scale_emb, scale_depth = residual_multiplier · √layers, dim_model_base = hidden / logits_scaling."""
    if not math.isclose(config.attention_scale, config.head_dim**-0.5, rel_tol=1e-6):
        raise UserError(f"attention_multiplier {config.attention_scale:g} is not 1/√head_dim: {MEND}")
    embed, residual, logits = config.embedding_multiplier, config.residual_multiplier, config.logits_scaling
    depth, width = math.sqrt(config.num_hidden_layers), config.hidden_size
    return {
        "scale_emb": _tidy(embed, lambda x: x, embed),
        "scale_depth": _tidy(residual * depth, lambda x: x / depth, residual),
        "dim_model_base": _tidy(width / logits, lambda x: width / x, logits),
    }


def _tidy(value: float, back: Callable[[float], float], wanted: float) -> float | int:
    """`value` without its last digits' noise where `back` gives `wanted` all the same; whole as an int."""
    short = float(f"{value:.12g}")
    value = short if back(short) == wanted else value
    return int(value) if value == int(value) else value
