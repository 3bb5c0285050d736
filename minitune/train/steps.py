"""The steps of a run before any batch is made: how many, of what sizes, and what of that is recorded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from minitune.config import TrainConfig
from minitune.data.loader import Loader
from minitune.data.store import EncodedRows
from minitune.data.template import Encoded
from minitune.model.decoder import DecoderConfig
from minitune.train import fast
from minitune.train.memory import Load
from minitune.train.parallel import ALONE, Team


def make_loader(
    config: TrainConfig, rows: Sequence[Encoded], device: torch.device, shuffle: bool = True, team: Team = ALONE
) -> Loader:
    # Small packs keep the CPU's caches and memory; a card wants long ones.
    whole = device.type != "cpu" or config.optim == "adamw_8bit_in_backward"
    pack = config.tokens_per_pack if whole else min(config.tokens_per_pack, 1024)
    return Loader(
        rows,
        rows_per_step=config.rows_per_step,
        tokens_per_step=config.tokens_per_step,
        tokens_per_pack=pack,
        seed=config.seed,
        shuffle=shuffle,
        pin=device.type == "cuda",
        rank=team.rank,
        ranks=team.size,
    )


def count_steps(config: TrainConfig, loader: Loader) -> tuple[int, list[int]]:
    """(steps of the run, steps of each epoch)."""
    per_epoch: list[int] = []
    if config.max_steps > 0:
        while sum(per_epoch) < config.max_steps:
            per_epoch.append(len(loader.steps(len(per_epoch))))
        return config.max_steps, per_epoch
    whole, part = int(config.num_train_epochs), config.num_train_epochs % 1
    per_epoch = [len(loader.steps(e)) for e in range(whole + (part > 0))]
    last = math.ceil(per_epoch[-1] * part) if part else per_epoch[-1]
    return sum(per_epoch[:-1]) + last, per_epoch


MANY = 200_000  # rows from which one epoch stands for all


@dataclass(frozen=True)
class Walk:
    """What a run computes. total: its steps. walked, tokens: the steps that `sizes` are of, and their tokens without
    padding. sizes: int64 [packs, 2], tokens and supervised positions of each, the padding of a recorded step included.
    context: tokens that a token attends to, in the mean. plain: packs of them that run plain, not recorded."""

    total: int
    walked: int
    tokens: int
    sizes: NDArray[np.int64]
    context: float
    load: Load
    plain: int = 0


def walk(config: TrainConfig, loader: Loader, held_out: EncodedRows, shape: DecoderConfig, pack: int) -> Walk:
    """The steps of `loader` (`make_loader`) on a card, with packs of so many tokens at most, which it is set to."""
    rows, loader.tokens_per_pack = loader.rows, pack
    if len(rows) > MANY:
        per_epoch = [len(loader.steps(0))]
        total = config.max_steps or math.ceil(per_epoch[0] * config.num_train_epochs)
    else:
        total, per_epoch = count_steps(config, loader)
    steps = fast.every_step(loader, per_epoch, total)
    one, more = steps[steps[:, 5] == 1], steps[steps[:, 5] == 0]
    several = len(more) > 0
    captured = len(one) > 0 and not (several and config.method == "full")  # as `fast.quicken` decides
    sizes = [one[:, [2, 4]]]
    tokens = positions = beside = 0
    if captured:
        held = fast.capacities_of(one, total, shape)
        places = np.array([(c.tokens, c.positions) for c in held])
        fitting = (places[None] >= one[:, None, [2, 4]]).all(2)
        cost = np.where(fitting, places[None, :, 0] * (1 << 32) + places[None, :, 1], np.iinfo(np.int64).max)
        sizes = [places[cost.argmin(1)]]
        tokens, positions = held[0].tokens, max(c.positions for c in held)
    elif len(one):
        tokens, positions = int(one[:, 2].max()), int(one[:, 4].max())
    if several:  # packs are nearly full
        largest = max(rows.longest, min(pack, int(more[:, 2].max())))
        share = float((more[:, 4] / more[:, 2]).max())
        count = -(-more[:, 2] // pack)
        sizes.append(np.repeat(more[:, [2, 4]] // count[:, None], count, axis=0))
        beside = largest if captured else 0
        tokens = tokens if captured else max(tokens, largest)
        positions = max(positions, min(largest, int(1.2 * share * largest) + 1))
    lengths = rows.lengths
    load = Load(tokens, positions, rows.longest, several, beside, _held_out(config, held_out, pack))
    context = float((lengths**2).sum() / max(1, lengths.sum())) / 2
    made = np.concatenate(sizes)
    plain = len(made) - len(one) if captured else len(made)
    return Walk(total, len(steps), int(steps[:, 2].sum()), made, context, load, plain)


def _held_out(config: TrainConfig, rows: EncodedRows, pack: int) -> int:
    """Tokens of the largest pack of held-out rows."""
    if not len(rows):
        return 0
    loader = make_loader(config, rows, torch.device("cuda"), shuffle=False)
    count = len(loader.steps(0))
    most = int(fast.every_step(loader, [count], count)[:, 2].max())
    return max(rows.longest, min(pack, most))
