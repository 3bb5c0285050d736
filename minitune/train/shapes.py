"""A run's shape for the arithmetic of memory and time: the model's, what is attached to it, how it is computed.

Legend: H hidden, F FFN width, Q and kv the widths of queries and of keys or values.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from minitune.config import TrainConfig
from minitune.model.attention import Kernel, kernel_of
from minitune.model.decoder import DecoderConfig
from minitune.model.fused import HEADS, WIDEST, strip_width
from minitune.model.lora import LoraConfig

GROUPS = (64, 32)  # of a base that --method qlora rounds: the first that divides every row


@dataclass(frozen=True)
class Setup:
    """What of a run decides its memory beside its steps and what the planner chooses.

    method: lora, qlora or full. size: bytes a value of the computation. capability: the card's; (0, 0): a CPU. triton:
    whether kernels can run. bits: of a weight of the layers' linears. lora: the adapters; None where every parameter
    learns. alone: all of the model is in one process, without DeepSpeed: layers can be done by hand.
    """

    shape: DecoderConfig
    method: str
    size: int = 2
    capability: tuple[int, int] = (9, 0)
    triton: bool = True
    bits: float = 16.0
    lora: LoraConfig | None = None
    alone: bool = True

    @staticmethod
    def of(
        config: TrainConfig, shape: DecoderConfig, dtype: torch.dtype, capability: tuple[int, int], triton: bool,
        int4: int = 0, alone: bool = True,
    ) -> Setup:  # fmt: skip
        """int4: the group of a base that has four bits already, 0 for another."""
        size = dtype.itemsize
        if config.method == "qlora" and not int4:
            widths = (shape.hidden_size, shape.intermediate_size, shape.num_attention_heads * shape.head_dim)
            int4 = next((group for group in GROUPS if not any(width % group for width in widths)), GROUPS[-1])
        bits = 4 + 8 * size / int4 if int4 else 8.0 * size
        lora = LoraConfig(config.lora_r, target_modules=config.lora_target_modules)
        full = config.method == "full"
        return Setup(
            shape, config.method, dtype.itemsize, capability, triton, bits, None if full else lora, alone
        )  # fmt: skip

    @property
    def packed(self) -> bool:
        """Whether the layers' linears have four bits."""
        return self.bits < 8 * self.size

    @property
    def kernels(self) -> bool:
        return self.triton and self.capability >= (8, 0)

    @cached_property
    def linears(self) -> dict[str, tuple[int, dict[str, int]]]:
        """{kind: (inputs, {part: outputs})} of a layer."""
        s, kv = self.shape, self.shape.num_key_value_heads * self.shape.head_dim
        H, F, Q = s.hidden_size, s.intermediate_size, s.num_attention_heads * s.head_dim
        return {
            "attn.qkv": (H, {"self_attn.q_proj": Q, "self_attn.k_proj": kv, "self_attn.v_proj": kv}),
            "attn.o": (Q, {"self_attn.o_proj": H}),
            "mlp.gate_up": (H, {"mlp.gate_proj": F, "mlp.up_proj": F}),
            "mlp.down": (F, {"mlp.down_proj": H}),
        }

    @cached_property
    def rows_of_a(self) -> list[dict[str, int]]:
        """{kind: rows of A} of each layer."""
        out = []
        for i in range(self.shape.num_hidden_layers if self.lora else 0):
            assert self.lora is not None
            named = {k: [f"model.layers.{i}.{part}" for part in parts] for k, (_, parts) in self.linears.items()}
            out.append({k: self.lora.r * sum(map(self.lora.targets, names)) for k, names in named.items()})
        return out

    @cached_property
    def adapters(self) -> int:
        """Numbers in all A and B."""
        total = 0
        for i in range(self.shape.num_hidden_layers if self.lora else 0):
            assert self.lora is not None
            for inputs, parts in self.linears.values():
                sizes = [n for part, n in parts.items() if self.lora.targets(f"model.layers.{i}.{part}")]
                total += self.lora.r * (inputs * len(sizes) + sum(sizes))
        return total

    @cached_property
    def by_hand(self) -> bool:
        """Whether `model.fused` or `model.full` takes the layers, as `fast.why_plain` says of a loaded decoder."""
        if not (self.kernels and self.alone and self.shape.head_dim in HEADS):
            return False
        if self.lora is None:
            return not self.packed
        same = all(rows == self.rows_of_a[0] for rows in self.rows_of_a)
        return same and max(self.rows_of_a[0].values()) <= WIDEST

    @cached_property
    def strips(self) -> dict[str, int]:
        """{kind: a strip's width} where layers are done by hand."""
        if not self.by_hand or self.lora is None:
            return dict.fromkeys(self.linears, 0)
        return {kind: strip_width(rows) for kind, rows in self.rows_of_a[0].items()}

    @property
    def matrices(self) -> dict[str, int]:
        """{kind: numbers in a layer's matrix}."""
        return {kind: inputs * sum(parts.values()) for kind, (inputs, parts) in self.linears.items()}

    @property
    def head(self) -> int:
        return self.shape.vocab_size * self.shape.hidden_size

    @property
    def parameters(self) -> int:
        """Of the model, without adapters."""
        s = self.shape
        tables = self.head * (1 if s.tie_word_embeddings else 2)
        norms = (2 * s.num_hidden_layers + 1) * s.hidden_size
        return s.num_hidden_layers * sum(self.matrices.values()) + tables + norms

    def rotated(self, longest: int) -> int:
        """Values a token of q and k that autograd rotates: none where attention's own kernel does."""
        s = self.shape
        heads = 0 if self.kernel(longest) == "short" else s.num_attention_heads + s.num_key_value_heads
        return heads * s.head_dim

    def kernel(self, longest: int) -> Kernel:
        """Attention's, for documents of so many tokens."""
        dtype = {2: torch.bfloat16, 4: torch.float32}[self.size]
        return kernel_of(self.capability, self.triton, dtype, self.shape.head_dim, longest)
