"""The same step, captured: one CUDA graph a capacity, replayed with each batch's numbers.

`capture(step, …)` returns a callable of the plain step's signature. A capacity is a number of tokens, of
documents and of supervised positions; a batch runs in the smallest one that holds it, padded with one more document
that nothing is learned from. What no capacity holds runs through the plain step.

Several processes (`step.sharing`): a graph a capacity for the gradients, one for the update, and the sum over the
processes between them is not captured. So each process may take its own capacity, or the plain step, for the same step.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from minitune.data.loader import Pack, StepBatch
from minitune.model import contract
from minitune.train.optim import LossScale
from minitune.train.step import StepResult, TrainStep

TOKENS, POSITIONS = 128, 64  # what capacities are multiples of


@dataclass(frozen=True)
class Capacity:
    """tokens, documents (the padding's included) and supervised positions of a captured step."""

    tokens: int
    documents: int
    positions: int

    def holds(self, pack: Pack) -> bool:
        # one document is the padding's
        return pack.tokens <= self.tokens and len(pack.lengths) < self.documents and pack.supervised <= self.positions


def capacities(sizes: Sequence[tuple[int, int, int]], most: int = 8, position: float = 0.1) -> list[Capacity]:
    """At most `most` capacities for packs of these (tokens, documents, supervised) sizes, largest first.

    Every multiple of 128 tokens and 64 positions that occurs, the two whose joining makes the sum over all packs grow
    least joined until few enough are left. position: what one costs, a token being 1 (of a head's and the layers'
    multiplications; MiniCPM-2B: 0.12).
    """
    rounded = Counter((-(-t // TOKENS) * TOKENS, -(-p // POSITIONS) * POSITIONS) for t, _, p in sizes)
    boxes = [(t, p, n) for (t, p), n in rounded.items()]
    grain = 1
    while len(boxes) > 64:  # joining pairs takes the cube of their number: neighbours are joined first
        grain *= 2
        near: dict[tuple[int, int], tuple[int, int, int]] = {}
        for t, p, n in boxes:
            key = -(-t // (grain * TOKENS)), -(-p // (grain * POSITIONS))
            other = near.get(key, (0, 0, 0))
            near[key] = max(t, other[0]), max(p, other[1]), n + other[2]
        boxes = list(near.values())
    while len(boxes) > most:

        def growth(pair: tuple[tuple[int, int, int], tuple[int, int, int]]) -> float:
            tokens, positions = (max(box[i] for box in pair) for i in (0, 1))
            return sum(n * (tokens - t + position * (positions - p)) for t, p, n in pair)

        a, b = min(combinations(boxes, 2), key=growth)
        boxes = [box for box in boxes if box not in (a, b)] + [(max(a[0], b[0]), max(a[1], b[1]), a[2] + b[2])]
    documents = max((d for _, d, _ in sizes), default=0) + 1
    return [Capacity(t, documents, p) for t, p in sorted({(t, p) for t, p, _ in boxes}, reverse=True)]


class Contract(contract.Contract):
    """Of a training step: each parameter, gradient, moment and input."""

    @staticmethod
    def of(step: TrainStep, *inputs: tuple[str, Callable[[], Any]]) -> Contract:
        """Of a step and further inputs, each by its name and how it is found."""
        places: list[tuple[str, Callable[[], Any]]] = list(inputs)
        for name, module in step.decoder.named_modules():
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    places.append((f"{name}.{key}", partial(module._parameters.get, key)))
            for key in module._buffers:
                places.append((f"{name}.{key}", partial(module._buffers.get, key)))
        for i, parameter in enumerate(step.optimizer.parameters):
            places.append((f"gradient {i}", partial(getattr, parameter, "grad")))
        places += [*step.places(), *step.optimizer.places(), ("step_index", partial(getattr, step, "step_index"))]
        if step.loss_scale is not None:
            places += [(f"loss scale's {key}", partial(getattr, step.loss_scale, key)) for key in ("scale", "good")]
        return Contract(places)


class _Graph:
    """One captured capacity: static inputs, the graph, static outputs."""

    def __init__(self, step: TrainStep, capacity: Capacity, share: Tensor, longest: int):
        self.capacity, self.share = capacity, share
        T, S, P = capacity.tokens, capacity.documents, capacity.positions
        device = step.decoder.device
        # One copy carries all of a batch's numbers: ids | positions | uids | predict | targets | cu_seqlens.
        self.host = torch.zeros(3 * T + 2 * P + S + 1, dtype=torch.int64).pin_memory()
        self.blob = torch.zeros_like(self.host, device=device)
        self.parts = (T, T, T, P, P, S + 1)
        ids, positions, uids, predict, targets, cu = self.blob.split(self.parts)
        self.cu = torch.zeros(S + 1, dtype=torch.int32, device=device)
        self.cu_source = cu
        self.pack = Pack(ids, positions, uids, self.cu, predict, targets, lengths=(T,), supervised=P, longest=longest)
        self.graph = torch.cuda.CUDAGraph()
        self.out: Tensor | None = None
        self.copied = torch.cuda.Event()

    def fill(self, pack: Pack, supervised: int) -> None:
        """Lays the pack into the static inputs; the rest becomes one document of padding. supervised: of the step."""
        self.copied.synchronize()  # the last copy out of the pinned buffer, long done
        T = self.capacity.tokens
        ids, positions, uids, predict, targets, cu = self.host.split(self.parts)
        n, p, s = pack.tokens, pack.supervised, len(pack.lengths)
        ids[:n], positions[:n], uids[:n] = pack.input_ids, pack.position_ids, pack.token_uids
        ids[n:], positions[n:], uids[n:] = 0, torch.arange(T - n), -1
        predict[:p], targets[:p] = pack.predict, pack.targets
        predict[p:], targets[p:] = 0, -100
        cu[: s + 1] = pack.cu_seqlens
        cu[s + 1 :] = T
        self.blob.copy_(self.host, non_blocking=True)
        self.copied.record()
        self.share.fill_(1 / max(1, supervised))

    def run(self, step: TrainStep) -> Tensor:
        """The recorded work: all of the step, or its first half, whose loss is given."""
        self.cu.copy_(self.cu_source)
        if step.sharing is not None:
            return step.gradients([self.pack], self.share)
        return _three(step.run([self.pack], self.share))


def _three(result: StepResult) -> Tensor:
    return torch.stack([result.loss, result.grad_norm, result.skipped])


class CapturedStep:
    """See `capture`. plain_steps: how many steps of one pack ran plain, since no capacity held them."""

    def __init__(self, step: TrainStep, sizes: Sequence[Capacity], longest: int):
        self.step = step
        self.share = torch.zeros((), device=step.decoder.device)
        self.graphs = [_Graph(step, capacity, self.share, longest) for capacity in sizes]
        self.plain_steps = 0
        self.contract: Contract | None = None
        self.loss = torch.zeros_like(self.share)  # the second half's, where there are two
        self.update = torch.cuda.CUDAGraph() if step.sharing is not None else None
        self.out: Tensor | None = None

    def record(self, sample: Pack) -> None:
        """Warms up with the largest (what is used for the first time is made ready, the optimizer's moments among it)
        and captures all, largest first, in one memory pool.

        The warm-up's loss is made NaN, and the gate that keeps bad values out leaves all that learns as it was.
        """
        step, pool = self.step, torch.cuda.graph_pool_handle()
        index, scale = step.step_index.clone(), step.loss_scale and step.loss_scale.state_dict()
        kept = {k: v.clone() for k, v in scale.items()} if scale else None
        self.graphs[0].fill(sample, sample.supervised)
        self.share.fill_(float("nan"))
        step.keeps_gradients |= self.update is not None  # both halves know their place
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            loss = self.graphs[0].run(step)
            if self.update is not None:
                step.update(loss)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        if step.decoder.stack is None:
            gc.collect()  # recomputed layers leave cycles, whose nodes would add gradients on the warm-up's stream
        step.step_index.copy_(index)
        if step.loss_scale is not None and kept is not None:
            step.loss_scale.load_state_dict(kept)
        torch._C._cuda_clearCublasWorkspaces()  # those of the warm-up's streams; the captures have their own
        torch.cuda.empty_cache()
        # NCCL's own thread asks after its events meanwhile
        mode = "global" if self.update is None else "thread_local"
        for graph in self.graphs:
            with torch.cuda.graph(graph.graph, pool=pool, capture_error_mode=mode):
                graph.out = graph.run(step)
        if self.update is not None:
            with torch.cuda.graph(self.update, pool=pool, capture_error_mode=mode):
                self.out = _three(step.update(self.loss))
        inputs = [(f"inputs of {g.capacity.tokens}", partial(getattr, g, "blob")) for g in self.graphs]
        for name in ("share", "loss"):
            inputs.append((name, partial(getattr, self, name)))
        self.contract = Contract.of(step, *inputs)

    @property
    def loss_scale(self) -> LossScale | None:
        return self.step.loss_scale

    @property
    def step_index(self) -> Tensor:
        return self.step.step_index

    def __call__(self, batch: StepBatch, rate: float) -> StepResult:
        graph = self._graph_for(batch)
        if graph is None:
            self.plain_steps += len(batch.packs) == 1
            return self.step(batch, rate)
        assert self.contract is not None
        self.contract.check()
        graph.fill(batch.packs[0], batch.supervised)
        self.step.optimizer.rate.fill_(rate)
        graph.graph.replay()
        out = graph.out
        assert out is not None
        if self.update is not None:
            self.loss.copy_(self.step.gather(out))
            self.update.replay()
            out = self.out
            assert out is not None
        loss, norm, skipped = out.clone()
        return StepResult(loss, norm, skipped)

    def _graph_for(self, batch: StepBatch) -> _Graph | None:
        if len(batch.packs) != 1:
            return None
        fitting = [g for g in self.graphs if g.capacity.holds(batch.packs[0])]
        return min(fitting, key=lambda g: (g.capacity.tokens, g.capacity.positions)) if fitting else None


def capture(step: TrainStep, sizes: Sequence[Capacity], sample: Pack, longest: int) -> CapturedStep:
    """Captures `step` for these capacities, largest first; `sample` is a pack that fits the first, and `longest` bounds
    the length of a document."""
    captured = CapturedStep(step, sizes, longest)
    captured.record(sample)
    return captured
