"""Several processes' step of adapters: each makes its gradients, they are summed, each updates. On a card the two halves
are graphs, and the sum lies between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from runs import log_of, with_
from test_fast import loader_of
from test_graph import SHAPE, decoder_on
from test_parallel import STEADY, close, together
from torch import Tensor

from minitune.config import TrainConfig
from minitune.data.loader import Loader, StepBatch
from minitune.data.template import Encoded
from minitune.model.fused import FusedStack
from minitune.train import fast, graph
from minitune.train.optim import AdamW, LossScale
from minitune.train.run import train
from minitune.train.step import TrainStep

SETTINGS: dict[str, Any] = {"rows_per_step": 5, "tokens_per_pack": 96, "seed": 3}


class Other:
    """What joins a step with that of a second process, which is another step of this one."""

    def __init__(self) -> None:
        self.step: TrainStep
        self.batch: StepBatch

    def gather(self, parameters: Sequence[Tensor], loss: Tensor) -> Tensor:
        share = torch.full((), 1 / self.batch.supervised, device=loss.device)
        rest = self.step.gradients([pack.to(loss.device) for pack in self.batch.packs], share)
        for mine, theirs in zip(parameters, self.step.optimizer.parameters, strict=True):
            assert mine.grad is not None and theirs.grad is not None
            mine.grad += theirs.grad
            theirs.grad.zero_()
        return loss + rest

    def norm(self, norm: Tensor) -> Tensor:
        return norm


def step_of(device: str, dtype: torch.dtype, by_hand: bool, sharing: Other | None = None) -> TrainStep:
    decoder = decoder_on(device, torch.float32)
    parameters = [p for p in decoder.parameters() if p.requires_grad]
    if by_hand:
        decoder.stack = FusedStack(decoder)
        parameters = [decoder.stack.flat]
    scale = LossScale(decoder.device, start=1024) if dtype == torch.float16 else None
    optimizer = AdamW(parameters, TrainConfig(adam_epsilon=1e-3))
    return TrainStep(decoder, optimizer, dropout=0.1, seed=5, max_grad_norm=0.5, loss_scale=scale, sharing=sharing)


def rows_of(count: int) -> list[Encoded]:
    generator = torch.Generator().manual_seed(11)
    out = []
    for _ in range(count):
        length = int(torch.randint(6, 60, (1,), generator=generator))
        ids = torch.randint(0, SHAPE.vocab_size, (length,), generator=generator).tolist()
        out.append(Encoded(ids, [-100, *ids[1:]]))
    return out


CARD = pytest.mark.gpu


@pytest.mark.parametrize(
    ("device", "by_hand", "dtype"),
    [
        ("cpu", False, torch.float32),
        ("cpu", False, torch.float16),
        pytest.param("cuda", False, torch.float32, marks=CARD),
        pytest.param("cuda", True, torch.float32, marks=CARD),
        pytest.param("cuda", True, torch.float16, marks=CARD),
    ],
)
def test_halves_are_the_whole_step(device: str, by_hand: bool, dtype: torch.dtype) -> None:
    """Two processes' shares, some of several packs, the last step with less: loss, norm and what was learned are those
    of one process that has all rows, with clipping, dropout and a loss scale (dtype: whether there is one). On a card
    the first process's step is captured, and a loss that is not finite changes nothing."""
    rows = rows_of(23)
    sharing = Other()
    alone, first, second = (step_of(device, dtype, by_hand, s) for s in (None, sharing, None))
    second.keeps_gradients = True
    sharing.step = second
    loaders = [Loader(rows, **SETTINGS, rank=rank, ranks=2) for rank in (0, 1)]
    ours: Any = first
    if device == "cuda":
        ours, line = fast.quicken(first, loaders[0], [5], 5)
        assert line.startswith("captured: ") and isinstance(ours, graph.CapturedStep)
    whole = list(Loader(rows, **SETTINGS).batches())
    for i, (want, mine, theirs) in enumerate(zip(whole, *(loader.batches() for loader in loaders), strict=True)):
        sharing.batch = theirs
        got, expected = ours(mine, 1e-3 * (i + 1)), alone(want, 1e-3 * (i + 1))
        assert float(got.loss) == pytest.approx(float(expected.loss), rel=1e-5)
        assert float(got.grad_norm) == pytest.approx(float(expected.grad_norm), rel=1e-4)
        assert not float(got.skipped)
        learned = zip(first.optimizer.parameters, second.optimizer.parameters, strict=True)
        with torch.no_grad():
            for a, b in learned:
                b.copy_(a)
        second.step_index.copy_(first.step_index)
        if second.loss_scale is not None and first.loss_scale is not None:
            second.loss_scale.load_state_dict(first.loss_scale.state_dict())
    for a, b in zip(first.optimizer.parameters, alone.optimizer.parameters, strict=True):
        assert float((a - b).detach().norm() / b.detach().norm()) < 1e-5
    if device == "cuda":
        assert sum(len(b.packs) == 1 for b in loaders[0].batches()) > 0 and ours.plain_steps == 0
    before = [p.detach().clone() for p in first.optimizer.parameters]
    with torch.no_grad():
        second.optimizer.parameters[0].fill_(float("nan"))
    assert float(ours(mine, 1e-3).skipped)
    assert all(torch.equal(a, b) for a, b in zip(before, first.optimizer.parameters, strict=True))


