"""What a step holds beyond the weights: against a card's figures, and against what autograd and `model.fused` keep."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_graph import decoder_on
from test_plain_captured import CARD, card_of
from torch import Tensor

from minitune.config import TrainConfig
from minitune.data.store import EncodedRows
from minitune.data.template import Encoded
from minitune.model import kernels
from minitune.model.attention import PackedLayout
from minitune.model.decoder import Decoder, DecoderConfig
from minitune.model.lora import Dropout, LoraConfig, attach
from minitune.train import full, memory
from minitune.train.prepare import wants_recompute

GIB = 2**30


def minicpm_2b(monkeypatch: pytest.MonkeyPatch, lora: bool = True) -> Decoder:
    """Its shape without numbers, on what says that it is an H100."""
    config = DecoderConfig(122753, 2304, 5760, 40, 36, 36, 64)
    with torch.device("meta"):
        decoder = Decoder(config)
    decoder.allocate(torch.device("meta"), torch.bfloat16)
    if lora:
        attach(decoder, LoraConfig())
    else:
        decoder.requires_grad_(True)
    monkeypatch.setattr(kernels, "AVAILABLE", True)
    monkeypatch.setattr(Decoder, "device", property(lambda self: CARD))
    card_of(monkeypatch, 9, 0)
    return decoder


@pytest.mark.parametrize(
    ("tokens", "recompute", "measured"),
    [(896, False, 7.36), (8192, False, 23.41), (16384, False, 40.76), (896, True, 5.64), (8192, True, 7.71)],
)
def test_the_figures_of_a_card(monkeypatch: pytest.MonkeyPatch, tokens: int, recompute: bool, measured: float) -> None:
    """Reserved GiB of bench/RESULTS.md (H100, 2026-11-28, fused and recomputed), within a twentieth."""
    decoder = minicpm_2b(monkeypatch)
    weights = sum(p.numel() * p.element_size() for p in decoder.parameters())
    needed = weights + memory.beyond_weights(decoder, tokens, "short", by_hand=True, recompute=recompute)
    assert needed / GIB == pytest.approx(measured, rel=0.05)


def storages(tensors: list[Tensor], tokens: int) -> int:
    """Bytes of the memory behind these tensors, each once; a mask of all pairs apart."""
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.shape[-1:] != (tokens,)}
    return sum(found.values())


def tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for v in value for t in tensors_in(v)] if isinstance(value, tuple) else []


@pytest.mark.parametrize("kind", ["lora", "all-linear", "full", "by hand", "by hand, recomputed", "full by hand"])
def test_what_a_layer_keeps(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes a token and layer, by the difference of two lengths: of the tensors that autograd saves, and of those that
    `model.fused` does."""
    decoder = decoder_on("cpu", torch.bfloat16)
    by_hand = "by hand" in kind
    if kind == "all-linear":
        attach(decoder, LoraConfig(4, target_modules="all-linear"))
    if kind.startswith("full"):
        for linear in decoder.linears():
            linear.lora = None
        decoder.lora_config = None
        decoder.requires_grad_(True)
    stack: Any = None
    if by_hand:
        pytest.importorskip("triton", reason="Triton is not installed (pip install triton runs this)")
        from minitune.model.full import FullStack
        from minitune.model.fused import FusedStack
        from minitune.model.fused_compile import Nowhere

        if kind == "full by hand":
            stack = FullStack(decoder.to(torch.float16), len(decoder.layers))
        else:
            decoder = decoder_on("cpu", torch.float16)
            decoder.stack = stack = FusedStack(decoder, keep=kind == "by hand")

    def kept(tokens: int) -> int:
        ids, positions = torch.zeros(tokens, dtype=torch.int64), torch.arange(tokens)
        cu_seqlens = torch.tensor([0, tokens], dtype=torch.int32)
        layout = PackedLayout(cu_seqlens, tokens, (tokens,), "short" if by_hand else "masked")
        dropout = None if kind == "full" else Dropout.at(0, torch.zeros((), dtype=torch.int64), positions, 0.1)
        held: list[Tensor] = []
        if by_hand:
            inner = type(stack).layer_forward

            def forward(i: int, *args: Any) -> Any:
                out = inner(stack, i, *args)
                held.extend(tensors_in(out[-1]))
                return out

            monkeypatch.setattr(stack, "layer_forward", forward)
            if kind == "full by hand":
                sink, share = Nowhere(False), torch.ones(())
                stack.learn(ids, positions, layout, ids[:4], ids[:4], share, sink, 4)
            else:
                decoder.hidden(ids, positions, layout, dropout)
        else:
            with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t.detach()) or t, lambda t: t):
                decoder.hidden(ids, positions, layout, dropout)
        return storages(held, tokens)

    slope = (kept(96) - kept(32)) / 64
    layers = len(decoder.layers)
    if kind == "by hand, recomputed":
        # inputs and the strips of q|k|v and o; the last layer whole
        want: float = (layers - 1) * (decoder.config.hidden_size + 2 * 64) * 2
        want += memory.layer_bytes(decoder, layers - 1, "short", by_hand)
    else:
        want = sum(memory.layer_bytes(decoder, i, "short" if by_hand else "masked", by_hand) for i in range(layers))
    assert slope == pytest.approx(want, rel=0.01 if by_hand else 0.1)


