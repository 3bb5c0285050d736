"""The plan of a run before anything is loaded: what it will hold on a card, how long it will take, and what is chosen
so that it fits. One arithmetic (`memory`, `speed`) serves this, `minitune plan` and what `minitune train` takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from minitune.config import TrainConfig, UserError, bytes_of, flat_fields
from minitune.data.loader import Loader
from minitune.data.store import EncodedRows
from minitune.model import kernels
from minitune.model.decoder import Decoder, DecoderConfig
from minitune.model.quantized import Int4Linear
from minitune.train import cards, memory, speed
from minitune.train.cards import Card
from minitune.train.memory import GIB, Choice, Load, Parts
from minitune.train.shapes import Setup
from minitune.train.steps import Walk, make_loader, walk

CHOICES = ("adamw", "adamw_8bit", "adamw_8bit_in_backward")  # from the most memory to the least
CHUNKS = (256, 128)  # positions whose logits exist at once, where memory is very short
SMALLEST = 256  # tokens a pack: smaller ones save nothing


def methods() -> tuple[str, ...]:
    """What --method takes, from the least memory to the most."""
    taken = [str(option) for option in flat_fields(TrainConfig)["method"][1].__args__]
    return tuple(sorted(taken, key=("qlora", "lora", "full").index))


@dataclass(frozen=True)
class Plan:
    """One method's. room: bytes that it may hold as the driver counts; None: no card, no bound."""

    method: str
    choice: Choice
    parts: Parts
    walk: Walk
    layers: int
    room: int | None
    seconds: float | None  # a step; None where the card is not known
    spare: int = 0  # see `memory.spare`

    @property
    def fits(self) -> bool:
        return self.room is None or self.parts.total <= self.room

    @property
    def fits_well(self) -> bool:
        """With room for what the arithmetic does not see."""
        return self.room is None or self.parts.total + self.spare <= 0.98 * self.room

    @property
    def run_seconds(self) -> float | None:
        return None if self.seconds is None else self.seconds * self.walk.total


