"""The fused and the captured step against the plain one (invariant 4)."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from minitune.config import TrainConfig
from minitune.data.loader import Pack, StepBatch, make_pack
from minitune.data.template import Encoded
from minitune.model import four_bits
from minitune.model.decoder import Decoder, DecoderConfig
from minitune.model.lora import Dropout, LoraConfig, attach
from minitune.model.quantized import packed_linears
from minitune.train import graph
from minitune.train.optim import AdamW
from minitune.train.step import TrainStep, pack_loss

SHAPE = DecoderConfig(
    vocab_size=331,
    hidden_size=128,
    intermediate_size=192,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    embedding_multiplier=3.0,
    residual_multiplier=0.7,
    logits_scaling=2.0,
)


def decoder_on(device: str, dtype: torch.dtype, shape: DecoderConfig = SHAPE, four: bool = False) -> Decoder:
    """A random decoder whose adapters are not zero, the same on every device. four: its layers are of 4 bits."""
    with torch.device("meta"):
        decoder = Decoder(shape)
        decoder = four_bits.make_room(decoder) if four else decoder
    decoder.allocate(torch.device(device), dtype)
    generator = torch.Generator().manual_seed(3)
    attach(decoder, LoraConfig(r=4, lora_dropout=0.1), seed=1)
    with torch.no_grad():
        for parameter in decoder.parameters():
            values = torch.randn(parameter.shape, generator=generator) * 0.1
            parameter.copy_(values + 1 if parameter.ndim == 1 else values)
        for linear in packed_linears(decoder):
            values = torch.randn(linear.out_features, linear.in_features, generator=generator) * 0.1
            four_bits.Rounding(linear.weight_packed, linear.weight_scale).copy_(values)
    return decoder.train()


def fused_on(
    device: str, dtype: torch.dtype, keep: bool = True, shape: DecoderConfig = SHAPE, four: bool = False
) -> TrainStep:
    """The same step over `model.fused`."""
    from minitune.model.fused import FusedStack

    decoder = decoder_on(device, dtype, shape, four)
    decoder.stack = FusedStack(decoder, keep)
    return TrainStep(decoder, AdamW([decoder.stack.flat], TrainConfig()), dropout=0.1, seed=5)


def adapters(step: TrainStep) -> list[torch.Tensor]:
    return [p.detach() for n in step.decoder.linears() if n.lora is not None for p in (n.lora.A, n.lora.B)]


def step_on(device: str, dtype: torch.dtype, four: bool = False) -> TrainStep:
    decoder = decoder_on(device, dtype, four=four)
    learning = [p for p in decoder.parameters() if p.requires_grad]
    return TrainStep(decoder, AdamW(learning, TrainConfig()), dropout=0.1, seed=5)


def packs(count: int) -> list[Pack]:
    """Packs of changing sizes."""
    generator = torch.Generator().manual_seed(7)
    out = []
    for n in range(count):
        rows = []
        for _ in range(2 + n % 4):
            length = int(torch.randint(3, 70, (1,), generator=generator))
            ids = torch.randint(0, SHAPE.vocab_size, (length,), generator=generator).tolist()
            rows.append(Encoded(ids, [-100, *ids[1:]]))
        out.append(make_pack(rows, [10 * n + i for i in range(len(rows))]))
    return out


def test_fused_steps_are_plain_steps() -> None:
    """Dropout, clipping and updates over changing packs, two a step: losses, norms and what was learned agree."""
    pytest.importorskip("triton", reason="Triton is not installed (pip install triton runs this in its interpreter)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    plain, fused = step_on(device, torch.float32), fused_on(device, torch.float32, keep=False)
    found = packs(4)
    for i in (0, 2):
        batch = StepBatch(found[i : i + 2], 1)
        ours, want = fused(batch, 1e-3 / (i + 1)), plain(batch, 1e-3 / (i + 1))
        assert float(ours.loss) == pytest.approx(float(want.loss), rel=1e-6)
        assert float(ours.grad_norm) == pytest.approx(float(want.grad_norm), rel=1e-5)
    for a, b in zip(adapters(fused), adapters(plain), strict=True):
        assert float((a - b).norm() / b.norm()) < 5e-5  # AdamW divides small gradients by their own size


def test_the_contract_names_what_moved() -> None:
    """A parameter that was replaced, one whose memory was, and another dtype are each an error by name."""
    step = step_on("cpu", torch.float32)
    step(StepBatch(packs(1), 1), 1e-3)
    step.optimizer.parameters[0].grad = torch.zeros_like(step.optimizer.parameters[0])
    contract = graph.Contract.of(step)
    contract.check()
    step(StepBatch(packs(1), 1), 1e-3)  # it drops the gradients
    with pytest.raises(RuntimeError, match="gradient 0"):
        contract.check()
    contract = graph.Contract.of(step)
    step.decoder.norm.weight.data = step.decoder.norm.weight.data.clone()
    with pytest.raises(RuntimeError, match=r"norm\.weight"):
        contract.check()
    contract = graph.Contract.of(step)
    step.optimizer.load_state_dict(copy.deepcopy(step.optimizer.state_dict()))
    with pytest.raises(RuntimeError, match="moments"):
        contract.check()
    contract = graph.Contract.of(step)
    linear = step.decoder.layers[1].mlp.down
    linear.weight = torch.nn.Parameter(linear.weight.half(), requires_grad=False)
    with pytest.raises(RuntimeError, match=r"layers\.1\.mlp\.down\.weight"):
        contract.check()


@pytest.mark.gpu
@pytest.mark.parametrize(("keep", "four"), [(True, False), (False, False), (False, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_captured_steps_are_plain_steps(dtype: torch.dtype, keep: bool, four: bool) -> None:
    """20 steps with changing inputs, rates and capacities, dropout on: losses, norms and what was learned agree.

    float32 is compared with the plain layers, tightly. In bfloat16 this random model's gradient is mostly rounding
    (plain steps part from float32's by 40 % in the norm), so there the captured step is compared with the same layers
    uncaptured, whose sums differ by the padding alone, and its loss with the plain layers' (that each gradient is no
    less exact than the plain one's is tests/model/test_fused.py's)."""
    half = dtype == torch.bfloat16
    close, near = (3e-2, 5e-2) if half else (1e-4, 4e-4)
    reference = fused_on("cuda", dtype, keep, four=four) if half else None
    plain, base = step_on("cuda", dtype, four), fused_on("cuda", dtype, keep, four=four)
    batches = [StepBatch([pack], len(pack.lengths)) for pack in packs(20)]
    sizes = [(b.tokens, len(b.packs[0].lengths), b.supervised) for b in batches]
    capacities = graph.capacities(sizes, most=2)
    sample = next(b.packs[0] for b in batches if capacities[0].holds(b.packs[0]))
    captured = graph.capture(base, capacities, sample, longest=70)
    assert float(base.step_index) == 0 and captured.plain_steps == 0
    for i, batch in enumerate(batches):
        ours, want = captured(batch, 1e-3 / (i + 1)), plain(batch, 1e-3 / (i + 1))
        assert float(ours.loss) == pytest.approx(float(want.loss), rel=close)
        if reference is not None:
            want = reference(batch, 1e-3 / (i + 1))
            assert float(ours.loss) == pytest.approx(float(want.loss), rel=1e-2)
        assert float(ours.grad_norm) == pytest.approx(float(want.grad_norm), rel=near)
        assert not float(ours.skipped)
    assert captured.plain_steps == 0
    for a, b in zip(adapters(base), adapters(reference or plain), strict=True):
        assert float((a - b).norm() / b.norm()) < close
    base.decoder.norm.weight.data = base.decoder.norm.weight.data.clone()
    with pytest.raises(RuntimeError, match="no longer holds"):
        captured(batches[0], 1e-3)


def test_a_row_in_a_pack_is_what_it_is_alone() -> None:
    """Through the fused layers, dropout on: a pack's loss is the sum of its rows' losses."""
    pytest.importorskip("triton", reason="Triton is not installed (pip install triton runs this in its interpreter)")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    decoder = fused_on(device.type, torch.float32).decoder
    rows = [Encoded([i] * 3 + list(range(5, n)), [-100] * 3 + list(range(5, n))) for i, n in enumerate((20, 71, 9))]
    step = torch.full((), 3, dtype=torch.int64, device=device)

    def loss(*numbers: int) -> float:
        pack = make_pack([rows[i] for i in numbers], numbers).to(device)
        with torch.no_grad():
            return float(pack_loss(decoder, pack, Dropout.at(5, step, pack.token_uids, 0.1)))

    alone = [loss(i) for i in range(3)]
    assert loss(0, 1, 2) == pytest.approx(sum(alone), rel=1e-5)
    assert loss(2, 0, 1) == pytest.approx(sum(alone), rel=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_another_capacity_gives_the_same_loss(dtype: torch.dtype, close: float) -> None:
    """The same batch and draws in a small graph and in a large one."""
    step = fused_on("cuda", dtype)
    [pack] = packs(1)
    sizes = [graph.Capacity(512, 9, 448), graph.Capacity(256, 5, 192)]
    captured = graph.capture(step, sizes, pack, longest=70)
    batch = StepBatch([pack], len(pack.lengths))
    small = captured(batch, 0.0)
    del captured.graphs[1]
    step.step_index.zero_()
    large = captured(batch, 0.0)
    assert captured.plain_steps == 0
    assert float(small.loss) == pytest.approx(float(large.loss), rel=close)
    assert float(small.grad_norm) == pytest.approx(float(large.grad_norm), rel=10 * close)


@pytest.mark.gpu
@pytest.mark.parametrize(("keep", "four"), [(True, False), (False, False), (False, True)])
def test_what_is_compiled_early_is_not_compiled_again(keep: bool, four: bool) -> None:
    """A run's kernels, all and none in vain: a capture after `compile_kernels` compiles nothing."""
    import triton

    from minitune.model.fused_compile import compile_kernels

    compiled: list[str] = []

    def hook(*args: object, **more: object) -> None:
        compiled.append(str(more["fn"]))

    # a shape of its own: what another test has compiled would not be compiled again
    step = fused_on("cuda", torch.bfloat16, keep, replace(SHAPE, hidden_size=160 + 32 * keep + 64 * four), four)
    lora = step.decoder.lora_config
    assert lora is not None
    packed = packs(4)
    [capacity] = graph.capacities([(p.tokens, len(p.lengths), p.supervised) for p in packed], most=1)
    kept, triton.knobs.runtime.jit_post_compile_hook = triton.knobs.runtime.jit_post_compile_hook, hook
    try:
        with ThreadPoolExecutor(8) as pool:
            group = step.decoder.rounded
            compile_kernels(step.decoder.config, torch.bfloat16, lora, capacity.documents, keep, pool, group)
        early = len(compiled)
        graph.capture(step, [capacity], max(packed, key=lambda p: p.tokens), longest=70)
    finally:
        triton.knobs.runtime.jit_post_compile_hook = kept
    assert early > 5 and compiled[early:] == []  # some are in the process already, from other tests


