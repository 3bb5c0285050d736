"""The fast step of a card: layers by hand (`model.fused`, `model.full`), the step captured (`train.graph`), batches
made ahead.

Where the layers stay plain (cards before Ampere), the step is captured all the same. On the CPU nothing
of this happens.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray

from minitune.config import TrainConfig
from minitune.data.loader import Loader, StepBatch
from minitune.model import full, fused
from minitune.model.attention import choose_kernel
from minitune.model.decoder import Decoder, DecoderConfig
from minitune.model.fused_ops import Slot
from minitune.model.lora import LoraConfig
from minitune.model.quantized import is_packed, packed_linears
from minitune.train import graph
from minitune.train.checks import several
from minitune.train.step import TrainStep

# Steps from which one more capacity pays: it takes a fifth of a second to capture, and saves 20 us a step.
LONG = 5000
Place = tuple[int, int]  # (epoch, step in it)


def why_plain(decoder: Decoder) -> str:
    """Why this decoder, its adapters attached, runs plain layers; "" where `model.fused` takes their place, or, without
    adapters, `model.full`."""
    if reason := why_not_on(decoder.device):
        return reason
    if is_packed(decoder) and decoder.lora_config is None:
        return "the weights have 4 bits"
    return full.why_not(decoder) if decoder.lora_config is None else fused.why_not(decoder)


def why_not_on(device: torch.device) -> str:
    """Why a device has no layers by hand; "" where it has."""
    return fused.kernels.why_not(device) if device.type == "cuda" else "no card"


def plain_engine(config: TrainConfig) -> bool:
    """Whether a run's engine takes plain layers on any card: DeepSpeed, and FSDP2 of several processes."""
    return bool(config.deepspeed) or (config.method == "full" and several())


def strips_of(decoder: Decoder, lora: LoraConfig) -> dict[str, int]:
    """{kind: width}: the strips for `Decoder.allocate` that `model.fused` will want of these adapters; none where the
    layers can't be fused, or have four bits (theirs lie where a weight is formed). The decoder may be on `meta`,
    without adapters."""
    strips: dict[str, int] = {}
    if is_packed(decoder):
        return strips
    for kind in Slot.KINDS:
        linears = decoder.of_kind(kind)
        targeted = {tuple(n for n, _, _ in m.parts if lora.targets(m.hub_name(n))) for m in linears}
        if len(targeted) > 1:
            return {}
        if width := fused.strip_width(lora.r * len(targeted.pop())):
            strips[kind] = width
    return strips


def settle_memory(sparing: bool = False) -> None:
    """What torch reads from the environment, unless a person has set it. When it first uses a card's memory: segments
    that grow leave no holes between what a warm-up and a capture want. sparing, when it first multiplies there: matrix
    workspaces of 8 MiB instead of 32."""
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if sparing:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:2:16:8")


def compile_early(
    config: TrainConfig, empty: Decoder, dtype: torch.dtype, lora: LoraConfig, device: torch.device, pool: Executor
) -> None:
    """Compiles what a run of this decoder (on `meta`) will most likely launch: its steps' rows are short, its layers
    are not recomputed unless that is asked for, or the base has four bits. Where its layers can't be fused, ValueError
    of `FusedStack`."""
    if why_not_on(device):
        return
    from minitune.model.fused_compile import compile_kernels

    documents = config.rows_per_step + 1  # the padding is one more
    keep = config.gradient_checkpointing == "false" or (
        config.gradient_checkpointing == "auto" and config.method == "lora"
    )
    group = next((n.group for n in packed_linears(empty)), 0)
    with torch.cuda.device(device):
        compile_kernels(empty.config, dtype, lora, documents, keep, pool, group)


def compile_full_early(
    config: TrainConfig, empty: Decoder, dtype: torch.dtype, device: torch.device, pool: Executor
) -> None:
    """The same where every parameter learns."""
    if why_not_on(device) or full.why_not(empty):
        return
    from minitune.model.fused_compile import launch_full
    from minitune.train import adamw8

    with torch.cuda.device(device), fused.kernels.compiling(pool), torch.no_grad():
        launch_full(empty.config, dtype, config.rows_per_step + 1)
        if config.optim != "adamw":
            adamw8.launch_all(dtype)


def head_share(shape: DecoderConfig) -> float:
    """A position's multiplications in the head, a token's in the layers being 1."""
    queries, keys = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    layer = shape.hidden_size * (2 * queries + 2 * keys + 3 * shape.intermediate_size)
    return shape.vocab_size * shape.hidden_size / (shape.num_hidden_layers * layer)


def every_step(loader: Loader, per_epoch: Sequence[int], total: int) -> NDArray[np.int64]:
    """int64 [N, 6]: (epoch, step, tokens, documents, supervised, 1 where it is one pack) of each of the run's steps;
    by the plan alone, no batch is made."""
    out = [np.zeros((0, 6), dtype=np.int64)]
    for epoch, steps in enumerate(per_epoch):
        count = min(steps, total)
        total -= count
        if not count:
            break
        if loader.ranks > 1:
            out.append(_shares_of(loader, epoch, count))
            continue
        plan = loader.steps(epoch)
        starts, rows = plan.bounds[:count], plan.order[: plan.bounds[count]]
        tokens = np.add.reduceat(loader.lengths[rows], starts)
        documents = np.diff(plan.bounds[: count + 1])
        supervised = np.add.reduceat(loader.rows.supervised[rows], starts)
        whole = (tokens <= loader.tokens_per_pack) | (documents == 1)  # see `packing.packs`
        columns = (np.full(count, epoch), np.arange(count), tokens, documents, supervised, whole)
        out.append(np.stack(columns, axis=1).astype(np.int64))
    return np.concatenate(out)


