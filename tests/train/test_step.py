"""The optimizer step: one loss however packed, the gate for bad values, clipping, loss scaling, the schedule."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from twins import hub_twin, rows

from minitune.checkpoint.weights import load_decoder
from minitune.config import TrainConfig
from minitune.data.loader import Loader, StepBatch, make_pack
from minitune.data.template import Encoded
from minitune.model.decoder import Decoder
from minitune.model.lora import LoraConfig, attach
from minitune.train.optim import AdamW, LossScale, learning_rate_at
from minitune.train.step import TrainStep, pack_loss, recompute_layers

LENGTHS = [5, 17, 9, 30, 12, 4, 22, 8, 41, 6, 14, 5, 19, 11, 7, 26]
SIXTEEN = rows(3, LENGTHS)
CONFIG = TrainConfig(weight_decay=0.03)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("twin")
    hub_twin(folder)
    return folder


def begin(folder: Path, lora: bool, dtype: str = "float32", **step: Any) -> tuple[Decoder, TrainStep]:
    decoder = load_decoder(folder, dtype, "cpu").train()
    if lora:
        parameters = attach(decoder, LoraConfig(lora_dropout=step.get("dropout", 0.0)), seed=5)
        for b in parameters[1::2]:  # B starts at zero, which would hide A's gradient
            torch.nn.init.normal_(b, std=0.05, generator=torch.Generator().manual_seed(b.shape[0]))
    else:
        parameters = list(decoder.requires_grad_(True).parameters())
    return decoder, TrainStep(decoder, AdamW(parameters, CONFIG), **step)


def packed(numbers: list[list[int]]) -> StepBatch:
    """These rows of SIXTEEN, a pack a list."""
    return StepBatch([make_pack([SIXTEEN[n] for n in pack], pack) for pack in numbers], sum(map(len, numbers)))


def values(step: TrainStep) -> list[Tensor]:
    return [p.detach().clone() for p in step.optimizer.parameters]


@pytest.mark.parametrize("kind", ["full", "lora", "lora with dropout"])
def test_one_loss(folder: Path, kind: str) -> None:
    """Sixteen rows in one pack, four or sixteen, in any order: one loss, one norm, one update, dropout included."""
    outcomes = []
    for packs in (
        [list(range(16))],
        [[3, 1, 14, 0], [5, 4, 7, 6], [8, 12, 10, 11], [9, 13, 2, 15]],
        [[n] for n in reversed(range(16))],
    ):
        settings = {"dropout": 0.3, "seed": 8} if "dropout" in kind else {}
        _, step = begin(folder, kind != "full", **settings)
        results = [step(packed(packs), 1e-3) for _ in range(2)]
        outcomes.append(([float(r.loss) for r in results], [float(r.grad_norm) for r in results], values(step)))
    assert outcomes[0][0][0] != outcomes[0][0][1]
    for losses, norms, learned in outcomes[1:]:
        assert losses == pytest.approx(outcomes[0][0], rel=1e-6)
        assert norms == pytest.approx(outcomes[0][1], rel=1e-5)
        for a, b in zip(learned, outcomes[0][2], strict=True):
            # Adam turns a gradient near zero into a whole step: a few entries may part by parts of it
            assert float(((a - b).abs() > 2e-6).float().mean()) < 1e-3 and float((a - b).abs().max()) < 2e-3


def test_dropout_is_drawn(folder: Path) -> None:
    """Dropout changes the loss with the seed and from step to step, and is off where nothing asks for it."""
    batch = packed([list(range(16))])
    losses = {}
    for seed, p in ((1, 0.3), (2, 0.3), (1, 0.0), (2, 0.0)):
        _, step = begin(folder, True, dropout=p, seed=seed)
        losses[seed, p] = [float(step(batch, 0.0).loss) for _ in range(2)]
    assert losses[1, 0.0] == losses[2, 0.0] and losses[1, 0.0][0] == losses[1, 0.0][1]
    assert len({*losses[1, 0.3], *losses[2, 0.3], *losses[1, 0.0]}) == 5


def test_loss_is_the_mean_over_learned_tokens(folder: Path) -> None:
    """Not the mean of means: a row of one learned token weighs as much as any other token."""
    decoder, step = begin(folder, False)
    total, count = 0.0, 0
    for row in SIXTEEN:
        logits = decoder.logits(torch.tensor([row.input_ids]))[0, :-1]
        labels = torch.tensor(row.labels[1:])
        total += F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum").item()
        count += int((labels != -100).sum())
    loader = Loader(SIXTEEN, rows_per_step=16, tokens_per_pack=64, seed=1)
    batch = loader.batch(0, 0)
    assert len(batch.packs) > 2
    assert float(step(batch, 0.0).loss) == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("max_norm", [0.0, 0.05, 1e4])
@pytest.mark.parametrize("lora", [False, True])
def test_clipped_adamw_is_torch_s(folder: Path, lora: bool, max_norm: float) -> None:
    """Three steps against autograd, `clip_grad_norm_` and torch's plain AdamW, decay on matrices only."""
    batch = packed([[0, 1, 2, 3], [4, 5]])
    decoder, step = begin(folder, lora, max_grad_norm=max_norm)
    twin = copy.deepcopy(decoder)
    theirs = [p for p in twin.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in theirs if p.ndim > 1], "weight_decay": CONFIG.weight_decay},
        {"params": [p for p in theirs if p.ndim <= 1], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, foreach=False, fused=False)
    for rate in (1e-3, 3e-4, 1e-3):
        for group in reference.param_groups:
            group["lr"] = rate
        reference.zero_grad()
        (sum(pack_loss(twin, pack) for pack in batch.packs) / batch.supervised).backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs, max_norm or math.inf)
        reference.step()
        result = step(batch, rate)
        torch.testing.assert_close(result.grad_norm, norm)
        assert (float(norm) > max_norm) == (max_norm < 1), "the case must clip, or must not"
        for a, b in zip(decoder.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-5)
    if lora:
        assert not any(p.requires_grad for n, p in decoder.named_parameters() if ".lora." not in n)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_bad_value_changes_nothing(folder: Path, dtype: str, bad: float) -> None:
    """A gradient that is not finite reaches neither parameters, masters, moments nor step counts; the next step is as
    if the bad one had never been."""
    good = packed([[1, 3, 8]])
    decoder, step = begin(folder, False, dtype)
    _, other = begin(folder, False, dtype)
    for s in (step, other):
        s(good, 1e-3)
    before = copy.deepcopy((values(step), step.optimizer.state_dict()))
    hook = decoder.layers[1].mlp.down.weight.register_hook(lambda grad: grad.index_fill(0, torch.tensor([2]), bad))
    result = step(good, 1e-3)
    hook.remove()
    assert float(result.skipped) == 1 and math.isfinite(float(result.loss))
    after = (values(step), step.optimizer.state_dict())
    assert all(map(torch.equal, before[0], after[0]))
    assert all(map(torch.equal, before[1]["masters"], after[1]["masters"]))
    for name, state in before[1]["adamw"]["state"].items():
        for key, value in state.items():
            assert torch.equal(value, after[1]["adamw"]["state"][name][key]), key
    assert float(step(good, 1e-3).skipped) == 0
    other(good, 1e-3)
    assert all(map(torch.equal, values(step), values(other)))


