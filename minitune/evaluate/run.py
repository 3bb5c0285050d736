"""One evaluation, from the settings to the result: read this first."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from minitune.checkpoint import hub
from minitune.checkpoint.tokenizer import load_tokenizer
from minitune.checkpoint.weights import choose_device, choose_dtype, load_model, read_config
from minitune.config import TrainConfig, UserError
from minitune.evaluate import answers, general, held_out, loss, subject
from minitune.evaluate.progress import Watch
from minitune.evaluate.result import Measured, Prepared, compare
from minitune.evaluate.settings import EvaluateConfig
from minitune.evaluate.subject import Side
from minitune.model.decoder import Decoder


def evaluate(config: EvaluateConfig, quiet: bool = False) -> dict[str, Any]:
    """Evaluates as `config` says; returns what evaluation.json holds. Raises UserError for bad input."""
    config.check()
    with Watch(quiet) as watch:
        ready = prepare(config)
        for line in ready.lines:
            watch.say(line)
        measured = [measure(side, ready, config, watch) for side in ready.subject.sides]
        watch.say("comparing")
        result = compare(measured, ready, config)
    return result


def prepare(config: EvaluateConfig) -> Prepared:
    """Reads everything that is small: the rows, the text, the tasks' names."""
    answers.sampling_of(config)  # a bad value is said before anything is read
    found = subject.subject(config)
    device = choose_device(config.device)
    tasks = None
    if config.tasks:
        tasks = harness().find_tasks(config.tasks, config.task_path)
    choice = None
    if config.data or found.run is not None or not (config.general or config.tasks):
        choice = held_out.choose(config, found)
    folders = {side.name: hub.resolve(side.model, source=config.source) for side in found.sides}
    tokenizers = {folder: load_tokenizer(folder) for folder in dict.fromkeys(folders.values())}
    for folder in tokenizers:
        read_config(folder)  # an architecture that is not supported is said first
    templates = {
        side.name: subject.open_template(side, folders[side.name], tokenizers[folders[side.name]])
        for side in found.sides
    }
    last = found.sides[-1].name  # the rows are those that the tuned model was trained like
    held = held_out.read(choice, templates[last]) if choice else None
    length = config.max_length or (found.run.max_length if found.run else 512)
    windows = general.read(config.general, tokenizers[folders[last]], length) if config.general else []
    asked = answers.questions(held, config.answers, config.seed) if held else []
    dtype = choose(config, found.run, device)
    lines = [f"{side.name}: {side.label}" for side in found.sides]
    lines += [*(held.lines if held else []), f"computed in {dtype} on {device}"]
    return Prepared(found, folders, templates, held, windows, asked, tasks, device, dtype, lines)


def choose(config: EvaluateConfig, run: TrainConfig | None, device: torch.device) -> str:
    """The dtype: what is asked for, else what the run computed in (its eval_loss is in it), where this machine can."""
    if config.dtype != "auto" or run is None or run.dtype == "auto":
        return str(choose_dtype(config.dtype, device)).removeprefix("torch.")
    if device.type == "cpu" and run.dtype != "float32":
        from minitune.train.prepare import training_dtype

        able = training_dtype(dataclasses.replace(run, dtype="auto", method="lora"), device)
        return str(able).removeprefix("torch.")
    return run.dtype


def harness() -> Any:
    """The module that imports lm-eval. UserError where it is missing."""
    try:
        from minitune.evaluate import harness
    except ImportError as error:
        raise UserError(f"--tasks needs lm-eval ({error}): pip install 'minitune[tasks]'") from None
    return harness


def measure(side: Side, ready: Prepared, config: EvaluateConfig, watch: Watch) -> Measured:
    """Everything of one side, with one decoder that is let go afterwards."""
    watch.say(f"loading {side.name}")
    decoder = load_model(ready.folders[side.name], side.adapter or None, ready.dtype, str(ready.device))
    decoder.requires_grad_(False)
    out, template = Measured(side), ready.templates[side.name]
    check_ids(decoder, ready, side)
    if ready.held:
        with watch.count(f"held-out loss of {side.name}", len(ready.held.rows)) as progress:
            out.held_out = loss.losses(decoder, ready.held.rows, config.tokens_per_pack, progress)
    if ready.windows:
        with watch.count(f"general text, {side.name}", len(ready.windows)) as progress:
            out.general = loss.losses(decoder, ready.windows, config.tokens_per_pack, progress)
    if not ready.asked and not ready.tasks:
        return out
    from minitune.infer.engine import Engine

    engine = Engine(decoder, template.tokenizer)  # behind the losses: it takes memory for its cache
    try:
        if ready.asked:
            with watch.count(f"answers of {side.name}", len(ready.asked)) as progress:
                sampling = answers.sampling_of(config)
                out.answers = answers.ask(engine, template, ready.asked, sampling, progress=progress)
        if ready.tasks:
            with watch.count(f"tasks, {side.name}", 0) as progress:
                lm = harness().MinituneLM(decoder, template, engine, "", config.tokens_per_pack, progress)
                out.tasks = harness().run(lm, *ready.tasks, config)
    finally:
        engine.close()
    return out


def check_ids(decoder: Decoder, ready: Prepared, side: Side) -> None:
    """UserError where the tokenizer gives ids that the weights don't have."""
    rows = [*(ready.held.rows if ready.held else []), *ready.windows]
    highest, vocabulary = max((max(row.input_ids) for row in rows), default=0), decoder.config.vocab_size
    if highest >= vocabulary:
        folder = ready.folders[side.name]
        raise UserError(f"{folder}: the tokenizer gives id {highest}, the weights have {vocabulary} rows")
