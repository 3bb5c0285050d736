"""Adapters: where they attach, PEFT's numbers, merging, and the dropout's statistics."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from twins import assert_close, hub_loss, hub_twin, mean_loss, rows

from minitune.checkpoint.adapter import adapter_parameters
from minitune.checkpoint.weights import hub_parameters, load_decoder
from minitune.model.decoder import Decoder, DecoderConfig
from minitune.model.lora import Dropout, LoraConfig, adapted, attach, merge, mix32, unmerge

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL = (*ATTENTION, "gate_proj", "up_proj", "down_proj")


def small(layers: int = 2, hidden: int = 16, dtype: torch.dtype = torch.float32) -> Decoder:
    config = DecoderConfig(40, hidden, 24, layers, 4, 2, hidden // 4, residual_multiplier=0.7)
    torch.manual_seed(0)
    decoder = Decoder(config)
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return decoder.to(dtype)


def fill_b(decoder: Decoder, seed: int = 5) -> None:
    """A B of zero would hide every fault of the adapter."""
    generator = torch.Generator().manual_seed(seed)
    for linear in adapted(decoder):
        assert linear.lora is not None
        linear.lora.B.data.normal_(0, 0.1, generator=generator)


def attached(decoder: Decoder) -> set[str]:
    return {name.removeprefix("base_model.model.").split(".lora_")[0] for name in adapter_parameters(decoder)}


@pytest.mark.parametrize(
    ("targets", "per_layer"),
    [
        (ATTENTION, {f"self_attn.{n}" for n in ATTENTION}),
        (("q_proj", "v_proj"), {"self_attn.q_proj", "self_attn.v_proj"}),
        (("mlp.gate_proj",), {"mlp.gate_proj"}),
        (r".*\.(q|down)_proj", {"self_attn.q_proj", "mlp.down_proj"}),
        ("all-linear", {f"self_attn.{n}" for n in ATTENTION} | {f"mlp.{n}" for n in ALL[4:]}),
    ],
)
def test_attach(targets: Any, per_layer: set[str]) -> None:
    """By list, by suffix, by regular expression and by `all-linear`; nothing but A and B learns, all of them do."""
    decoder = small()
    returned = attach(decoder, LoraConfig(r=3, target_modules=targets))
    assert attached(decoder) == {f"model.layers.{i}.{n}" for i in range(2) for n in per_layer}
    learns = [p for p in decoder.parameters() if p.requires_grad]
    assert {id(p) for p in learns} == {id(p) for p in returned}
    assert all(p.dtype == torch.float32 for p in returned)


def test_one_layer_by_regex() -> None:
    """The expression matches whole hub names: `q_proj` alone matches none, a layer can be chosen."""
    decoder = small()
    attach(decoder, LoraConfig(target_modules=r"model\.layers\.1\.self_attn\.q_proj"))
    assert attached(decoder) == {"model.layers.1.self_attn.q_proj"}


@pytest.mark.parametrize(
    ("targets", "says"),
    [
        (("q_proj", "c_attn"), "c_attn.*q_proj"),
        (("proj",), "proj"),
        ("q_proj", "matches no linear"),
        ((), "matches no linear"),
        ("*[", r"\*\["),
    ],
)
def test_targets_that_match_nothing(targets: Any, says: str) -> None:
    """A typo is an error in one line, never an adapter that is smaller than asked; the model is left as it was."""
    decoder = small().requires_grad_(True)
    with pytest.raises(ValueError, match=says) as error:
        attach(decoder, LoraConfig(target_modules=targets))
    assert "\n" not in str(error.value)
    assert not adapted(decoder) and decoder.lora_config is None
    assert all(p.requires_grad for p in decoder.parameters())


@pytest.mark.parametrize("bad", [{"r": 0}, {"lora_dropout": 1.0}, {"lora_dropout": -0.1}])
def test_config_bounds(bad: dict[str, Any]) -> None:
    """A rank below one and a dropout outside [0, 1) are refused."""
    with pytest.raises(ValueError, match=next(iter(bad))):
        LoraConfig(**bad)


def test_start_is_pefts(tmp_path: Path) -> None:
    """B zero; A uniform between ±1/√inputs, as PEFT's: bound, mean, spread; own numbers for each site and seed."""
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    hub = hub_twin(tmp_path)
    theirs = get_peft_model(hub, PeftConfig(r=16, target_modules=list(ALL)))
    decoder = load_decoder(tmp_path)
    attach(decoder, LoraConfig(r=16, target_modules=ALL), seed=1)
    peft = {n.replace(".default", ""): p for n, p in theirs.named_parameters() if "lora_" in n}
    ours = adapter_parameters(decoder)
    assert ours.keys() == peft.keys()
    seen: set[float] = set()
    for name, tensor in ours.items():
        assert tensor.shape == peft[name].shape
        if "lora_B" in name:
            assert not tensor.any() and not peft[name].any()
            continue
        bound = 1 / math.sqrt(tensor.shape[1])
        for t in (tensor.detach(), peft[name].detach()):
            assert 0.97 * bound < t.abs().max() <= bound
            assert abs(t.mean()) < 0.08 * bound
            assert t.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.06)
        seen.add(tensor[0, 0].item())
    assert len(seen) == 3 * 7
    again, other = load_decoder(tmp_path), load_decoder(tmp_path)
    attach(again, LoraConfig(r=16, target_modules=ALL), seed=1)
    attach(other, LoraConfig(r=16, target_modules=ALL), seed=2)
    key = "base_model.model.model.layers.1.self_attn.v_proj.lora_A.weight"
    assert torch.equal(adapter_parameters(again)[key], ours[key])
    assert not torch.equal(adapter_parameters(other)[key], ours[key])