def test_a_bad_loss_changes_nothing(folder: Path) -> None:
    """The loss alone gates too: a NaN in the weights of the head's unused rows or anywhere else."""
    decoder, step = begin(folder, True)
    before = values(step)
    decoder.norm.weight.data[3] = float("nan")
    assert float(step(packed([[1, 3, 8]]), 1e-3).skipped) == 1
    assert all(map(torch.equal, before, values(step)))


def test_loss_scale_recovers(folder: Path) -> None:
    """float16: a scale that overflows is halved until gradients fit, then training goes on and the norm is unscaled."""
    batch = packed([[1, 3, 8], [2]])
    decoder, step = begin(folder, True, "float16", loss_scale=LossScale(torch.device("cpu"), start=2.0**30))
    _, plain = begin(folder, True)
    before, scales, results = values(step), [], []
    for _ in range(40):
        scales.append(float(step.loss_scale.scale))
        results.append(step(batch, 1e-3))
        if not float(results[-1].skipped):
            break
        assert all(map(torch.equal, before, values(step)))
    assert len(scales) > 2 and scales == [2.0 ** (30 - i) for i in range(len(scales))]
    assert not all(map(torch.equal, before, values(step)))
    assert float(results[-1].grad_norm) == pytest.approx(float(plain(batch, 1e-3).grad_norm), rel=0.02)
    assert float(step.loss_scale.scale) == scales[-1]
    losses = [float(step(batch, 1e-3).loss) for _ in range(10)]
    assert losses[-1] < float(results[-1].loss)