@pytest.mark.parametrize("most", [3, 8])
def test_capacities_hold_every_size_with_little_padding(most: int) -> None:
    """Every size fits one; eight on sizes like the real data's pad the tokens by less than a tenth, and the supervised
    positions by less than one capacity a number of tokens would."""
    generator = torch.Generator().manual_seed(0)
    tokens = (torch.randn(700, generator=generator) * 90 + 790).int()
    positions = (tokens * 0.42 + torch.randn(700, generator=generator) * 40).int()
    sizes = [(t, 16, p) for t, p in zip(tokens.tolist(), positions.tolist(), strict=True)]
    found = graph.capacities(sizes, most)
    assert len(found) <= most and found == sorted(found, key=lambda c: (-c.tokens, -c.positions))
    used = []
    for t, d, p in sizes:
        fitting = [c for c in found if c.tokens >= t and c.documents > d and c.positions >= p]
        used.append(min(fitting, key=lambda c: (c.tokens, c.positions)))
    if most == 8:
        assert sum(c.tokens for c in used) < 1.1 * int(tokens.sum())
        highest = {c.tokens: max(x.positions for x in used if x.tokens == c.tokens) for c in used}
        assert sum(c.positions for c in used) < 0.9 * sum(highest[c.tokens] for c in used)
    assert graph.capacities([]) == []


def test_capacities_of_many_sizes_are_found_quickly() -> None:
    """A thousand different sizes, as long steps have them; no capacity is larger than the largest asks for."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3000, 8191, (1000,), generator=generator).tolist()
    sizes = [(t, 100, 200 + (i * 7919) % (t - 300)) for i, t in enumerate(tokens)]
    found = graph.capacities(sizes)
    assert len(found) <= 8 and found[0].tokens <= 8192
    assert all(any(c.tokens >= t and c.positions >= p for c in found) for t, _, p in sizes)
