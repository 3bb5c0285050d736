"""Forms of a 4-bit weight, compared by what they do to a model: smollm2's layers rounded, embedding and head not.

    python bench/four_bits.py [--rows 64] [--data FILE] [--forms nf4dq,int4-64,...]

Reported for each form: bits a weight, the relative error of the weights, of the logits, the mean KL divergence from the
float32 model's next-token distribution (nats), and the loss over the answers. smollm2 itself was stored in 4 bits
(GGUF's Q4_1: groups of 32 on an even grid), which favours even grids. So all is measured twice: as it is, and with the
hidden state turned by a random orthogonal matrix, which leaves the model's outputs as they were and its weights on no
grid.

nf4dq      NF4 with double quantisation (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314): blocks of 64, the
           largest absolute value in 8 bits (e4m3, of blocks of 256, their mean taken off)
nf4-64     its levels, a bfloat16 scale a group of 64 that is searched as ours is
int4-G     ours: symmetric, groups of G, a bfloat16 scale of least error (`quantized.quantize`, as export has it)
nearest-G  ours, as `--method qlora` loads: the same search in whole numbers (`four_bits.nearest`)
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from minitune.checkpoint.embedded import embedded_default
from minitune.checkpoint.tokenizer import load_tokenizer
from minitune.checkpoint.weights import load_decoder
from minitune.config import TemplateConfig
from minitune.data import dataset
from minitune.data.template import Template
from minitune.model import four_bits, quantized
from minitune.model.decoder import Decoder

DATA = Path(__file__).parents[2] / "shared" / "data" / "huanhuan.json"
# The quantiles of a normal distribution, zero among them (the paper's appendix E).
NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip


def nearest_level(u: Tensor) -> Tensor:
    return NF4[torch.bucketize(u, (NF4[1:] + NF4[:-1]) / 2)]


def nf4dq(w: Tensor) -> Tensor:
    groups = w.reshape(-1, 64)
    top = groups.abs().amax(-1)
    mean = top.mean()
    rest = (top - mean).split(256)
    stored = []
    for block in rest:
        reach = block.abs().max().clamp(min=1e-12)
        stored.append((block / reach * 448).to(torch.float8_e4m3fn).float() * reach / 448)
    scale = (torch.cat(stored) + mean)[:, None]
    return (nearest_level(groups / top[:, None].clamp(min=1e-12)) * scale).view_as(w)


def nf4_searched(w: Tensor) -> Tensor:
    groups = w.reshape(-1, 64)
    top = groups.abs().amax(-1, keepdim=True)
    best, out = torch.full_like(top, torch.inf), torch.empty_like(groups)
    for i in range(32):
        scale = (top * (0.6 + 0.45 * i / 31)).bfloat16().float().clamp(min=1e-12)
        made = nearest_level((groups / scale).clamp(-1, 1)) * scale
        error = (made - groups).square().sum(-1, keepdim=True)
        out, best = torch.where(error < best, made, out), torch.minimum(best, error)
    return out.view_as(w)


def ours(group: int) -> Callable[[Tensor], Tensor]:
    def form(w: Tensor) -> Tensor:
        packed, scale = quantized.quantize(w.reshape(-1, group), group, torch.bfloat16)
        return quantized.dequantize(packed, scale, torch.float32).view_as(w)

    return form


def exact(group: int) -> Callable[[Tensor], Tensor]:
    def form(w: Tensor) -> Tensor:
        packed, scale = four_bits.nearest(w.reshape(-1, group), group)
        return quantized.dequantize(packed, scale, torch.float32).view_as(w)

    return form


FORMS: dict[str, tuple[float, Callable[[Tensor], Tensor]]] = {
    "nf4dq": (4 + 8 / 64 + 32 / 64 / 256, nf4dq),
    "nf4-64": (4.25, nf4_searched),
    **{f"int4-{g}": (4 + 16 / g, ours(g)) for g in (32, 64, 128)},
    **{f"nearest-{g}": (4 + 16 / g, exact(g)) for g in (32, 64, 128)},
}


@torch.no_grad()
def turned(decoder: Decoder) -> Decoder:
    """The same outputs with the hidden state in another basis: norms' weights go into what follows them."""
    decoder = copy.deepcopy(decoder)
    size = decoder.config.hidden_size
    Q = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(0)))[0]
    head = nn.Linear(size, decoder.config.vocab_size, bias=False)
    head.weight.data = decoder.head_weight * decoder.norm.weight @ Q
    decoder.lm_head = head  # type: ignore[assignment]
    decoder.embed.weight.data = decoder.embed.weight @ Q
    decoder.norm.weight.data.fill_(1)
    for layer in decoder.layers:
        for norm, linear in ((layer.attn_norm, layer.attn.qkv), (layer.mlp_norm, layer.mlp.gate_up)):
            linear.weight.data = linear.weight * norm.weight @ Q
            norm.weight.data.fill_(1)
        for linear in (layer.attn.o, layer.mlp.down):
            linear.weight.data = Q.T @ linear.weight
    return decoder


@torch.no_grad()
def answers(decoder: Decoder, rows: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Log-probabilities [P, V] where an answer's tokens are told, of each row."""
    return [decoder.logits(ids[None])[0, :-1][labels[1:] >= 0].float().log_softmax(-1) for ids, labels in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=str(DATA))
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--forms", default=",".join(FORMS))
    arguments = parser.parse_args()
    base = embedded_default()
    found = dataset.load(arguments.data, Template(load_tokenizer(base), TemplateConfig("minicpm")), 512).rows
    rows = [(torch.tensor(r.input_ids), torch.tensor(r.labels)) for r in found[: arguments.rows]]
    targets = torch.cat([labels[1:][labels[1:] >= 0] for _, labels in rows])
    decoder = load_decoder(base, "float32", "cpu")
    print(f"{len(rows)} rows, {len(targets)} tokens of answers")
    print("basis    form         bits   weights   logits      KL     loss   change")
    for basis, model in (("as is", decoder), ("turned", turned(decoder))):
        before = torch.cat(answers(model, rows))
        loss = float(-before.gather(1, targets[:, None]).mean())
        print(f"{basis:8} float32     32.00{'':26} {loss:8.4f}", flush=True)
        weights = [linear.weight.detach().clone() for linear in model.linears()]
        for name in arguments.forms.split(","):
            bits, form = FORMS[name]
            off = whole = 0.0
            for linear, w in zip(model.linears(), weights, strict=True):
                linear.weight.data = form(w)
                off, whole = off + float((linear.weight - w).square().sum()), whole + float(w.square().sum())
            after = torch.cat(answers(model, rows))
            spread = before - before.mean(-1, keepdim=True)
            error = (after - after.mean(-1, keepdim=True) - spread).norm() / spread.norm()
            kl = float((before.exp() * (before - after)).sum(-1).mean())
            now = float(-after.gather(1, targets[:, None]).mean())
            line = f"{basis:8} {name:11} {bits:5.2f}  {(off / whole) ** 0.5:8.4f} {error:8.4f} {kl:8.4f}"
            print(f"{line} {now:8.4f} {now - loss:+8.4f}", flush=True)
        for linear, w in zip(model.linears(), weights, strict=True):
            linear.weight.data = w


if __name__ == "__main__":
    main()
