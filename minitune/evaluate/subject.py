"""What is evaluated: which model, beside which base, on which rows; from the flags and from what the run recorded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitune.checkpoint.adapter import CONFIG as ADAPTER
from minitune.checkpoint.weights import read_json
from minitune.config import TrainConfig, UserError, build, read_yaml
from minitune.data.template import Template
from minitune.evaluate.settings import EvaluateConfig

BASE, TUNED = "base", "tuned"


@dataclass(frozen=True)
class Side:
    """One of the two that are compared: a model, and an adapter on it ("" where there is none)."""

    name: str
    model: str
    adapter: str = ""

    @property
    def label(self) -> str:
        return f"{self.model} + {self.adapter}" if self.adapter else self.model


@dataclass(frozen=True)
class Subject:
    """The base alone, or the base and what was made of it; `run`: the settings it was trained with, where known."""

    sides: list[Side]
    run: TrainConfig | None
    run_folder: str = ""


def subject(config: EvaluateConfig) -> Subject:
    """From --model and --adapter; a whole model that a run wrote brings its base. UserError where neither is given."""
    from minitune.infer.chat import which

    whole = next((f for f in (config.adapter, config.model) if f and is_whole_run(f)), "")
    if whole:
        run = read_run(whole)
        assert run is not None
        base = config.model if config.adapter == whole and config.model else run.model
        return Subject([Side(BASE, base), Side(TUNED, whole)], run, whole)
    model, adapter = which(config.model or None, config.adapter or None)
    if not adapter:
        return Subject([Side(BASE, model)], None)
    return Subject([Side(BASE, model), Side(TUNED, model, adapter)], read_run(adapter), adapter)


def is_whole_run(folder: str) -> bool:
    """Whether this is the folder of a run that trained every parameter."""
    place = Path(folder)
    if (place / ADAPTER).is_file() or not (place / "config.json").is_file():
        return False
    run = read_run(folder)
    return run is not None and bool(run.model)


def read_run(folder: str) -> TrainConfig | None:
    """The settings that a run recorded in its folder; None where it has none."""
    path = Path(folder) / "run.yaml"
    if not path.is_file():
        return None
    return build(TrainConfig, read_yaml(path), str(path))


def here(path: str, found: Subject) -> str:
    """A file that run.yaml names: as it is written, or beside the run's folder. UserError where it is gone."""
    for place in (Path(path), Path(found.run_folder).parent / path):
        if place.is_file():
            return str(place)
    raise UserError(f"{found.run_folder}: its run.yaml names {path}, which is not here; give --data (or --train_data)")


def open_template(side: Side, folder: Path, tokenizer: Any) -> Template:
    """As the side was trained, or as its checkpoint is prompted."""
    return Template.recorded(tokenizer, read_json(folder / "config.json"), side.adapter or None, folder)
