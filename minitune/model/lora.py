"""Low-rank adapters (Hu et al. 2021, https://arxiv.org/abs/2106.09685) on the decoder's fused linears.

A fused linear (q|k|v, gate|up) carries one adapter a part, so that folders are exchanged with PEFT part by part:
A is stacked by rows [P·r, I], B by output rows [ΣO, r]. Parameters are float32; they are cast to the computation's
dtype in use. Legend: T tokens, I inputs, O outputs, P parts, r rank.

Dropout draws from a counter-based generator keyed by (seed, step, site, token, column): the same mask in eager,
compiled, recomputed and captured code, in any pack and on any number of processes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minitune.model.packed import multiply, packable, packed

if TYPE_CHECKING:
    from minitune.model.decoder import Decoder, Linear


@dataclass(frozen=True)
class LoraConfig:
    """`target_modules`: names (`q_proj`), or a regular expression that matches whole hub names, as in PEFT."""

    r: int = 8
    lora_alpha: float = 32
    lora_dropout: float = 0.1
    target_modules: tuple[str, ...] | str = ("q_proj", "k_proj", "v_proj", "o_proj")
    use_rslora: bool = False

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"lora_r is {self.r}; it is at least 1")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout is {self.lora_dropout}; it is at least 0 and less than 1")
        if isinstance(self.target_modules, str):
            try:
                re.compile(self.target_modules)
            except re.error as error:
                bad = f"lora_target_modules {self.target_modules!r} is no regular expression"
                raise ValueError(f"{bad}: {error}") from None

    @property
    def scale(self) -> float:
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def targets(self, hub_name: str) -> bool:
        """Whether the linear of this hub name (`model.layers.0.self_attn.q_proj`) carries an adapter."""
        if isinstance(self.target_modules, str):
            if self.target_modules == "all-linear":
                return True
            return re.fullmatch(self.target_modules, hub_name) is not None
        return any(hub_name == t or hub_name.endswith(f".{t}") for t in self.target_modules)


def mix32(x: Tensor) -> Tensor:
    """A 32-bit integer hash with full avalanche (the `lowbias32` constants of Wellons), on int32 with wrap-around."""
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * 0x7FEB352D
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * (0x846CA68B - (1 << 32))
    return x ^ ((x >> 16) & 0xFFFF)


@dataclass(frozen=True)
class Dropout:
    """This step's dropout.

    key_T: int32 hashes of (seed, step, token). threshold: int32 scalar; a draw below it is a zero. scale: 1 / (1 - p).
    Both are tensors, so that a compiler has no Python numbers to make symbolic.
    """

    key_T: Tensor
    threshold: Tensor
    scale: Tensor

    @staticmethod
    def at(seed: int, step_index: Tensor, token_uid_T: Tensor, p: float) -> Dropout:
        """`token_uid_T` int64 names each token of the data set, wherever packed; `step_index` is a device scalar."""
        low_T = mix32((token_uid_T & 0xFFFFFFFF).to(torch.int32))
        high_T = (token_uid_T >> 32).to(torch.int32)
        run = mix32(
            step_index.to(torch.int32) ^ mix32(torch.full_like(step_index, seed & 0x7FFFFFFF, dtype=torch.int32))
        )
        threshold = torch.full((), int(p * 2**32) - 2**31, dtype=torch.int32, device=run.device)
        scale = torch.full((), 1 / (1 - p), device=run.device)
        return Dropout(mix32(low_T ^ high_T ^ run), threshold, scale)

    def __call__(self, x_TI: Tensor, site: Tensor) -> Tensor:
        """`x` with a part `p` of it zero and the rest divided by 1 - p; `site` int32 names the place in the model."""
        # the site is hashed too: with `column ^ site` alone, another site has the same draws in another order
        column_I = mix32(torch.arange(x_TI.shape[-1], device=x_TI.device, dtype=torch.int32) ^ mix32(site))
        keep_TI = mix32(self.key_T[:, None] ^ column_I) >= self.threshold
        return x_TI * keep_TI.to(x_TI.dtype) * self.scale.to(x_TI.dtype)


class Lora(nn.Module):
    """The adapters of one fused linear. `parts`: (name, first row, last row + 1) of the linear's output."""

    site: Tensor

    def __init__(
        self, parts: list[tuple[str, int, int]], out_features: int, in_features: int, config: LoraConfig, site: int
    ):
        super().__init__()
        self.parts, self.out_features, self.r, self.scale = tuple(parts), out_features, config.r, config.scale
        self.A = nn.Parameter(torch.empty(len(parts) * config.r, in_features, dtype=torch.float32))
        self.B = nn.Parameter(torch.zeros(sum(e - s for _, s, e in parts), config.r, dtype=torch.float32))
        # A buffer, not a number: layers that share one compiled graph must not differ in constants.
        self.register_buffer("site", torch.tensor(site, dtype=torch.int32), persistent=False)

    def reset(self, seed: int) -> None:
        """PEFT's start: A uniform (Kaiming, a = √5), B zero; drawn on the CPU, so equal on every device."""
        bound = 1 / math.sqrt(self.A.shape[1])
        generator = torch.Generator().manual_seed((seed << 20) + int(self.site))
        values = torch.empty(self.A.shape).uniform_(-bound, bound, generator=generator)
        with torch.no_grad():
            self.A.copy_(values)
            self.B.zero_()

    def rows(self) -> list[tuple[str, slice, slice, slice]]:
        """(part name, its rows of A, its rows of B, its rows of the linear's output)."""
        out, b = [], 0
        for i, (name, start, end) in enumerate(self.parts):
            out.append((name, slice(i * self.r, (i + 1) * self.r), slice(b, b + end - start), slice(start, end)))
            b += end - start
        return out

    def delta(self) -> list[tuple[slice, Tensor]]:
        """(output rows, scale · B A in float32) of each part."""
        return [(o, self.scale * self.B.data[b] @ self.A.data[a]) for _, a, b, o in self.rows()]

    def forward(self, x_TI: Tensor, y_TO: Tensor, dropout: Dropout | None) -> Tensor:
        if dropout is not None and self.training:
            x_TI = dropout(x_TI, self.site)
        h_TR = F.linear(x_TI, self.A.to(x_TI.dtype)) * self.scale
        B = self.B.to(x_TI.dtype)
        pieces, at = [], 0
        for _, a, b, o in self.rows():
            if o.start > at:
                pieces.append(y_TO[:, at : o.start])
            pieces.append(y_TO[:, o] + F.linear(h_TR[:, a], B[b]))
            at = o.stop
        if at < self.out_features:
            pieces.append(y_TO[:, at:])
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)


