"""Plain layers on a card: old ones (no Triton, no flash attention, float16), and what `model.fused` refuses on new ones.

The step is captured there too. What a card is needed for is marked; the rest shows that a captured step would hold."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from runs import log_of, with_
from test_fast import loader_of
from test_graph import decoder_on, packs
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minitune.checkpoint.weights import choose_dtype
from minitune.config import TrainConfig
from minitune.data.loader import Pack, StepBatch
from minitune.model import fused_kernels, kernels
from minitune.model.attention import choose_kernel
from minitune.model.decoder import Decoder
from minitune.model.quantized import Int4Linear, quantize, quantize_linears
from minitune.train import fast, graph, loss
from minitune.train.optim import AdamW, LossScale
from minitune.train.run import Run, train
from minitune.train.step import TrainStep, recompute_layers

CARD = torch.device("cuda")
KINDS = ("adapters", "recomputed", "adapters that differ", "4 bits", "every parameter")


def card_of(monkeypatch: pytest.MonkeyPatch, major: int, minor: int) -> None:
    """The card says that it is of this compute capability."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (major, minor))


def without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kernel of ours refuses to start."""

    class Refused:
        def __getitem__(self, grid: Any) -> Any:
            raise AssertionError("a Triton kernel was launched")

    for module in (kernels, fused_kernels):
        for name, value in list(vars(module).items()):
            if type(value).__module__.startswith("triton.runtime"):
                monkeypatch.setattr(module, name, Refused())


@pytest.fixture
def old_card(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A 2080, as far as another card can be one: no kernel of ours starts, and of torch's attention those that Turing
    lacks are off."""
    card_of(monkeypatch, 7, 5)
    without_triton(monkeypatch)
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION]):
        yield


def plain_step(kind: str, device: str, dtype: torch.dtype) -> TrainStep:
    """A step over plain layers of one of KINDS, the same at each call."""
    decoder = decoder_on(device, dtype)
    if kind == "recomputed":
        recompute_layers(decoder)
    if kind == "adapters that differ":
        decoder.layers[0].attn.o.lora = None
    if kind == "4 bits":
        was = decoder.linears()
        for linear, old in zip(quantize_linears(decoder, 32).linears(), was, strict=True):
            assert isinstance(linear, Int4Linear)
            linear.weight_packed, linear.weight_scale = quantize(old.weight, 32, dtype)
            linear.lora = old.lora
    if kind == "every parameter":
        for linear in decoder.linears():
            linear.lora = None
        decoder.lora_config = None
        decoder.requires_grad_(True)
    learning = [p for p in decoder.parameters() if p.requires_grad]
    scale = LossScale(torch.device(device), start=1024) if dtype == torch.float16 else None
    dropout = 0.0 if kind == "every parameter" else 0.1
    return TrainStep(decoder, AdamW(learning, TrainConfig()), dropout=dropout, seed=5, loss_scale=scale)


def state_of(step: TrainStep) -> list[Tensor]:
    """What learns, and its moments."""
    moments = [t for s in step.optimizer.inner.state.values() for t in s.values()]
    return [*(m.detach() for m in step.optimizer.masters), *(p.detach() for p in step.optimizer.parameters), *moments]


def captured_of(step: TrainStep, batches: list[StepBatch]) -> graph.CapturedStep:
    sizes = [(b.tokens, len(b.packs[0].lengths), b.supervised) for b in batches]
    capacities = graph.capacities(sizes, most=2)
    sample = next(b.packs[0] for b in batches if capacities[0].holds(b.packs[0]))
    return graph.capture(step, capacities, sample, longest=70)


def batches_of(count: int) -> list[StepBatch]:
    return [StepBatch([pack], len(pack.lengths)) for pack in packs(count)]


