"""Plans of several methods, or of several cards, side by side."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from minitune.checkpoint import hub
from minitune.checkpoint.weights import choose_device, int4_group, read_config
from minitune.config import TrainConfig, UserError
from minitune.train import cards
from minitune.train.cards import CARDS, PASCAL, Card
from minitune.train.plan import Plan, Planner, methods, planner_for, planner_here
from minitune.train.plan_view import Sheet, values_of
from minitune.train.prepare import Prepared, prepare, training_dtype


@dataclass(frozen=True)
class Where:
    """The card that plans are made for: one of the table, or this machine's (`device`)."""

    name: str
    card: Card | None
    device: torch.device | None = None

    @staticmethod
    def of(config: TrainConfig, name: str) -> Where | None:
        """The card of this name, else the one here; None where there is none."""
        if name:
            card = cards.named(name)
            return Where(card.name, card)
        device = choose_device(config.device)
        if device.type != "cuda":
            return None
        cards.check_served(device)
        return Where(torch.cuda.get_device_name(device), cards.here(device), device)

    def planner(self, config: TrainConfig, ready: Prepared) -> Planner:
        shape, int4 = read_config(ready.base), int4_group(ready.base)
        if self.device is not None:
            dtype = training_dtype(config, self.device)
            return planner_here(config, shape, ready.learn, ready.held_out, dtype, self.device, int4)
        assert self.card is not None
        return planner_for(config, shape, ready.learn, ready.held_out, self.card, int4)


def rows_of(config: TrainConfig) -> Prepared:
    """The data's lengths; of the model its tokenizer and config.json alone."""
    return prepare(config, base=hub.resolve(config.model, source=config.source, weights=False))


def sheet(config: TrainConfig, where: Where, one: bool) -> Sheet:
    """The plans of all methods, or of the one that was asked for."""
    if where.card is not None and not where.card.served:
        raise UserError(f"{where.card.name}: current builds of PyTorch hold no code for it; try {PASCAL}")
    ready = rows_of(config)
    planner = where.planner(config, ready)
    plans, mends = [], {}
    for method in [config.method] if one else methods():
        changed = config if one else dataclasses.replace(config, method=method, optim="auto")  # type: ignore[arg-type]
        plan = planner.plan(changed)
        plans.append(plan)
        if not plan.fits:
            mends[method] = str(planner.refused(changed, plan))
    kind = str(planner.dtype).removeprefix("torch.")
    steps = plans[0].walk
    title = (
        f"{config.model} · {config.data}: {len(ready.learn):,} rows, {steps.total:,} steps of "
        f"{steps.tokens / max(1, steps.walked):,.0f} tokens"
    )
    return Sheet(title, f"{where.name}, {kind}", plans, mends, advised(plans))


def advised(plans: Sequence[Plan]) -> str:
    """What to take of these: an adapter where it fits, else what does."""
    fitting = {plan.method: plan for plan in plans if plan.fits}
    name = next((name for name in ("lora", "qlora", "full") if name in fitting), "")
    if not name:
        return "nothing of this fits"
    if len(plans) == 1:
        return f"--method {name} fits"
    more = " (full fits too: more is learned, and more forgotten)" if name == "lora" and "full" in fitting else ""
    return f"advised: --method {name}{more}"


def all_cards(config: TrainConfig, ready: Prepared, one: bool = False) -> list[tuple[Card, list[Plan]]]:
    """Each card's plans of all methods, or of the one that was asked for."""
    every = [dataclasses.replace(config, method=method, optim="auto") for method in methods()]  # type: ignore[arg-type]
    changed = [config] if one else every
    out = []
    for card in CARDS:
        planner = Where(card.name, card).planner(config, ready)
        out.append((card, [planner.plan(each) for each in changed]))
    return out


def cards_values(found: Sequence[tuple[Card, list[Plan]]]) -> dict[str, Any]:
    """`all_cards` as values, of the cards that PyTorch serves."""
    return {card.name: [values_of(plan) for plan in plans] for card, plans in found if card.served}