def _shares_of(loader: Loader, epoch: int, count: int) -> NDArray[np.int64]:
    """The same of this process's share of an epoch's first `count` steps; one pack: at most one for each process, which
    is so for all of them or none."""
    found = []
    for step in range(count):
        plans = loader.plans(epoch, step)
        mine = [row for pack in plans[loader.rank] for row in pack]
        tokens, supervised = int(loader.lengths[mine].sum()), int(loader.rows.supervised[mine].sum())
        # without a row: one token that counts for nothing
        found.append((epoch, step, max(1, tokens), max(1, len(mine)), supervised, max(map(len, plans)) == 1))
    return np.array(found, dtype=np.int64).reshape(-1, 6)


def one_pack_steps(loader: Loader, per_epoch: Sequence[int], total: int) -> NDArray[np.int64]:
    """int64 [N, 5]: the same of those that are one pack each, which the last column would say."""
    steps = every_step(loader, per_epoch, total)
    return steps[steps[:, 5] == 1, :5]


def capacities_of(plan: NDArray[np.int64], total: int, shape: DecoderConfig) -> list[graph.Capacity]:
    """What is captured for `one_pack_steps` of a run of so many steps."""
    sizes = [(t, d, s) for t, d, s in plan[:, 2:5].tolist()]
    return graph.capacities(sizes, 4 if total < LONG else 8, head_share(shape))


def quicken(
    step: TrainStep, loader: Loader, per_epoch: Sequence[int], total: int
) -> tuple[TrainStep | graph.CapturedStep, str]:
    """(the step, captured where it can be; a line that says so). The run is where it begins: what a checkpoint holds
    has been read. All of the run's steps count, also those already done, so that a resumed run computes the same."""
    decoder, reason = step.decoder, ""
    if not step.by_hand:
        reason = why_plain(decoder) or "asked for"
    if decoder.device.type != "cuda":
        return step, f"plain step: {reason}"
    plan = one_pack_steps(loader, per_epoch, total)
    several = total - len(plan)
    if not len(plan):
        return step, "plain step: every step is several packs; raise --tokens_per_pack to have it captured"
    if several and decoder.lora_config is None:  # a plain step's memory would lie beside the graph's
        what = f"every parameter learns, and {several:,} steps are several packs, which would take the memory twice"
        return step, f"plain step: {what}; raise --tokens_per_pack to have it captured"
    sizes = [(t, d, s) for t, d, s in plan[:, 2:].tolist()]
    capacities = capacities_of(plan, total, decoder.config)
    fits = (plan[:, 2] <= capacities[0].tokens) & (plan[:, 4] <= capacities[0].positions)
    epoch, number = plan[np.where(fits, plan[:, 2], 0).argmax(), :2].tolist()
    sample = loader.batch(epoch, number).packs[0]
    captured = graph.capture(step, capacities, sample, int(loader.lengths.max()))
    loader.pin = loader.pin and several > 0  # a captured step copies from pinned memory of its own
    layers = ""
    if reason:
        kernel = choose_kernel(decoder.device, decoder.dtype, decoder.config.head_dim, int(loader.lengths.max()))
        layers = f"plain layers ({reason}), {kernel} attention; "
    return captured, f"captured: {layers}{_said(sizes, capacities, several)}"


def _said(sizes: Sequence[tuple[int, int, int]], capacities: Sequence[graph.Capacity], several: int) -> str:
    """The capacities, and the padding that they cost over all steps of one pack."""
    used = [min(c.tokens for c in capacities if c.tokens >= t and c.positions >= p) for t, _, p in sizes]
    padding = sum(used) / sum(t for t, _, _ in sizes) - 1
    noun = "capacity" if len(capacities) == 1 else "capacities"
    line = f"{len(capacities)} {noun} up to {capacities[0].tokens:,} tokens, {100 * padding:.0f} % padding"
    return f"{line}; {several:,} steps of several packs run plain" if several else line


def batches(
    make: Callable[[int, int], StepBatch], places: Iterable[Place], ahead: bool
) -> Generator[tuple[Place, StepBatch], None, None]:
    """(place, batch) one after the other. ahead: a thread makes the next one meanwhile; what goes wrong there is raised
    when its turn has come. Close the generator to end the thread."""
    if not ahead:
        for place in places:
            yield place, make(*place)
        return
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches") as pool:
        coming: tuple[Place, Future[StepBatch]] | None = None
        for place in places:
            now, coming = coming, (place, pool.submit(make, *place))
            if now is not None:
                yield now[0], now[1].result()
        if coming is not None:
            yield coming[0], coming[1].result()