@pytest.mark.parametrize(
    ("major", "minor", "dtype", "kernel", "reason"),
    [
        (6, 1, torch.float16, "masked", "the card is older than Ampere"),
        (7, 5, torch.float16, "masked", "the card is older than Ampere"),
        (8, 0, torch.bfloat16, "short", ""),
        (9, 0, torch.bfloat16, "short", ""),
    ],
)
def test_what_a_card_gets(
    monkeypatch: pytest.MonkeyPatch, major: int, minor: int, dtype: torch.dtype, kernel: str, reason: str
) -> None:
    """dtype, attention and kernels by the compute capability alone; without Triton, never a kernel of it."""
    card_of(monkeypatch, major, minor)
    hidden: Any = SimpleNamespace(device=CARD)
    for available in (True, False):
        monkeypatch.setattr(kernels, "AVAILABLE", available)
        missing = reason or ("" if available else "Triton is not installed")
        assert kernels.why_not(CARD) == fast.why_not_on(CARD) == missing
        assert loss.fused(hidden) == (not missing)
        assert choose_dtype("auto", CARD) == dtype
        assert choose_kernel(CARD, dtype, 64, 100) == (kernel if available or reason else "varlen")
        assert choose_kernel(CARD, torch.float32, 64, 100) == "masked"


class OnTheDevice(TorchDispatchMode):
    """Fails where an operator takes or gives a tensor that is not on the meta device; reading a value of one that is
    (`item`, `bool`, `tolist`, a shape that depends on values) fails by itself."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for found in tree_leaves((args, kwargs, out)):
            if isinstance(found, Tensor):
                assert found.device.type == "meta", f"{func} meets the host"
        return out


@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_step_asks_nothing_of_the_host(kind: str) -> None:
    """A float16 step with masked attention and loss scaling, after one that warmed up, on tensors without values: no
    value is read, no shape depends on one, nothing comes from or goes to the host. (The library's AdamW has no such
    form; captured it is by the tests with a card.)"""
    step = plain_step(kind, "cpu", torch.float16)
    decoder, optimizer, meta = step.decoder, step.optimizer, torch.device("meta")
    for module in decoder.modules():
        for key, p in module._parameters.items():
            if p is not None:
                module._parameters[key] = nn.Parameter(p.detach().to(meta), p.requires_grad)
        for key, b in module._buffers.items():
            module._buffers[key] = None if b is None else b.to(meta)
    optimizer.parameters = [p for p in decoder.parameters() if p.requires_grad]
    half = [p.dtype != torch.float32 for p in optimizer.parameters]
    optimizer.masters = [
        nn.Parameter(p.detach().float()) if is_half else p
        for p, is_half in zip(optimizer.parameters, half, strict=True)
    ]
    assert any(half) == (kind == "every parameter")
    optimizer.inner.step = lambda: None  # type: ignore[method-assign, assignment]
    step = TrainStep(decoder, optimizer, dropout=step.dropout, loss_scale=LossScale(meta))
    tokens, positions = (torch.zeros(n, dtype=torch.int64, device=meta) for n in (128, 64))
    cu_seqlens = torch.zeros(5, dtype=torch.int32, device=meta)
    pack = Pack(tokens, tokens, tokens, cu_seqlens, positions, positions, (128,), 64, 70)
    share = torch.zeros((), device=meta)
    step.run([pack], share)
    with OnTheDevice():
        result = step.run([pack], share)
        assert [t.shape for t in (result.loss, result.grad_norm, result.skipped)] == [()] * 3
    with pytest.raises(RuntimeError):
        float(result.loss)
    with OnTheDevice(), pytest.raises(AssertionError, match="meets the host"):
        torch.zeros(3)
    assert all(p.grad is None for p in optimizer.parameters)  # a graph's gradients live and die in its pool


@pytest.mark.parametrize(
    ("kind", "capability", "packed", "want"),
    [
        ("adapters", (7, 5), True, "captured: plain layers (the card is older than Ampere), masked attention; "),
        ("every parameter", (7, 5), True, "captured: plain layers (the card is older than Ampere), masked attention; "),
        ("4 bits", (7, 5), True, "captured: plain layers (the card is older than Ampere), masked attention; "),
        (
            "adapters that differ",
            (9, 0),
            True,
            "captured: plain layers (the adapters differ from layer to layer), short attention; ",
        ),
        ("every parameter", (9, 0), True, "captured: plain layers (asked for), short attention; "),
        ("adapters", (7, 5), False, "captured: plain layers (the card is older than Ampere), masked attention; "),
        ("every parameter", (9, 0), False, "plain step: every parameter learns, and "),
        ("every parameter", None, True, "plain step: no card"),
    ],
)
def test_what_is_captured(
    monkeypatch: pytest.MonkeyPatch, kind: str, capability: tuple[int, int] | None, packed: bool, want: str
) -> None:
    """The choice and its line; the largest capacity holds the sample that it is warmed up with."""
    step = plain_step(kind, "cpu", torch.float16)
    loader = loader_of(60, rows_per_step=4, tokens_per_pack=8192 if packed else 80)
    per_epoch = [len(loader.steps(0))]
    took: list[Any] = []
    monkeypatch.setattr(graph, "capture", lambda *a: took.append(a) or "captured")
    if capability:
        card_of(monkeypatch, *capability)
        monkeypatch.setattr(kernels, "AVAILABLE", True)
        monkeypatch.setattr(Decoder, "device", property(lambda self: CARD))
    made, line = fast.quicken(step, loader, per_epoch, per_epoch[0])
    assert line.startswith(want)
    assert (made == "captured") == bool(took) == line.startswith("captured")
    if took:
        _, capacities, sample, longest = took[0]
        assert longest == loader.lengths.max()
        assert capacities[0].holds(sample)
        several = per_epoch[0] - len(fast.one_pack_steps(loader, per_epoch, per_epoch[0]))
        assert (f"{several} steps of several packs run plain" in line) == (not packed) == bool(several)


def test_steps_that_no_capacity_held_are_said(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], undrawn: None
) -> None:
    """A line at the run's end where steps of one pack ran plain; steps of several packs were said at its start."""
    inner = Run.loop

    def loop(self: Run, interrupt: Any) -> None:
        assert isinstance(self.step, TrainStep)
        self.step = graph.CapturedStep(self.step, [], 0)  # no capacities
        inner(self, interrupt)

    monkeypatch.setattr(Run, "loop", loop)
    train(with_(config, max_steps=3))
    assert "note: 3 steps ran plain: no captured capacity held them" in capsys.readouterr().err
    train(with_(config, max_steps=3, tokens_per_pack=8, output=f"{config.output}-2"))
    assert "ran plain" not in capsys.readouterr().err