@pytest.mark.parametrize(
    ("targets", "rslora"),
    [
        (ALL, False),
        (("q_proj", "v_proj"), True),
        (("k_proj",), False),
        (("gate_proj", "o_proj"), False),
        (("up_proj",), True),
    ],
)
def test_equals_peft(tmp_path: Path, targets: tuple[str, ...], rslora: bool) -> None:
    """Logits, loss, and A's and B's gradients of PEFT on the same weights; whole and partial fused linears."""
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    hub = hub_twin(tmp_path)
    shape = {"r": 6, "lora_alpha": 20, "use_rslora": rslora}
    theirs = get_peft_model(hub, PeftConfig(target_modules=list(targets), **shape)).eval()
    decoder = load_decoder(tmp_path)
    attach(decoder, LoraConfig(target_modules=targets, lora_dropout=0.0, **shape), seed=3)
    fill_b(decoder)
    peft = {n.replace(".default", ""): p for n, p in theirs.named_parameters() if "lora_" in n}
    with torch.no_grad():
        for name, tensor in adapter_parameters(decoder).items():
            peft[name].copy_(tensor)
    data = rows(2, [9, 21, 14])
    ids = torch.tensor([data[1].input_ids])
    with torch.no_grad():
        plain = load_decoder(tmp_path).logits(ids)
        assert_close(decoder.logits(ids), theirs(ids).logits, 3e-5)
        assert (decoder.logits(ids) - plain).abs().max() > 1e-2 * plain.abs().max()  # the adapter does something
    loss, expected = mean_loss(decoder, data), hub_loss(theirs, data)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    loss.backward()
    expected.backward()
    for linear in adapted(decoder):
        lora = linear.lora
        assert lora is not None and lora.A.grad is not None and lora.B.grad is not None
        for part, a, b, _ in lora.rows():
            module = f"base_model.model.{linear.hub_name(part)}"
            assert_close(lora.A.grad[a], peft[f"{module}.lora_A.weight"].grad, 5e-5, f"{module} A")
            assert_close(lora.B.grad[b], peft[f"{module}.lora_B.weight"].grad, 5e-5, f"{module} B")