def test_the_same_steps_are_captured_for_all() -> None:
    """Each process finds the same steps to be one pack, in its own sizes; a process without a row has one token."""
    settings: dict[str, Any] = {"rows_per_step": 3, "tokens_per_pack": 60}
    rows = rows_of(40)
    for ranks in (2, 4):
        plans = []
        for rank in range(ranks):
            loader = Loader(rows, **settings, rank=rank, ranks=ranks)
            steps = [len(loader.steps(0))] * 2
            plan = fast.one_pack_steps(loader, steps, sum(steps) - 2)
            plans.append(plan)
            found = {(epoch, step): sizes for epoch, step, *sizes in plan.tolist()}
            for epoch in (0, 1):
                for step in range(steps[epoch] - 2 * epoch):
                    batch = loader.batch(epoch, step)
                    assert ((epoch, step) in found) == (len(batch.packs) == 1)
                    if len(batch.packs) == 1:
                        pack = batch.packs[0]
                        assert found[epoch, step] == [pack.tokens, len(pack.lengths), pack.supervised]
        assert all((plan[:, :2] == plans[0][:, :2]).all() for plan in plans)
        assert 0 < len(plans[0]) < sum(steps) - 2 or ranks == 4
    assert (plans[3][:, 2:] == [1, 1, 0]).all(1).any()


def test_even_shares_are_one_pack_each() -> None:
    """A step of two packs' tokens, dealt to two processes: one pack each, a percent apart at most."""
    loader = loader_of(4000, rows_per_step=16)
    shares = [Loader(loader.rows, rows_per_step=16, tokens_per_step=2 * 8192, rank=r, ranks=2) for r in (0, 1)]
    steps = list(zip(*(share.batches() for share in shares), strict=True))[:-1]
    assert len(steps) > 3
    for pair in steps:
        assert [len(batch.packs) for batch in pair] == [1, 1]
        a, b = (batch.packs[0].tokens for batch in pair)
        assert abs(a - b) < 0.01 * max(a, b)


@pytest.mark.gpu
def test_two_cards_are_one(processes: Any, config: TrainConfig, tmp_path: Any) -> None:
    """A captured run on two cards, two of its steps of several packs: the numbers of one card, in float32."""
    if torch.cuda.device_count() < 2:
        pytest.skip("two cards are wanted")
    config = with_(config, device="cuda", dtype="float32", tokens_per_pack=96, num_train_epochs=2, **STEADY)
    train(config, quiet=True)
    many = with_(config, output=str(tmp_path / "many"))
    launch = together(processes, tmp_path, many, 2)
    assert "captured: " in launch.said[0], launch.said
    close(config.output, many.output, 1e-5)
    assert len(log_of(many.output)) > 4