def test_the_contract_holds_buffers_and_masters() -> None:
    """4-bit weights are buffers, half-precision weights have masters: moved, each is an error by name."""
    step = plain_step("4 bits", "cpu", torch.float32)
    contract = graph.Contract.of(step)
    contract.check()
    linear = step.decoder.layers[1].mlp.down
    linear.weight_packed = linear.weight_packed.clone()
    with pytest.raises(RuntimeError, match=r"layers\.1\.mlp\.down\.weight_packed"):
        contract.check()
    step = plain_step("every parameter", "cpu", torch.float16)
    contract = graph.Contract.of(step)
    step.optimizer.masters[3] = nn.Parameter(step.optimizer.masters[3].detach().clone())
    with pytest.raises(RuntimeError, match="master 3"):
        contract.check()


HALF, FLOAT = (3e-3, 0.4, 1e-2), (1e-4, 4e-4, 1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("kind", "dtype", "old", "bands"),
    [
        ("adapters", torch.float16, True, HALF),
        ("adapters", torch.float32, True, FLOAT),
        ("recomputed", torch.float16, True, HALF),
        ("every parameter", torch.float16, True, HALF),
        ("every parameter", torch.float32, False, FLOAT),
        ("4 bits", torch.float32, False, FLOAT),
        ("adapters that differ", torch.float16, False, HALF),
    ],
)
def test_captured_plain_layers_are_plain_steps(
    request: pytest.FixtureRequest, kind: str, dtype: torch.dtype, old: bool, bands: tuple[float, float, float]
) -> None:
    """20 steps with changing inputs, rates and capacities, dropout on: losses, norms and what was learned agree, and on
    an old card no kernel of Triton starts.

    Padding is all that differs, and with it the order of sums. On a CPU that changed float16's losses by 2e-4, norms by
    0.05 and adapters by 1.4e-3 of their size (from float32's, norms part by up to 0.16), float32's by 2e-7, 1e-5 and 4e-7."""
    if old:
        request.getfixturevalue("old_card")
    close, near, apart = bands
    plain, base = plain_step(kind, "cuda", dtype), plain_step(kind, "cuda", dtype)
    batches = batches_of(20)
    # detached: a copy's graph would keep nodes of another stream alive
    before = [t.detach().clone() for t in base.optimizer.masters]
    captured = captured_of(base, batches)
    assert all(torch.equal(a, b) for a, b in zip(before, base.optimizer.masters, strict=True))
    for i, batch in enumerate(batches):
        ours, want = captured(batch, 1e-3 / (i + 1)), plain(batch, 1e-3 / (i + 1))
        assert float(ours.skipped) == float(want.skipped) == 0
        assert float(ours.loss) == pytest.approx(float(want.loss), rel=close)
        assert float(ours.grad_norm) == pytest.approx(float(want.grad_norm), rel=near)
    assert captured.plain_steps == 0 and int(base.step_index) == 20
    for a, b, was in zip(base.optimizer.masters, plain.optimizer.masters, before, strict=True):
        assert float((a - b).detach().norm() / b.detach().norm()) < apart
        assert not torch.equal(a, was)


