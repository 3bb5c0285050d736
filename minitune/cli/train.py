"""`minitune train`."""

from __future__ import annotations

import argparse
import gc
import os
from shlex import quote
from typing import Any

from minitune.cli.parser import accept, declare_settings, settings_of
from minitune.config import TrainConfig


def declare_train(parser: argparse.ArgumentParser) -> None:
    from minitune.foreign import tables

    parser.usage = "%(prog)s --model MODEL --data FILE --output DIR [settings]"
    parser.epilog = (
        "The names of LLaMA-Factory, transformers, PEFT, TRL, ms-swift and axolotl are understood too, in a file and "
        "as flags: each is translated, said to have no effect, or refused. A finished run's run.yaml holds every "
        "setting; --config run.yaml repeats the run."
    )
    declare_settings(parser, TrainConfig, config=True)
    accept(parser, [*tables.TRAIN])


def call_train(values: dict[str, Any]) -> int:
    config = settings_of(values, TrainConfig)
    from minitune.train import ahead
    from minitune.train.checks import check_settings

    if os.environ.get("WORLD_SIZE", "1") == "1":  # several processes check together
        check_settings(config)  # before seconds of imports
    ahead.wake(config.device)
    ahead.import_slow()
    gc.disable()  # torch's import makes a million objects that stay: looking for garbage among them takes a tenth of it
    try:
        from minitune.train.run import train
        from minitune.train.stop import program
    finally:
        gc.enable()

    summary = train(config, answer=answer, program=program())
    loss = "none" if summary["loss"] is None else f"{summary['loss']:.4f}"
    held = "" if summary["eval_loss"] is None else f", held out {summary['eval_loss']:.4f}"
    early = " (no better held-out loss came: stopped early)" if summary.get("stopped_early") else ""
    print(
        f"done: {summary['steps']} steps in {summary['seconds']:.0f} s{early}, loss {loss}{held}, "
        f"peak {summary['peak_memory_gib']:.1f} GiB -> {config.output}"
    )
    if (best := summary.get("best_step")) and best != summary["steps"]:
        kept = "these weights are the result" if config.load_best_model_at_end else "--load_best_model_at_end keeps it"
        print(f"best: held out {summary['best_eval_loss']:.4f} at step {best}; {kept}")
    adapter = f" --adapter {quote(config.output)}" if config.method != "full" else ""
    model = config.output if config.method == "full" else config.model
    print(f"talk to it: minitune chat --model {quote(model)}{adapter}")
    return 0


def answer(decoder: Any, tokenizer: Any, ask: Any) -> list[tuple[str, str]]:
    """Sample answers while a run learns (`train.watch.Answer`): `train` itself may not import `infer`."""
    from minitune.infer.engine import Engine, answer_all
    from minitune.infer.request import Request
    from minitune.infer.sampling import Sampling

    sampling = Sampling(temperature=ask.temperature, top_p=1.0, max_new_tokens=ask.max_new_tokens, seed=ask.seed)
    slots = min(16, len(ask.prompt_ids))
    room = max(map(len, ask.prompt_ids)) + ask.max_new_tokens + 256  # no more memory than these prompts need
    engine = Engine(decoder, tokenizer, slots=slots, cache_tokens=slots * room)
    stop_ids = frozenset(ask.stop_ids)
    handles = answer_all(engine, [Request(tuple(ids), sampling, stop_ids) for ids in ask.prompt_ids])
    for handle in handles:
        if handle.error is not None:
            raise handle.error
    return [(handle.text, handle.finish) for handle in handles]
