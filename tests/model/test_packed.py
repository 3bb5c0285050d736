"""Invariant 2: a document in a pack gives the logits and the gradients that it gives by itself, dropout included."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor
from twins import assert_close, hub_twin, rows

from minitune.checkpoint.weights import load_decoder
from minitune.data.loader import Pack, make_pack
from minitune.data.template import Encoded
from minitune.model.attention import PackedLayout
from minitune.model.decoder import Decoder
from minitune.model.lora import Dropout, LoraConfig, adapted, attach
from minitune.train.loss import cross_entropy_sum

LENGTHS = [5, 40, 1, 23, 2]


def run(decoder: Decoder, pack: Pack, kernel: str, p: float) -> tuple[Tensor, Tensor]:
    """(summed loss, logits [T, V]) of a pack with this step's dropout."""
    plain = PackedLayout.of(list(pack.lengths), decoder.device, decoder.dtype)
    layout = PackedLayout(plain.cu_seqlens, plain.max_seqlen, plain.lengths, kernel)  # type: ignore[arg-type]
    dropout = Dropout.at(11, torch.tensor(4), pack.token_uids, p) if p else None
    h = decoder.hidden(pack.input_ids, pack.position_ids, layout, dropout)
    return cross_entropy_sum(h[pack.predict], decoder.head_weight, pack.targets), decoder.head(h)


def gradients(decoder: Decoder) -> dict[str, Tensor]:
    out = {n: p.grad.clone() for n, p in decoder.named_parameters() if p.grad is not None}
    decoder.zero_grad(set_to_none=True)
    return out


@pytest.mark.parametrize("kernel", ["documents", "masked"])
@pytest.mark.parametrize("kv", [4, 2])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("rope", ["default", "dynamic"])
def test_packed_is_alone(tmp_path: Path, kernel: str, kv: int, p: float, rope: str) -> None:
    """Adapters and base weights learn; two different orders in a pack against one document at a time; the
    masks are keyed by row and token, so dropout changes nothing of this."""
    hub_twin(tmp_path, rope=rope, num_key_value_heads=kv, max_position_embeddings=32, num_hidden_layers=2)
    decoder = load_decoder(tmp_path)
    learned = attach(decoder, LoraConfig(r=4, target_modules="all-linear"), seed=1)
    for linear in adapted(decoder):
        assert linear.lora is not None
        torch.nn.init.normal_(linear.lora.B, std=0.1)
    decoder.requires_grad_(True).train()
    data = rows(4, LENGTHS)
    alone: dict[int, Tensor] = {}
    total = 0.0
    for number, row in enumerate(data):
        loss, logits = run(decoder, make_pack([row], [number]), "documents", p)
        if loss.requires_grad:
            loss.backward()
        total, alone[number] = total + loss.item(), logits.detach()
    want = gradients(decoder)
    assert len(want) == len(list(decoder.parameters())) and len(learned) == 2 * 4 * 2
    for order in ([0, 1, 2, 3, 4], random.Random(0).sample(range(5), 5)):
        loss, logits = run(decoder, make_pack([data[i] for i in order], order), kernel, p)
        loss.backward()
        assert loss.item() == pytest.approx(total, rel=1e-5)
        for number, part in zip(order, logits.split([LENGTHS[i] for i in order]), strict=True):
            assert_close(part.detach(), alone[number], 1e-5, f"document {number}")
        got = gradients(decoder)
        assert got.keys() == want.keys()
        for name in want:
            assert_close(got[name], want[name], 2e-5, name)


def test_dropout_is_on_in_that_test(tmp_path: Path) -> None:
    """The comparison above would pass without dropout: it changes the loss, and another step changes it again."""
    hub_twin(tmp_path, num_hidden_layers=2)
    decoder = load_decoder(tmp_path)
    attach(decoder, LoraConfig(r=4, target_modules="all-linear"))
    for linear in adapted(decoder):
        assert linear.lora is not None
        torch.nn.init.normal_(linear.lora.B, std=0.1)
    pack = make_pack(rows(4, [20, 9]), [0, 1])
    layout = PackedLayout.of(list(pack.lengths), decoder.device, decoder.dtype)

    def hidden(step: int | None) -> Tensor:
        drop = None if step is None else Dropout.at(0, torch.tensor(step), pack.token_uids, 0.3)
        return decoder.train().hidden(pack.input_ids, pack.position_ids, layout, drop).detach()

    with torch.no_grad():
        seen = [hidden(None), hidden(0), hidden(1)]
        assert torch.equal(seen[1], hidden(0))
    for i in range(3):
        for j in range(i):
            assert (seen[i] - seen[j]).abs().max() > 1e-2 * seen[0].abs().max()


def test_a_neighbour_is_not_seen(tmp_path: Path) -> None:
    """Changing one document leaves the others' logits as they were, bit for bit, and a later token never reaches
    an earlier one."""
    hub_twin(tmp_path, num_hidden_layers=2)
    decoder = load_decoder(tmp_path)
    data = rows(4, [7, 9, 6])
    ids = [*data[1].input_ids[:5], 3, 4, 5, 6]
    labels = [-100 if label == -100 else token for token, label in zip(ids, data[1].labels, strict=True)]
    changed = [data[0], Encoded(ids, labels), data[2]]
    for kernel in ("documents", "masked"):
        with torch.no_grad():
            one = run(decoder, make_pack(data, [0, 1, 2]), kernel, 0.0)[1]
            two = run(decoder, make_pack(changed, [0, 1, 2]), kernel, 0.0)[1]
        same = (one == two).all(-1)
        assert same[:12].all() and same[16:].all() and not same[12:16].any()
