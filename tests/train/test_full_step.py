"""Every parameter learns: by hand against autograd; the optimizer after backward and inside it; nothing bad gets in."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hand import launches_of
from torch import Tensor

from minitune.config import TrainConfig, UserError
from minitune.data.loader import Pack, StepBatch
from minitune.model import attention_kernels, full_kernels, fused_ops, kernels
from minitune.model.decoder import Decoder, DecoderConfig
from minitune.model.full import FullStack
from minitune.model.fused_compile import launch_full
from minitune.train import adamw8, full, full_step, graph, step
from minitune.train.full_step import FullStep
from minitune.train.optim8 import AdamW8

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_triton = pytest.mark.skipif(not kernels.AVAILABLE, reason="Triton is not installed")
SHAPE = DecoderConfig(
    vocab_size=97,
    hidden_size=72,
    intermediate_size=104,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    embedding_multiplier=3.0,
    residual_multiplier=0.7,
    logits_scaling=2.0,
)
CONFIG = TrainConfig(method="full", seed=7, max_grad_norm=0.5, weight_decay=0.01)


def decoder_of(tied: bool = True, dtype: torch.dtype = torch.float32) -> Decoder:
    with torch.device("meta"):
        decoder = Decoder(replace(SHAPE, tie_word_embeddings=tied))
    decoder.allocate(DEVICE, dtype)
    generator = torch.Generator().manual_seed(3)
    for parameter in decoder.parameters():
        values = torch.randn(parameter.shape, generator=generator) * 0.15
        parameter.data.copy_(values + 1 if parameter.ndim == 1 else values)
    return decoder.requires_grad_(True).train()


def pack_of(lengths: list[int], seed: int, every: int = 3) -> Pack:
    """Random ids, of which some come often; one in `every` supervised."""
    tokens, generator = sum(lengths), torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 97, (tokens,), generator=generator)
    ids[torch.rand(tokens, generator=generator) < 0.3] = 5
    predict = torch.arange(0, tokens - 1, every)
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    positions = torch.cat([torch.arange(n) for n in lengths])
    targets = torch.randint(0, 97, (len(predict),), generator=generator)
    pack = Pack(
        ids, positions, torch.arange(tokens), cu, predict, targets,
        lengths=tuple(lengths), supervised=len(predict), longest=max(lengths),
    )  # fmt: skip
    return pack.to(DEVICE)


def share_of(packs: list[Pack]) -> Tensor:
    return torch.full((), 1 / sum(p.supervised for p in packs), device=DEVICE)


class Kept:
    """In the place of an optimizer inside backward: keeps each gradient."""

    def __init__(self, decoder: Decoder):
        self.matrices = [p for p in decoder.parameters() if p.ndim > 1]
        self.grads: dict[int, Tensor] = {}

    def use(self, index: int, grad: Tensor) -> None:
        self.grads[index] = grad.clone()


def by_hand(decoder: Decoder, packs: list[Pack], whole: int, buffered: bool) -> tuple[Tensor, list[Tensor], Tensor]:
    """(loss, the matrices' gradients, the norms')."""
    stack, kept = FullStack(decoder, whole), Kept(decoder)
    sink: Any = full_step.Buffer(stack.matrices) if buffered else full_step.InBackward(kept, 2)  # type: ignore[arg-type]
    loss = torch.zeros((), device=DEVICE)
    for pack in packs:
        layout = replace(step.layout_of(pack, decoder), kernel="short")
        total, tape = stack.learn(
            pack.input_ids, pack.position_ids, layout, pack.predict, pack.targets, share_of(packs), sink, 16
        )
        loss += total * share_of(packs)
        stack.backward(tape, sink)
    grads = sink.grads if buffered else [kept.grads[i] for i in range(len(kept.matrices))]
    return loss, grads, stack.norm_grad


def by_autograd(decoder: Decoder, packs: list[Pack]) -> tuple[Tensor, list[Tensor], Tensor]:
    loss = torch.zeros((), device=DEVICE)
    for pack in packs:
        part = step.pack_loss(decoder, pack) * share_of(packs)
        part.backward()
        loss += part.detach()
    every = [p for p in decoder.parameters() if p.grad is not None]
    matrices = [p.grad for p in every if p.ndim > 1 and p.grad is not None]
    return loss, matrices, torch.cat([p.grad.reshape(-1) for p in every if p.ndim == 1 and p.grad is not None])


def far(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


@needs_triton
@pytest.mark.parametrize(
    ("tied", "whole", "buffered", "packs", "every"),
    [(True, 2, True, 2, 3), (True, 1, False, 1, 3), (False, 1, True, 1, 3), (False, 2, False, 1, 1)],
)
def test_by_hand_gives_autograds_gradients(tied: bool, whole: int, buffered: bool, packs: int, every: int) -> None:
    """float32: the loss and each parameter's gradient, kept or recomputed, several packs added up, few positions and
    more than the model is wide."""
    some = [pack_of([3, 72, 1], 1, every), pack_of([20, 9], 2)][:packs]
    want_loss, want, want_norms = by_autograd(decoder_of(tied), some)
    loss, got, got_norms = by_hand(decoder_of(tied), some, whole, buffered)
    assert far(loss, want_loss) < 1e-6 and far(got_norms, want_norms) < 5e-6
    assert len(got) == len(want) == 9 + (not tied)
    assert max(far(g, w) for g, w in zip(got, want, strict=True)) < 5e-6


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ids", [[5] * 97, [5] * 64, [7, *[5] * 32, 8], [*range(40), *[3] * 30], [96], [4, 7, 4, 7, 7]])
def test_the_rows_of_an_id_are_added_up(ids: list[int], dtype: torch.dtype) -> None:
    """An id that comes more often than a program adds at once (32), exactly so often, twice as often, and once."""
    ids_T = torch.tensor(ids, device=DEVICE)
    d_TH = torch.randn(len(ids), 72, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    got = torch.full((97, 72), 2.0, device=DEVICE, dtype=dtype)
    full_kernels.add_rows(d_TH, ids_T, got, 0.5)
    want = torch.full((97, 72), 2.0, device=DEVICE, dtype=torch.float64)
    close = 1e-6 if dtype == torch.float32 else 4e-3
    assert far(got, want.index_add(0, ids_T, d_TH.double(), alpha=0.5)) < close


def step_of(optim: str, decoder: Decoder | None = None, **settings: Any) -> FullStep:
    """On autograd's layers: what a CPU runs."""
    decoder = decoder or decoder_of(dtype=torch.bfloat16)
    config = replace(CONFIG, optim=optim, **settings)
    optimizer, step = full.equip(config, decoder, whole=2, by_hand=False)
    optimizer.rate.fill_(3e-3)
    return step