def test_loss_scale_grows() -> None:
    """Doubled after `interval` good steps in a row; an overflow halves it and starts the count anew."""
    scale = LossScale(torch.device("cpu"), start=8.0, interval=3)
    seen = []
    for overflow in (0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 1):
        scale.update(torch.tensor(float(overflow)))
        seen.append(float(scale.scale))
    assert seen == [8, 8, 16, 16, 16, 8, 8, 8, 16, 8, 4]


@pytest.mark.parametrize("lora", [False, True])
def test_recomputed_layers_give_the_same_gradients(folder: Path, lora: bool) -> None:
    """Bit for bit, dropout included; and layers are indeed computed again."""
    batch, grads, calls = packed([[0, 3, 5], [8, 2]]), [], []
    for again in (False, True):
        decoder, step = begin(folder, lora, dropout=0.4 if lora else 0.0, seed=2)
        count = [0]
        decoder.layers[0].attn.qkv.register_forward_hook(lambda *_, count=count: count.__setitem__(0, count[0] + 1))
        if again:
            recompute_layers(decoder)
        held: list[Tensor] = []
        step.optimizer.step = lambda *_, s=step, held=held: held.extend(p.grad.clone() for p in s.optimizer.parameters)
        step(batch, 1e-3)
        grads.append(held)
        calls.append(count[0])
    assert calls == [2, 4]
    assert grads[0] and all(map(torch.equal, grads[0], grads[1]))


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [{}, {"warmup_steps": 7}, {"warmup_ratio": 0.13}, {"warmup_steps": 40}])
def test_learning_rate_is_transformers(kind: str, warmup: dict[str, Any]) -> None:
    """Each of 40 steps has the rate of `get_scheduler`, warm-up in steps or as a part (rounded up, as the Trainer)."""
    from transformers import TrainingArguments, get_scheduler

    config = TrainConfig(learning_rate=3e-4, lr_scheduler_type=kind, **warmup)  # type: ignore[arg-type]
    steps = warmup.get("warmup_steps", 0) or math.ceil(warmup.get("warmup_ratio", 0.0) * 40)
    amount = warmup.get("warmup_steps", warmup.get("warmup_ratio", 0))
    assert TrainingArguments(warmup_steps=amount, use_cpu=True).get_warmup_steps(40) == steps
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    name = "constant_with_warmup" if kind == "constant" else kind
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=steps, num_training_steps=40)
    theirs = []
    for _ in range(40):
        theirs.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert [learning_rate_at(i, 40, config) for i in range(40)] == pytest.approx(theirs, rel=1e-9, abs=1e-15)


def test_default_rates() -> None:
    """1e-4 for LoRA, 1e-5 for every parameter; a given rate wins, zero too."""
    assert TrainConfig().resolved_learning_rate == 1e-4
    assert TrainConfig(method="full").resolved_learning_rate == 1e-5
    assert TrainConfig(learning_rate=0.0).resolved_learning_rate == 0


def test_sixteen_rows_hold_what_the_test_needs() -> None:
    """The batch is not kind: rows of one learned token, and of many."""
    counts = [Encoded(r.input_ids, r.labels).supervised for r in SIXTEEN]
    assert min(counts) >= 1 and max(counts) > 10 * min(counts)