def attach(model: Decoder, config: LoraConfig, seed: int = 0) -> list[nn.Parameter]:
    """Adds adapters to every targeted linear; freezes the rest. Returns what learns.

    Raises ValueError where the targets match nothing, or a name of a list matches nothing.
    """
    linears, names = model.linears(), config.target_modules
    known = [linear.hub_name(n) for linear in linears for n, _, _ in linear.parts]
    listed = () if isinstance(names, str) else names
    missing = [t for t in listed if not any(f".{n}".endswith(f".{t}") for n in known)]
    if missing:
        kinds = ", ".join(sorted({n.rpartition(".")[2] for n in known}))
        raise ValueError(f"no linear is called {', '.join(missing)} (there are {kinds})")
    if not any(map(config.targets, known)):
        raise ValueError(f"lora_target_modules {names!r} matches no linear")
    model.requires_grad_(False)
    parameters: list[nn.Parameter] = []
    for site, linear in enumerate(linears):
        linear.lora = None
        parts = [(n, s, e) for n, s, e in linear.parts if config.targets(linear.hub_name(n))]
        if not parts:
            continue
        lora = Lora(parts, linear.out_features, linear.in_features, config, site + 1)
        lora.reset(seed)
        linear.lora = lora.to(model.device)
        parameters += [linear.lora.A, linear.lora.B]
    model.lora_config = config
    return parameters


def detach(model: Decoder) -> None:
    """Takes every adapter off, unmerged."""
    for linear in model.linears():
        linear.lora = None
    model.lora_config = None


