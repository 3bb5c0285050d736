"""The one decoder: MiniCPM, Llama and Granite are this graph and differ in four scalars.

Legend: T packed tokens, B batch, L length, H hidden, N query heads, K key/value heads, D head width, F FFN width,
V vocabulary. Parameters are fused where they share an input: q|k|v and gate|up.

    x = embed(ids) · embedding_multiplier
    x = x + attention(norm(x)) · residual_multiplier          (each layer)
    x = x + mlp(norm(x)) · residual_multiplier
    logits = head(norm(x) / logits_scaling)

MiniCPM (https://arxiv.org/abs/2404.06395): scale_emb, scale_depth/√layers, hidden/dim_model_base.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minitune.model.attention import PackedLayout
from minitune.model.lora import Dropout, Lora, LoraConfig
from minitune.model.packed import multiply
from minitune.model.rope import Rope, rotate
from minitune.model.rope_attention import rope_attention

SUPPORTED = ("MiniCPMForCausalLM", "LlamaForCausalLM", "GraniteForCausalLM")


@dataclass(frozen=True)
class DecoderConfig:
    """Shapes and scalars. `family` is the hub architecture that the checkpoint came in."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 4096
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = True
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    attention_multiplier: float = 0.0  # 0: 1/√head_dim
    logits_scaling: float = 1.0
    family: str = "LlamaForCausalLM"

    @property
    def attention_scale(self) -> float:
        return self.attention_multiplier or 1 / math.sqrt(self.head_dim)

    @staticmethod
    def from_hub(hub: dict[str, Any]) -> DecoderConfig:
        """From a hub `config.json`. Raises ValueError in one line for what is not this graph."""
        family = (hub.get("architectures") or ["?"])[0]
        if family not in SUPPORTED:
            raise ValueError(f"architecture {family} is not supported (supported: {', '.join(SUPPORTED)})")
        if hub.get("num_experts") or hub.get("num_local_experts"):
            raise ValueError("a mixture of experts is not supported (supported: dense MiniCPM, Llama, Granite)")
        for name in ("attention_bias", "mlp_bias"):
            if hub.get(name):
                raise ValueError(f"{name} is not supported")
        if hub.get("hidden_act", "silu") not in ("silu", "swish"):
            raise ValueError(f"hidden_act {hub['hidden_act']!r} is not supported (supported: silu)")
        try:
            hidden, heads, layers = hub["hidden_size"], hub["num_attention_heads"], hub["num_hidden_layers"]
            sizes = {n: hub[n] for n in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
        except KeyError as missing:
            raise ValueError(f"{missing.args[0]} is missing") from None
        rope = dict(hub.get("rope_parameters") or hub.get("rope_scaling") or {})  # transformers 5 | 4
        theta = rope.pop("rope_theta", None) or hub.get("rope_theta") or 10000.0
        plain_rope = rope.get("rope_type", rope.get("type", "default")) == "default"
        scalars: dict[str, Any] = {}
        if family == "MiniCPMForCausalLM":  # absent keys mean the published class's defaults, which are 1
            scalars = {
                "embedding_multiplier": float(hub.get("scale_emb", 1)),
                "residual_multiplier": hub.get("scale_depth", 1) / math.sqrt(layers),
                "logits_scaling": hidden / hub.get("dim_model_base", 1),
            }
        elif family == "GraniteForCausalLM":
            names = ("embedding_multiplier", "residual_multiplier", "logits_scaling", "attention_multiplier")
            scalars = {n: float(hub.get(n, 1.0)) for n in names}
        config = DecoderConfig(
            **sizes,
            num_attention_heads=heads,
            num_key_value_heads=hub.get("num_key_value_heads") or heads,
            head_dim=hub.get("head_dim") or hidden // heads,
            max_position_embeddings=hub.get("max_position_embeddings") or 4096,
            rope_theta=float(theta),
            rope_scaling=None if plain_rope else rope,
            rms_norm_eps=float(hub.get("rms_norm_eps", 1e-6)),
            tie_word_embeddings=bool(hub.get("tie_word_embeddings", family == "MiniCPMForCausalLM")),
            family=family,
            **scalars,
        )
        config.rope()  # a rope scaling that is not supported is refused here
        return config

    def rope(self) -> Rope:
        """The rotary embedding of this shape."""
        return Rope(self.head_dim, self.rope_theta, self.max_position_embeddings, self.rope_scaling)

    def untied(self) -> DecoderConfig:
        """The same with a head of its own."""
        return replace(self, tie_word_embeddings=False)


class _Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        """Stays empty, as every parameter here: on `meta`, torch's own values would cost the import of its compiler."""


class _Head(nn.Linear):
    def reset_parameters(self) -> None:
        """As above."""


class Linear(nn.Module):
    """A bias-free linear whose output rows are one or more named parts; carries their adapters."""

    def __init__(self, in_features: int, parts: dict[str, int], prefix: str):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(sum(parts.values()), in_features))
        self.in_features, self.out_features = in_features, sum(parts.values())
        self.prefix = prefix
        self.parts: list[tuple[str, int, int]] = []
        for name, rows in parts.items():
            start = self.parts[-1][2] if self.parts else 0
            self.parts.append((name, start, start + rows))
        self.lora: Lora | None = None
        self.unmerged: tuple[Tensor, Lora] | None = None

    def hub_name(self, part: str) -> str:
        return f"{self.prefix}.{part}"

    def forward(self, x_TI: Tensor, dropout: Dropout | None = None) -> Tensor:
        y_TO = multiply(x_TI, self.weight)
        return y_TO if self.lora is None else self.lora(x_TI, y_TO, dropout)