@pytest.mark.gpu
def test_an_overflow_in_a_captured_step(old_card: None) -> None:
    """A scale far too high: nothing is updated, not a bit, the scale halves with each replay until a step is good, and
    training goes on."""
    step = plain_step("adapters", "cuda", torch.float16)
    batches = batches_of(4)
    captured = captured_of(step, batches)
    captured(batches[0], 1e-3)
    assert captured.loss_scale is not None
    captured.loss_scale.scale.fill_(2.0**40)
    before = [t.clone() for t in state_of(step)]
    skipped = 0
    while float(captured(batches[skipped % 4], 1e-3).skipped):
        skipped += 1
        assert all(torch.equal(a, b) for a, b in zip(before, state_of(step), strict=True))
        assert float(captured.loss_scale.scale) == 2.0 ** (40 - skipped)
    assert 10 < skipped < 40 and captured.plain_steps == 0
    assert not any(torch.equal(a, b) for a, b in zip(before, state_of(step), strict=True))
    assert all(torch.isfinite(t).all() for t in state_of(step))


@pytest.mark.gpu
def test_a_newer_card_would_have_launched_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """What proves that no Triton kernel starts on an old card does notice one."""
    pytest.importorskip("triton", reason="Triton is not installed")
    without_triton(monkeypatch)
    with pytest.raises(AssertionError, match="Triton"):
        plain_step("adapters", "cuda", torch.float16)(batches_of(1)[0], 1e-3)


@pytest.mark.gpu
def test_a_run_on_an_old_card(
    config: TrainConfig, old_card: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], undrawn: None
) -> None:
    """A whole run in float16, captured, held-out losses on the way: the CPU's losses in float32 (in float16 a CPU's
    part from them by 7e-4)."""
    config = with_(config, max_steps=12, eval_steps=4, eval_fraction=0.1)
    exact = with_(config, output=str(tmp_path / "exact"))
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        train(exact, quiet=True)
    summary = train(with_(config, device="cuda", dtype="auto"))
    said = capsys.readouterr().err
    assert "captured: plain layers (the card is older than Ampere), masked attention; " in said
    assert "ran plain" not in said and summary["dtype"] == "float16"
    for a, b in zip(log_of(config.output), log_of(exact.output), strict=True):
        for key in a.keys() & {"loss", "eval_loss"}:
            assert a[key] == pytest.approx(b[key], rel=5e-3), (a, b)