@pytest.mark.parametrize("targets", [ALL, ("q_proj", "v_proj"), ("gate_proj",)])
def test_merge(targets: tuple[str, ...]) -> None:
    """W + scale · B A, part by part; the logits stay, and `unmerge` gives weights and adapter back bit for bit."""
    decoder = small()
    attach(decoder, LoraConfig(r=4, lora_alpha=10, target_modules=targets))
    fill_b(decoder)
    before = {n: t.detach().clone() for n, t in hub_parameters(decoder).items()}
    lora = {n: t.detach().clone() for n, t in adapter_parameters(decoder).items()}
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        logits = decoder.logits(ids)
    merge(decoder, keep=True)
    assert not adapted(decoder)
    for name, weight in hub_parameters(decoder).items():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        want = before[name].double()
        if f"{key}.lora_A.weight" in lora:
            want = want + 2.5 * lora[f"{key}.lora_B.weight"].double() @ lora[f"{key}.lora_A.weight"].double()
        torch.testing.assert_close(weight.double(), want, atol=1e-6, rtol=0)
    with torch.no_grad():
        assert_close(decoder.logits(ids), logits, 3e-5)
    unmerge(decoder)
    assert all(torch.equal(t, before[n]) for n, t in hub_parameters(decoder).items())
    assert all(torch.equal(t, lora[n]) for n, t in adapter_parameters(decoder).items())
    with torch.no_grad():
        assert torch.equal(decoder.logits(ids), logits)


def test_merge_into_bf16_rounds_once() -> None:
    """The sum is formed in float32; `unmerge` restores what rounding would have lost; nothing kept is an error."""
    decoder = small(dtype=torch.bfloat16)
    attach(decoder, LoraConfig(r=4, target_modules=("down_proj",)))
    fill_b(decoder)
    linear = adapted(decoder)[0]
    assert linear.lora is not None
    original = linear.weight.detach().clone()
    want = (original.double() + 8 * linear.lora.B.detach().double() @ linear.lora.A.detach().double()).bfloat16()
    merge(decoder, keep=True)
    assert (linear.weight != want).float().mean() < 0.01  # float32 and float64 sums may round apart at a tie
    unmerge(decoder)
    assert torch.equal(linear.weight, original)
    merge(decoder)
    with pytest.raises(ValueError, match="keep=True"):
        unmerge(decoder)


# Dropout

P, TOKENS, COLUMNS = 0.1, 2000, 256


def keep_mask(seed: int, step: int, uids: Tensor, site: int, p: float = P, columns: int = COLUMNS) -> Tensor:
    dropout = Dropout.at(seed, torch.tensor(step), uids, p)
    return dropout(torch.ones(uids.numel(), columns), torch.tensor(site, dtype=torch.int32)) != 0


def test_hash_on_unsigned_integers() -> None:
    """int32 with wrap-around is the published hash on uint32, so every device draws the same numbers."""
    x = np.random.default_rng(0).integers(0, 2**32, 5000, dtype=np.uint32)
    want = x.copy()
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        want ^= want >> np.uint32(shift)
        want *= np.uint32(factor)
    want ^= want >> np.uint32(16)
    got = mix32(torch.from_numpy(x.view(np.int32)))
    assert got.dtype == torch.int32
    assert np.array_equal(got.numpy().view(np.uint32), want)


@pytest.mark.parametrize("p", [0.0, 0.05, 0.1, 0.5, 0.9])
def test_dropout_rate_and_scale(p: float) -> None:
    """A part p is zero (within four standard errors), the rest is x / (1 - p), so the mean stays."""
    uids = torch.arange(TOKENS)
    x = torch.full((TOKENS, COLUMNS), 3.0)
    y = Dropout.at(1, torch.tensor(7), uids, p)(x, torch.tensor(4, dtype=torch.int32))
    zero = (y == 0).float().mean().item()
    assert abs(zero - p) <= 4 * math.sqrt(p * (1 - p) / y.numel())
    torch.testing.assert_close(y[y != 0], torch.full_like(y[y != 0], 3 / (1 - p)))
    assert y.mean().item() == pytest.approx(3, rel=0.01)


def test_dropout_keeps_the_dtype() -> None:
    """bf16 in, bf16 out; the mask is that of float32, so precision changes no draw."""
    uids, site = torch.arange(50), torch.tensor(2, dtype=torch.int32)
    dropout = Dropout.at(1, torch.tensor(0), uids, P)
    assert dropout.key_T.dtype == torch.int32
    low, high = dropout(torch.ones(50, 64).bfloat16(), site), dropout(torch.ones(50, 64), site)
    assert low.dtype == torch.bfloat16 and torch.equal(low != 0, high != 0)