@pytest.mark.parametrize(
    ("free", "settings", "want"),
    [
        (70, {}, False),
        (6, {}, False),
        (3, {}, True),
        (3, {"tokens_per_pack": 256}, False),
        (3, {"gradient_checkpointing": "false"}, False),
        (70, {"tokens_per_step": 30_000, "tokens_per_pack": 30_000}, True),
        (70, {"gradient_checkpointing": "true"}, True),
    ],
)
def test_when_layers_are_recomputed(
    monkeypatch: pytest.MonkeyPatch, free: float, settings: dict[str, Any], want: bool
) -> None:
    """By the card's free memory, the longest rows that a step may hold and the pack's limit."""
    decoder = minicpm_2b(monkeypatch)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free * GIB, 80 * GIB))
    rows = EncodedRows.of([Encoded([5] * n, [5] * n) for n in [56] * 99 + [200]])
    assert wants_recompute(TrainConfig(**settings), decoder, rows) == want


@pytest.mark.parametrize(
    ("free", "settings", "want"),
    [
        (72, {}, ("adamw", 40)),  # 20 bytes a parameter less the 2 that are there: some 46 GiB
        (52, {}, ("adamw", 11)),
        (17, {}, ("adamw_8bit", 40)),
        (12.6, {}, ("adamw_8bit", 10)),
        (8, {}, ("adamw_8bit_in_backward", 28)),
        (3, {}, ("adamw_8bit_in_backward", 1)),  # it will end in a line about memory
        (72, {"optim": "adamw_8bit_in_backward", "gradient_checkpointing": "true"}, ("adamw_8bit_in_backward", 1)),
        (17, {"gradient_checkpointing": "false"}, ("adamw_8bit", 40)),
        (8, {"tokens_per_pack": 512}, ("adamw_8bit", 1)),  # a step of several packs is not taken inside backward
    ],
)
def test_what_a_full_run_takes(
    monkeypatch: pytest.MonkeyPatch, free: float, settings: dict[str, Any], want: tuple[str, int]
) -> None:
    """The first optimizer that fits, and about as many whole layers as fit with it."""
    decoder = minicpm_2b(monkeypatch, lora=False)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free * GIB, 80 * GIB))
    rows = EncodedRows.of([Encoded([5] * n, [-100] * (n // 2) + [5] * (n - n // 2)) for n in [56] * 99 + [200]])
    config = TrainConfig(method="full", **settings)
    name, whole = full.choose(config, decoder, full.load_of(config, rows))
    assert name == want[0] and abs(whole - want[1]) <= 1