@dataclass
class Planner:
    """What plans of one model and its rows share. room: see `Plan`. card: whose time is predicted."""

    shape: DecoderConfig
    rows: EncodedRows
    held_out: EncodedRows
    dtype: torch.dtype
    capability: tuple[int, int]
    room: int | None
    whole: int | None = None  # `room` without --memory
    card: Card | None = None
    triton: bool = True
    int4: int = 0
    alone: bool = True
    walks: dict[Any, Walk] = field(default_factory=dict)
    loaders: dict[int, Loader] = field(default_factory=dict)

    def setup(self, config: TrainConfig) -> Setup:
        return Setup.of(config, self.shape, self.dtype, self.capability, self.triton, self.int4, self.alone)

    def walk(self, config: TrainConfig, pack: int) -> Walk:
        key = (pack, config.method == "full", config.max_length)
        if key not in self.walks:
            if config.max_length not in self.loaders:
                rows = self.rows.cut(config.max_length) if config.max_length < self.rows.longest else self.rows
                self.loaders[config.max_length] = make_loader(config, rows, torch.device("cuda"))
            self.walks[key] = walk(config, self.loaders[config.max_length], self.held_out, self.shape, pack)
        return self.walks[key]

    def plan(self, config: TrainConfig) -> Plan:
        """What is chosen: of the optimizers that the settings leave open the first that fits, with the pack and the
        number of whole layers that are predicted to be the fastest; where nothing fits, what needs least."""
        setup = self.setup(config)
        wholes = self._wholes(config, setup)
        smallest = None
        for name in self._optims(config):
            found: list[Plan] = []
            for pack in self._packs(config):
                if self.walk(config, pack).load.several and config.optim == "auto" and name == CHOICES[-1]:
                    continue  # it takes steps of one pack
                least = self._least(config, setup, Choice(name, wholes[-1], pack))
                if smallest is None or least.parts.total < smallest.parts.total:
                    smallest = least
                if least.fits:
                    more = (self._made(config, setup, Choice(name, whole, pack)) for whole in wholes)
                    found.append(next((plan for plan in more if self._keeps(config, plan)), least))
            if found:  # the largest pack of those that are about as fast as the fastest
                fastest = min(plan.seconds or 0.0 for plan in found)
                return next(plan for plan in found if (plan.seconds or 0.0) <= 1.05 * fastest)
        assert smallest is not None
        return smallest

    def _least(self, config: TrainConfig, setup: Setup, choice: Choice) -> Plan:
        """Its plan; under a bound that is tight, with as few logits at once as it takes."""
        made = self._made(config, setup, choice)
        for chunk in CHUNKS if config.memory else ():
            fewer = self._made(config, setup, dataclasses.replace(choice, chunk=chunk))
            if not made.fits_well and fewer.parts.total < made.parts.total:
                made = fewer
        return made

    def _made(self, config: TrainConfig, setup: Setup, choice: Choice) -> Plan:
        steps = self.walk(config, choice.pack)
        seconds = speed.step_seconds(setup, choice, self.card, steps) if self.card else None
        layers = self.shape.num_hidden_layers
        spare = memory.spare(setup, steps.load, choice) if config.memory else 0
        parts = memory.parts(setup, steps.load, choice)
        return Plan(setup.method, choice, parts, steps, layers, self.room, seconds, spare)

    def _keeps(self, config: TrainConfig, made: Plan) -> bool:
        """Whether layers may be kept that need not be."""
        if made.method == "qlora" and made.room is not None and not config.memory:
            # whoever takes four bits has little memory, or other uses for it
            return made.parts.total - made.parts.weights <= 0.3 * made.room
        return made.fits_well

    def _optims(self, config: TrainConfig) -> list[str]:
        if config.method != "full":
            return ["adamw"]
        names = [name for name in CHOICES if config.optim in ("auto", name)]
        return names[:1] if self.dtype == torch.float16 or not self.alone else names

    def _packs(self, config: TrainConfig) -> Iterator[int]:
        """Tokens a pack, the largest first: as the settings say; with --memory what makes every step one pack, and
        halves of it."""
        if not config.memory:
            yield config.tokens_per_pack
            return
        pack = max(SMALLEST, self.walk(config, 1 << 30).load.tokens)
        yield max(pack, config.tokens_per_pack)
        while pack // 2 >= max(SMALLEST, self.rows.longest):
            pack //= 2
            yield pack

    def _wholes(self, config: TrainConfig, setup: Setup) -> list[int]:
        """How many layers may keep their activations, from the most."""
        layers = self.shape.num_hidden_layers
        if config.gradient_checkpointing != "auto":
            return [1] if config.gradient_checkpointing != "false" else [layers]
        if setup.lora is None and setup.by_hand:
            return list(range(layers, 0, -1))
        return [layers, 1] if layers > 1 else [1]

    def least(self, config: TrainConfig) -> int:
        """Bytes below which no step of this method is possible, whatever the rows are."""
        setup, tiny = self.setup(config), Load(128, 64, 128)
        whole = self._wholes(config, setup)[-1]
        return min(memory.parts(setup, tiny, Choice(name, whole, 128, 64)).total for name in self._optims(config))

    def refused(self, config: TrainConfig, made: Plan) -> UserError:
        """The line about a plan that does not fit, with the nearest setting that does."""
        assert made.room is not None
        room = f"{made.room / GIB:.1f}"
        what = f"--memory {config.memory} leaves {room} for it" if config.memory else f"the card has {room} for it"
        how = cards.describe(made.choice, made.method, made.layers)
        line = f"{made.method} ({how}) needs {made.parts.total / GIB:.1f} GiB, {what}"
        if found := self.nearest(config):
            return UserError(f"{line}: try {found[0]} ({found[1].parts.total / GIB:.1f} GiB)")
        return UserError(f"{line}: take a smaller --model, or a card with more memory")

    def nearest(self, config: TrainConfig) -> tuple[str, Plan] | None:
        """(what to type, its plan) of the nearest settings that fit."""
        for words, other in self._others(config):
            if (made := self.plan(other)).fits:
                return words, made
        if config.memory:
            made = dataclasses.replace(self, room=self.whole).plan(config)
            least = dataclasses.replace(self, room=0).plan(config)
            need = -(-int(10 * least.parts.total / (0.99 * GIB)) // 1) / 10 + 0.1
            if made.fits:
                return f"--memory {need:.1f}GiB", least
        length = min(config.max_length, self.rows.longest) // 2
        while length >= 64:
            pack = min(config.tokens_per_pack, max(SMALLEST, length))
            if (made := self.plan(dataclasses.replace(config, max_length=length, tokens_per_pack=pack))).fits:
                return f"--max_length {length} --tokens_per_pack {pack}", made
            length //= 2
        return None

    def _others(self, config: TrainConfig) -> Iterator[tuple[str, TrainConfig]]:
        """Settings that need less, those first that leave the run what it is."""
        if config.gradient_checkpointing == "false":
            config = dataclasses.replace(config, gradient_checkpointing="auto")
            yield "--gradient_checkpointing auto", config
        if config.method == "full" and config.optim != "auto":
            yield "--optim auto", dataclasses.replace(config, optim="auto")
        pack = config.tokens_per_pack
        while not config.memory and pack // 2 >= max(SMALLEST, self.rows.longest):
            pack //= 2
            yield f"--tokens_per_pack {pack}", dataclasses.replace(config, tokens_per_pack=pack)
        smaller = methods()[: methods().index(config.method)]
        for method in reversed(smaller):
            yield f"--method {method}", dataclasses.replace(config, method=method, optim="auto")  # type: ignore[arg-type]


def planner_here(
    config: TrainConfig, shape: DecoderConfig, rows: EncodedRows, held_out: EncodedRows, dtype: torch.dtype,
    device: torch.device, int4: int = 0, alone: bool = True,
) -> Planner:  # fmt: skip
    """Of a run on this machine's card."""
    room, whole = (cards.room_on(device, cap) for cap in (bytes_of(config.memory), 0))
    capability, card = torch.cuda.get_device_capability(device), cards.here(device)
    return Planner(
        shape, rows, held_out, dtype, capability, room, whole, card, kernels.AVAILABLE, int4, alone
    )  # fmt: skip


def planner_for(
    config: TrainConfig, shape: DecoderConfig, rows: EncodedRows, held_out: EncodedRows, card: Card, int4: int = 0
) -> Planner:
    """Of a run on a card of the table."""
    dtype = card.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    cap = bytes_of(config.memory)
    room = min(card.room, int(0.99 * cap)) if cap else card.room
    return Planner(shape, rows, held_out, dtype, card.capability, room, card.room, card, True, int4)


def choose(config: TrainConfig, decoder: Decoder, rows: EncodedRows, alone: bool = True) -> Choice:
    """What a run of this decoder takes, where no plan was made before it was loaded."""
    layers = len(decoder.layers)
    if decoder.device.type != "cuda":
        name = config.optim if config.method == "full" and config.optim != "auto" else "adamw"
        return Choice(name, 1 if config.gradient_checkpointing == "true" else layers, config.tokens_per_pack)
    first = decoder.linears()[0]
    int4 = first.in_features // first.weight_scale.shape[1] if isinstance(first, Int4Linear) else 0
    shape, dtype = decoder.config, decoder.dtype
    planner = planner_here(config, shape, rows, rows[:0], dtype, decoder.device, int4, alone)
    return planner.plan(config).choice


def lines(config: TrainConfig, plan: Plan) -> list[str]:
    """What a run says of its plan before it begins."""
    p = plan.parts
    parts = ", ".join(f"{f.name} {getattr(p, f.name) / GIB:.1f}" for f in dataclasses.fields(p))
    assert plan.room is not None
    cap = f"--memory {config.memory}" if config.memory else "this card"
    out = [f"plan: {p.total / GIB:.1f} GiB of the {plan.room / GIB:.1f} that {cap} leaves: {parts}"]
    chosen = f"plan: {cards.describe(plan.choice, plan.method, plan.layers)}"
    if plan.choice.pack != config.tokens_per_pack:
        chosen += f", packs of {plan.choice.pack:,} tokens"
    if plan.seconds is not None and plan.run_seconds is not None:
        chosen += (
            f"; predicted {speed.seconds_said(plan.seconds)} a step, "
            f"{speed.seconds_said(plan.run_seconds)} for {plan.walk.total:,} steps"
        )
    return [*out, chosen]
