"""`minitune demo`: ask, train, ask again. The embedded model, our own conversations, the ordinary commands."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

from minitune.config import TrainConfig, UserError

HERE = Path(__file__).parent
MARK = "demo.json"
MODEL = "smollm2"


def settings(output: Path) -> TrainConfig:
    """A model of 135M parameters that shall learn a voice in minutes: every linear, a high rate, small steps."""
    return TrainConfig(
        model=MODEL,
        data=str(HERE / "persona.jsonl"),
        output=str(output),
        num_train_epochs=2,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=1,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=4,
        lora_r=16,
        lora_dropout=0.0,
        lora_target_modules="all-linear",
        logging_steps=2,
        save_total_limit=1,
        dtype="float32",
    )


def tour(output: str) -> int:
    """Runs the whole story into the folder `output`; returns the exit code."""
    from rich.console import Console

    console = Console(highlight=False)
    started = time.perf_counter()
    folder = Path(output)
    make_room(folder)
    questions = [q["question"] for q in json.loads((HERE / "questions.json").read_text(encoding="utf-8"))]
    console.print("[bold]minitune demo[/]: a chat model learns to be Gudu, the copper kettle of a teahouse")
    console.print("1. the model as it is: SmolLM2-135M-Instruct, on questions that the data does not hold")
    before = answers(questions, None, 40)  # it rambles: its first words are enough
    console.print("2. it learns: LoRA on our conversations, Chinese and English")
    summary = learn(folder)
    console.print("3. the same questions again")
    after = answers(questions, folder, 72)
    console.print(table(questions, before, after))
    mark = {"questions": questions, "before": before, "after": after}
    (folder / MARK).write_text(json.dumps(mark, ensure_ascii=False, indent=2), encoding="utf-8")
    console.print(
        f"loss {summary['loss']:.2f} after {summary['steps']} steps; the curve is {folder / 'loss.png'}, "
        f"the answers are {folder / MARK}; {time.perf_counter() - started:.0f} s in all"
    )
    console.print(f"talk to it:  minitune chat --adapter {folder}", markup=False)
    console.print(
        "your own:    minitune train --model openbmb/MiniCPM-2B-sft-bf16 --data YOURS.json --output out", markup=False
    )
    return 0


def make_room(folder: Path) -> None:
    """An earlier demo gives way; anything else does not."""
    if not folder.exists():
        return
    ours = folder.is_dir() and f"data: {HERE / 'persona.jsonl'}" in _text(folder / "run.yaml")
    if not ours and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: is there already and is no demo; give another --output")
    shutil.rmtree(folder)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def learn(folder: Path) -> dict[str, Any]:
    from minitune.train.run import train

    return train(settings(folder))


def answers(questions: list[str], adapter: Path | None, tokens: int) -> list[str]:
    """One greedy answer a question, each in a conversation of its own, all at once."""
    from minitune.infer.chat import Message
    from minitune.infer.engine import answer_all
    from minitune.infer.request import Request
    from minitune.infer.sampling import Sampling
    from minitune.infer.session import open_model

    name = "gudu" if adapter else ""
    adapters = {name: adapter} if adapter else {}
    session = open_model(MODEL, adapters, dtype="float32", device="cpu", slots=len(questions))
    template = session.templates[name]
    sampling, stops = Sampling(temperature=0, max_new_tokens=tokens), frozenset(template.stop_ids)
    prompts = [tuple(template.prompt_ids([Message("user", question)])) for question in questions]
    handles = answer_all(session.engine, [Request(ids, sampling, stops, adapter=name) for ids in prompts])
    for handle in handles:
        if handle.error:
            raise handle.error
    return [handle.text.strip() for handle in handles]


def table(questions: list[str], before: list[str], after: list[str]) -> Any:
    from rich.table import Table

    shown = Table("question", "before", "after", show_lines=True, title="before and after", expand=True)
    for column, ratio in zip(shown.columns, (2, 4, 4), strict=True):
        column.ratio, column.overflow = ratio, "fold"  # Chinese has no spaces to wrap at
    for row in zip(questions, before, after, strict=True):
        shown.add_row(*(shorten(text) for text in row))
    return shown


def shorten(text: str, most: int = 220) -> Any:
    from rich.text import Text

    flat = " ".join(text.split())
    return Text(flat if len(flat) <= most else flat[:most].rstrip() + " …")