def adapted(model: Decoder) -> list[Linear]:
    """The linears that carry an adapter."""
    return [linear for linear in model.linears() if linear.lora is not None]


@torch.no_grad()
def merge(model: Decoder, keep: bool = False) -> None:
    """Adds each adapter into its weight (sum in float32, one rounding) and takes it off.

    `keep=True` keeps what `unmerge` needs: the original rows and the adapter.
    Raises ValueError for 4-bit weights, which can't hold the sum.
    """
    if any(not isinstance(linear.weight, nn.Parameter) for linear in adapted(model)):
        raise ValueError("an adapter can't be merged into 4-bit weights; serve it beside them")
    for linear in adapted(model):
        assert linear.lora is not None
        if keep:
            linear.unmerged = (linear.weight.detach().clone(), linear.lora)
        for rows, delta in linear.lora.delta():
            weight = linear.weight.data[rows]
            weight.copy_(weight.float() + delta.to(weight.device))
        linear.lora = None


@torch.no_grad()
def unmerge(model: Decoder) -> None:
    """Undoes `merge(keep=True)`, bit for bit. Raises ValueError where nothing was kept."""
    linears = [linear for linear in model.linears() if linear.unmerged is not None]
    if not linears:
        raise ValueError("nothing to unmerge: merge(keep=True) keeps the original")
    for linear in linears:
        assert linear.unmerged is not None
        weight, linear.lora = linear.unmerged
        linear.weight.data.copy_(weight)
        linear.unmerged = None


class Choice:
    """Which of several stacked adapters each row uses: their numbers, -1 for none; None where no row uses any."""

    index_T: Tensor | None = None


class LoraStack(nn.Module):
    """Several adapters of one fused linear at once, of any rank, scale and targets, each row with its own.

    All A's are stacked by rows [C, I] and all B's by columns [O, C], zero where a column has no say: two
    multiplications of static shape, between which a row keeps its own adapter's columns.
    """

    A: Tensor
    B: Tensor
    owner_C: Tensor
    scale_C: Tensor

    def __init__(self, out_features: int, loras: Sequence[Lora | None], choice: Choice, dtype: torch.dtype):
        super().__init__()
        self.choice = choice
        held = [(i, lora) for i, lora in enumerate(loras) if lora is not None]
        device = held[0][1].A.device
        A = torch.cat([lora.A.detach() for _, lora in held])
        B = torch.zeros(out_features, A.shape[0], device=device)
        at = 0
        for _, lora in held:
            for _, a, b, o in lora.rows():
                B[o, at + a.start : at + a.stop] = lora.B.detach()[b]
            at += lora.A.shape[0]
        columns = torch.tensor([lora.A.shape[0] for _, lora in held], device=device)
        order = packed if packable(device, dtype) else Tensor.contiguous
        owner_C = torch.tensor([i for i, _ in held], device=device).repeat_interleave(columns)
        scale_C = torch.tensor([lora.scale for _, lora in held], device=device).repeat_interleave(columns)
        tensors = {"A": order(A.to(dtype)), "B": order(B.to(dtype)), "owner_C": owner_C, "scale_C": scale_C}
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, x_TI: Tensor, y_TO: Tensor, dropout: Dropout | None = None) -> Tensor:
        index_T = self.choice.index_T
        if index_T is None:
            return y_TO
        h_TC = multiply(x_TI, self.A) * self.scale_C.to(x_TI.dtype)
        # not a product with 0 and 1: another adapter's value may be infinite in float16
        return y_TO + multiply(torch.where(self.owner_C == index_T[:, None], h_TC, 0), self.B)


def stack(model: Decoder, adapters: Sequence[Sequence[Lora | None]]) -> Choice:
    """Puts adapters, each the `lora` of every linear in order, onto the decoder at once; says which rows use which."""
    choice = Choice()
    for linear, loras in zip(model.linears(), zip(*adapters, strict=True), strict=True):
        rows = sum(end - start for _, start, end in linear.parts)
        linear.lora = LoraStack(rows, loras, choice, model.dtype) if any(x is not None for x in loras) else None  # type: ignore[assignment]
    return choice