def weights(step: FullStep) -> list[Tensor]:
    return [p.detach().clone() for p in step.decoder.parameters()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_inside_backward_is_after_it_without_clipping() -> None:
    """Bit for bit, three steps: the same gradients, draws and moments. With clipping they part: one is by the global
    norm, the other by each tensor's."""
    for max_norm, equal in ((0.0, True), (0.5, False)):
        one, other = (step_of(optim, max_grad_norm=max_norm) for optim in ("adamw_8bit", "adamw_8bit_in_backward"))
        for i in range(3):
            pack = pack_of([9, 20], i)
            got, want = one.run([pack], share_of([pack])), other.run([pack], share_of([pack]))
            if equal or i == 0:
                assert torch.allclose(got.grad_norm, want.grad_norm, rtol=1e-5) and torch.equal(got.loss, want.loss)
        assert same(weights(one), weights(other)) is equal


@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_inside_backward_each_gradient_has_its_share(max_norm: float) -> None:
    """Of K gradients each is at most max_norm / √K long, the norms' weights together being one; a short one stays as it
    is. Told by the first step's moments: a tenth of what each gradient was clipped to."""
    step = step_of("adamw_8bit_in_backward", decoder_of(), max_grad_norm=max_norm)
    _, grads, norms = by_autograd(decoder_of(), [pack_of([9, 20], 0)])
    step.run([pack_of([9, 20], 0)], share_of([pack_of([9, 20], 0)]))
    optimizer = step.optimizer
    assert isinstance(optimizer, AdamW8)
    share = max_norm / (len(grads) + 1) ** 0.5
    assert max_norm > 1 or max(float(g.norm()) for g in grads) > 3 * share
    for grad, moments in zip(grads, optimizer.moments, strict=True):
        want = 0.1 * grad * min(1.0, share / float(grad.norm()))
        assert float(moments.m_scale.max()) == pytest.approx(float(want.abs().max()), rel=1e-3)
    assert far(optimizer.vector_m, 0.1 * norms * min(1.0, share / float(norms.norm()))) < 1e-3


@pytest.mark.parametrize("optim", ["adamw_8bit", "adamw_8bit_in_backward"])
def test_it_learns_as_32_bits_do(optim: str) -> None:
    """One pack, fifteen steps: the loss falls to within 3 % of AdamW's in 32 bits."""
    pack, losses = pack_of([9, 20, 14], 1), {}
    for name in (optim, "adamw"):
        step = step_of(name, max_grad_norm=0.0)
        run = [float(step.run([pack], share_of([pack])).loss) for _ in range(15)]
        losses[name] = run[-1]
        assert run[-1] < 0.8 * run[0]
    assert math.isclose(losses[optim], losses["adamw"], rel_tol=0.03)


def test_clipping_is_by_the_exact_global_norm() -> None:
    """Two packs added up in the buffer; float32 weights, so that only the moments are rounded: the first step moves
    each value by the rate whatever the norm, the second by what the ratio of the norms says."""
    packs = [pack_of([9, 20], 1), pack_of([14], 2)]
    decoder = decoder_of()
    _, grads, norms = by_autograd(copy.deepcopy(decoder), packs)
    want = torch.cat([g.reshape(-1) for g in (*grads, norms)]).double().norm()
    step = step_of("adamw_8bit", decoder)
    result = step.run(packs, share_of(packs))
    assert math.isclose(float(result.grad_norm), float(want), rel_tol=1e-5)
    assert isinstance(step.optimizer, AdamW8)
    tops = torch.stack([m.m_scale.max() for m in step.optimizer.moments])
    long = torch.stack([g.abs().max() for g in grads])
    assert torch.allclose(tops, 0.1 * long * (0.5 / (want.float() + 1e-6)), rtol=1e-4)


@pytest.mark.parametrize("optim", ["adamw_8bit", "adamw_8bit_in_backward"])
def test_a_bad_value_updates_nothing(optim: str) -> None:
    step, pack = step_of(optim), pack_of([9, 20], 1)
    step.run([pack], share_of([pack]))
    before, state = weights(step), copy.deepcopy(step.optimizer.state_dict())
    result = step.run([pack], share_of([pack]) * math.nan)
    assert result.skipped == 1 and same(weights(step), before)
    assert same(list(step.optimizer.state_dict().values()), list(state.values()))
    assert step.run([pack], share_of([pack])).skipped == 0 and not same(weights(step), before)


def test_a_gradient_that_overflows_inside_backward_leaves_good_weights() -> None:
    """The loss is finite, one gradient is not: that matrix stays, the step says so, every weight is finite."""
    step, pack = step_of("adamw_8bit_in_backward"), pack_of([9, 20], 1)
    bad = step.decoder.layers[1].attn.o.weight  # type: ignore[union-attr]
    handle = bad.register_hook(lambda g: g * math.inf)  # type: ignore[operator]
    before = bad.detach().clone()  # type: ignore[operator]
    result = step.run([pack], share_of([pack]))
    handle.remove()
    assert result.skipped == 1 and torch.isfinite(result.loss) and torch.equal(bad, before)  # type: ignore[arg-type]
    assert all(bool(torch.isfinite(w).all()) for w in weights(step))


@pytest.mark.parametrize("optim", ["adamw_8bit", "adamw_8bit_in_backward"])
def test_it_goes_on_from_its_state_bit_for_bit(optim: str, tmp_path: Path) -> None:
    """Two steps, saved and read as a checkpoint is, two more: as four in one go."""
    straight = step_of(optim)
    for i in range(4):
        pack = pack_of([9, 20], i)
        straight.run([pack], share_of([pack]))
        if i == 1:
            torch.save(straight.optimizer.state_dict(), tmp_path / "state")
            middle = weights(straight)
    other = step_of(optim)
    for parameter, value in zip(other.decoder.parameters(), middle, strict=True):
        parameter.data.copy_(value)
    other.optimizer.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    other.step_index.fill_(2)
    for i in (2, 3):
        pack = pack_of([9, 20], i)
        other.run([pack], share_of([pack]))
    assert same(weights(straight), weights(other))


def test_no_counter_is_drawn_twice() -> None:
    """Each matrix has counters of its own, as many as values."""
    from minitune.train.adamw8 import BLOCK

    optimizer = AdamW8(decoder_of().parameters(), CONFIG, False)
    ends = 0
    for first, matrix in zip(optimizer.firsts, optimizer.matrices, strict=True):
        assert ends <= first < 1 << 31
        ends = first + matrix.numel()
    assert ends <= len(optimizer.m) == BLOCK * len(optimizer.m_scale)


@needs_triton
def test_a_step_by_hand_is_autograds() -> None:
    """float32 weights, both ways, with the optimizer inside backward: the same loss and norm, nearly the same weights
    (the sums differ in their last digits, and so now and then a moment's code)."""
    pack, made = pack_of([9, 20], 1), []
    for hand in (False, True):
        decoder = decoder_of()
        config = replace(CONFIG, optim="adamw_8bit_in_backward")
        optimizer = AdamW8(decoder.parameters(), config, True)
        step = FullStep(decoder, optimizer, FullStack(decoder, 1) if hand else None, max_grad_norm=0.5)
        optimizer.rate.fill_(1e-3)
        made.append((step.run([pack], share_of([pack])), weights(step)))
    (a, w), (b, v) = made
    assert torch.allclose(a.loss, b.loss, rtol=1e-5) and torch.allclose(a.grad_norm, b.grad_norm, rtol=1e-5)
    start = [p.detach() for p in decoder_of().parameters()]
    assert max(far(x - s, y - s) for x, y, s in zip(w, v, start, strict=True)) < 0.02


@needs_triton
def test_kernels_compiled_early_are_those_that_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is launched on `meta` has the constants and dtypes of a step over real tensors."""
    seen = launches_of((fused_ops, attention_kernels, kernels, full_kernels, adamw8), monkeypatch)
    monkeypatch.setattr(adamw8, "by_kernel", lambda device: True)
    monkeypatch.setattr(full_step, "layout_of", lambda pack, _: replace(step.layout_of(pack, decoder), kernel="short"))
    decoder, pack = decoder_of(), pack_of([9, 20], 1)
    optimizer = AdamW8(decoder.parameters(), replace(CONFIG, optim="adamw_8bit_in_backward"), True)
    FullStep(decoder, optimizer, FullStack(decoder, 1)).run([pack], share_of([pack]))
    ran = set(seen)
    seen.clear()
    with torch.no_grad():
        launch_full(decoder.config, torch.float32, 2)
        adamw8.launch_all(torch.float32)
    assert ran == seen


@pytest.mark.gpu
@pytest.mark.parametrize("whole", [1, 2])
@pytest.mark.parametrize("optim", ["adamw", "adamw_8bit", "adamw_8bit_in_backward"])
def test_captured_steps_are_steps_by_hand(optim: str, whole: int) -> None:
    """bfloat16, packs that fill the capacity: six captured steps leave what six uncaptured ones do, bit for bit, with
    weights' gradients and short documents on other streams and without; the loss is that of autograd's layers."""
    config = replace(CONFIG, optim=optim)
    packs = [pack_of([70, 58], i).to(torch.device("cpu")) for i in range(6)]
    packs = [replace(p, predict=p.predict[:40], targets=p.targets[:40], supervised=40) for p in packs]
    decoders = [decoder_of(dtype=torch.bfloat16) for _ in range(3)]
    one, other = (full.equip(config, d, whole)[1] for d in decoders[:2])
    assert one.stack is not None and other.stack is not None
    other.stack.beside.stream = other.stack.apart.stream = None
    plain = full.equip(config, decoders[2], whole, by_hand=False)[1]
    before = weights(one)
    captured = graph.capture(one, [graph.Capacity(128, 3, 40)], packs[0], longest=70)
    assert same(weights(one), before) and float(one.step_index) == 0
    for i, pack in enumerate(packs):
        batch = StepBatch([pack], 2)
        got, want, rough = (step(batch, 1e-3 / (i + 1)) for step in (captured, other, plain))
        assert torch.equal(got.loss, want.loss) and torch.equal(got.grad_norm, want.grad_norm)
        assert float(got.loss) == pytest.approx(float(rough.loss), rel=0.03) and not float(got.skipped)
    assert captured.plain_steps == 0 and same(weights(one), weights(other)) and not same(weights(one), before)


@needs_triton
@pytest.mark.parametrize("optim", ["adamw_8bit", "adamw_8bit_in_backward"])
def test_the_contract_knows_what_a_step_writes(monkeypatch: pytest.MonkeyPatch, optim: str) -> None:
    monkeypatch.setattr(full, "why_plain", lambda decoder: "")
    step = full.equip(replace(CONFIG, optim=optim), decoder_of(), 1)[1]
    contract = graph.Contract.of(step)
    contract.check()
    if isinstance(step.sink, full_step.Buffer):
        step.sink.grads[0] = (was := step.sink.grads[0]).clone()
    else:
        assert step.sink is not None
        step.sink.scratch = (was := step.sink.scratch).clone()
    with pytest.raises(RuntimeError, match="(grads 0|scratch) was"):
        contract.check()
    if isinstance(step.sink, full_step.Buffer):
        step.sink.grads[0] = was
    else:
        step.sink.scratch = was
    contract.check()
    assert step.stack is not None
    step.stack.norm_grad = step.stack.norm_grad.clone()
    with pytest.raises(RuntimeError, match="norm_grad was"):
        contract.check()


def test_what_does_not_go_together_is_refused() -> None:
    step, packs = step_of("adamw_8bit_in_backward"), [pack_of([9], 1), pack_of([9], 2)]
    with pytest.raises(ValueError, match="one pack"):
        step.run(packs, share_of(packs))
    with pytest.raises(UserError, match="bfloat16"):
        step_of("adamw_8bit", decoder_of(dtype=torch.float16))