class RMSNorm(nn.Module):
    """x / rms(x) · weight (Zhang & Sennrich 2019), normalised in float32."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x_TH: Tensor) -> Tensor:
        wide = x_TH.float()
        scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return scaled.to(x_TH.dtype) * self.weight.to(x_TH.dtype)


class Attention(nn.Module):
    def __init__(self, config: DecoderConfig, prefix: str):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.scale = config.attention_scale
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.qkv = Linear(config.hidden_size, {"q_proj": q, "k_proj": kv, "v_proj": kv}, prefix)
        self.o = Linear(q, {"o_proj": config.hidden_size}, prefix)

    def forward(self, x_TH: Tensor, cos: Tensor, sin: Tensor, layout: Any, dropout: Dropout | None) -> Tensor:
        qkv_TX = self.qkv(x_TH, dropout)
        if layout.kernel == "short":
            y_TX, _ = rope_attention(
                qkv_TX, cos[:, 0], sin[:, 0], layout.cu_seqlens, self.heads, self.kv_heads, self.scale
            )
            return self.o(y_TX, dropout)
        heads = (self.heads, self.kv_heads, self.kv_heads)
        q, k, v = qkv_TX.view(-1, sum(heads), self.head_dim).split(heads, dim=1)
        y_TND = layout.attend(rotate(q, cos, sin), rotate(k, cos, sin), v, self.scale)
        return self.o(y_TND.reshape(x_TH.shape[0], -1), dropout)


class MLP(nn.Module):
    def __init__(self, config: DecoderConfig, prefix: str):
        super().__init__()
        width = config.intermediate_size
        self.gate_up = Linear(config.hidden_size, {"gate_proj": width, "up_proj": width}, prefix)
        self.down = Linear(width, {"down_proj": config.hidden_size}, prefix)

    def forward(self, x_TH: Tensor, dropout: Dropout | None) -> Tensor:
        gate, up = self.gate_up(x_TH, dropout).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up, dropout)


class Layer(nn.Module):
    def __init__(self, config: DecoderConfig, index: int):
        super().__init__()
        prefix = f"model.layers.{index}"
        self.residual_multiplier = config.residual_multiplier
        self.attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = Attention(config, f"{prefix}.self_attn")
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config, f"{prefix}.mlp")

    def forward(self, x_TH: Tensor, cos: Tensor, sin: Tensor, layout: Any, dropout: Dropout | None) -> Tensor:
        y_TH = self.attn(self.attn_norm(x_TH), cos, sin, layout, dropout)
        x_TH = x_TH + y_TH * self.residual_multiplier
        return x_TH + self.mlp(self.mlp_norm(x_TH), dropout) * self.residual_multiplier


class Decoder(nn.Module):
    """The model. Built empty; `checkpoint.weights.load_model` fills it.

    `layer_forward(layer, x_TH, cos, sin, layout, dropout)` runs one layer: replaced by a recomputing
    version where the training step asks for it; `stack(x_TH, cos, sin, layout, dropout)`, where there is
    one, runs all of them (`model.fused`). `strips`: see `widen`. `rounded`: the group in which a base of 16 bits was
    rounded to 4 (`model.four_bits`), 0 where it was not.
    """

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.lora_config: LoraConfig | None = None
        self.embed = _Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = None if config.tie_word_embeddings else _Head(config.hidden_size, config.vocab_size, bias=False)
        self.rope = config.rope()
        self.layer_forward = Layer.__call__
        self.stack: Any = None
        self.strips: dict[str, Tensor] = {}
        self.padding = self.rounded = 0
        self.head_packed: Tensor | None = None  # model.packed

    def allocate(self, device: torch.device, dtype: torch.dtype, strips: dict[str, int] | None = None) -> Decoder:
        """Empty parameters of a decoder built on `meta`. `strips`: the kinds of linears to `widen`, by how much.

        On a card, zero rows up to a multiple of 64 lie behind the head in memory (`padding`): logits of a vocabulary
        of odd size (122753) would keep the matrix units off, since their rows begin at odd addresses.
        """
        owner = self.embed if self.lm_head is None else self.lm_head
        rows = self.config.vocab_size
        self.padding = -rows % 64 if device.type == "cuda" else 0
        owner.weight = nn.Parameter(owner.weight.new_empty(rows + self.padding, self.config.hidden_size))
        self.to(dtype)
        for kind, width in (strips or {}).items():
            self._room(kind, width, device)
        # not to_empty: its empty_like of a tensor on meta imports torch's compiler
        self._apply(lambda t: torch.empty(t.shape, dtype=t.dtype, device=device))
        for kind in strips or {}:
            self._show(kind)
        owner.weight = nn.Parameter(owner.weight.data[:rows].requires_grad_(False))
        if self.padding:
            owner.weight.data.as_strided(
                (self.padding, self.config.hidden_size), owner.weight.stride(), rows * self.config.hidden_size
            ).zero_()
        return self.requires_grad_(False)

    def of_kind(self, kind: str) -> list[Linear]:
        """Every layer's linear of a kind: attn.qkv, attn.o, mlp.gate_up or mlp.down."""
        room, _, name = kind.partition(".")
        return [getattr(getattr(layer, room), name) for layer in self.layers]

    def widen(self, kind: str, width: int) -> None:
        """Lays the weights of a kind into one tensor [layers, O, I + width], `strips[kind]`, each a view of it; the
        strips are zero, and may hold an adapter's B (`model.fused`)."""
        weights = [linear.weight.data for linear in self.of_kind(kind)]
        self._room(kind, width, weights[0].device)
        for weight, place in zip(weights, self.strips[kind], strict=True):
            place[:, : weight.shape[1]] = weight
        self._show(kind)

    def _room(self, kind: str, width: int, device: torch.device) -> None:
        """The tensor alone; the weights are given up."""
        linears = self.of_kind(kind)
        rows, dtype = linears[0].weight.shape[0], linears[0].weight.dtype
        shape = (len(linears), rows, linears[0].in_features + width)
        self.strips[kind] = torch.zeros(shape, dtype=dtype, device=device)
        for linear in linears:
            linear.weight = nn.Parameter(linear.weight.new_empty(0), requires_grad=False)

    def _show(self, kind: str) -> None:
        for linear, place in zip(self.of_kind(kind), self.strips[kind], strict=True):
            linear.weight = nn.Parameter(place[:, : linear.in_features], requires_grad=False)

    @property
    def head_weight(self) -> Tensor:
        """[V, H]: the embedding where it is tied."""
        return self.embed.weight if self.lm_head is None else self.lm_head.weight

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.weight.dtype

    def linears(self) -> list[Linear]:
        """The layers' linears, in order."""
        return [m for layer in self.layers for m in layer.modules() if isinstance(m, Linear)]

    def hidden(
        self, input_ids_T: Tensor, position_ids_T: Tensor, layout: Any, dropout: Dropout | None = None
    ) -> Tensor:
        """The final hidden state [T, H], normed and scaled: what the head multiplies.

        `layout` says how tokens attend: `attention.PackedLayout`, or `cache`'s layouts while decoding.
        """
        length_T = layout.length_T(input_ids_T.shape[0]) if self.rope.needs_length else None
        cos, sin = self.rope(position_ids_T, length_T)
        x_TH = self.embed(input_ids_T) * self.config.embedding_multiplier
        if self.stack is not None:
            return self.norm(self.stack(x_TH, cos, sin, layout, dropout)) / self.config.logits_scaling
        for i, layer in enumerate(self.layers):
            x_TH = self.layer_forward(layer, x_TH, cos, sin, layout.for_layer(i), dropout)
        return self.norm(x_TH) / self.config.logits_scaling

    def head(self, h_TH: Tensor) -> Tensor:
        """Logits [T, V] of hidden states."""
        return multiply(h_TH, self.head_weight if self.head_packed is None else self.head_packed)

    def logits(self, input_ids_BL: Tensor) -> Tensor:
        """[batch, length] int64 -> [batch, length, vocab]; each row is a document of its own."""
        batch, length = input_ids_BL.shape
        layout = PackedLayout.of([length] * batch, self.device, self.dtype)
        position_ids = torch.arange(length, device=self.device).repeat(batch)
        ids_T = input_ids_BL.reshape(-1).to(self.device)
        return self.head(self.hidden(ids_T, position_ids, layout)).view(batch, length, -1)

    def forward(self, input_ids_BL: Tensor) -> Tensor:
        """As `logits`."""
        return self.logits(input_ids_BL)