def correlation(a: Tensor, b: Tensor) -> float:
    return torch.corrcoef(torch.stack([a.flatten().double(), b.flatten().double()]))[0, 1].item()


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 1},
        {"step": 1},
        {"step": 2},
        {"site": 2},
        {"site": 3},
        {"site": 257},
        {"uids": torch.arange(TOKENS) + (1 << 24)},
        {"uids": torch.arange(TOKENS) + (1 << 32)},
    ],
    ids=["seed", "step 1", "step 2", "site 2", "site 3", "site 257", "row", "row of high bits"],
)
def test_dropout_is_independent(other: dict[str, Any]) -> None:
    """Masks of another seed, step, site, row or token share nothing: neither element by element, nor in how many
    columns a token keeps or how many tokens keep a column (a permuted copy would show there)."""
    base: dict[str, Any] = {"seed": 0, "step": 0, "uids": torch.arange(TOKENS), "site": 1}
    one, two = keep_mask(**base), keep_mask(**{**base, **other})
    assert abs(correlation(one, two)) < 4 / math.sqrt(one.numel())
    assert abs(correlation(one.sum(1), two.sum(1))) < 4.5 / math.sqrt(TOKENS)
    assert abs(correlation(one.sum(0), two.sum(0))) < 4.5 / math.sqrt(COLUMNS)


def test_dropout_columns_and_tokens_are_independent() -> None:
    """Within a mask: counts over columns and over tokens have the binomial's spread, neighbours do not correlate."""
    keep = keep_mask(3, 5, torch.arange(TOKENS) + (9 << 24), 6)
    for axis, n in ((0, TOKENS), (1, COLUMNS)):
        counts = keep.sum(axis).double()
        ratio = counts.var().item() / (n * P * (1 - P))
        assert abs(ratio - 1) < 5 * math.sqrt(2 / counts.numel())
    for lag in (1, 2, 16):
        assert abs(correlation(keep[lag:], keep[:-lag])) < 4.5 / math.sqrt(keep.numel())
        assert abs(correlation(keep[:, lag:], keep[:, :-lag])) < 4.5 / math.sqrt(keep.numel())


def test_dropout_reaches_the_adapter_only(tmp_path: Path) -> None:
    """Forward is W x + scale · B A drop(x) of training mode; in eval mode nothing is dropped."""
    decoder = small(layers=1)
    attach(decoder, LoraConfig(r=4, lora_alpha=8, target_modules=("q_proj", "v_proj")))
    fill_b(decoder)
    linear = adapted(decoder)[0]
    lora = linear.lora
    assert lora is not None
    x, uids = torch.randn(6, 16), torch.arange(6)
    dropout = Dropout.at(0, torch.tensor(2), uids, 0.5)
    dropped = x * keep_mask(0, 2, uids, int(lora.site), 0.5, 16) * 2
    assert not torch.equal(dropped, x)
    for mode, seen in ((True, dropped), (False, x)):
        decoder.train(mode)
        want = x @ linear.weight.T
        for _, a, b, o in lora.rows():
            want[:, o] = want[:, o] + 2 * seen @ lora.A[a].T @ lora.B[b].T
        torch.testing.assert_close(linear(x, dropout), want)


@pytest.mark.gpu
def test_dropout_is_the_same_on_a_card() -> None:
    """The CPU's mask, eager and compiled, for rows beyond 32 bits too."""
    uids, site = torch.arange(300) + (777 << 24), torch.tensor(9, dtype=torch.int32)
    want = keep_mask(5, 3, uids, 9)

    def draw(dropout: Dropout) -> Tensor:
        return dropout(torch.ones(300, COLUMNS, device="cuda"), site.cuda()) != 0

    dropout = Dropout.at(5, torch.tensor(3, device="cuda"), uids.cuda(), P)
    assert torch.equal(draw(dropout).cpu(), want)
    assert torch.equal(torch.compile(draw)(dropout).cpu(), want)
