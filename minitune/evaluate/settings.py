"""What `minitune evaluate` can be asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from minitune.config import UserError, setting
from minitune.settings import files_of


@dataclass(frozen=True)
class EvaluateConfig:
    """One evaluation."""

    model: str = setting("", "a folder, a hub name, or smollm2; by default the base that --adapter names", group="what")
    adapter: str = setting("", "a folder that `minitune train` wrote (an adapter, or a whole model)", group="what")
    data: str = setting("", "held-out conversations; by default those that the run held out", group="what")
    general: str = setting("", "plain text of your own (txt, or jsonl with `text`): is it forgotten?", group="what")
    train_data: str = setting(
        "", "what was learned, to find answers recited from it; by default the run's", group="what"
    )
    tasks: str = setting("", "tasks of lm-eval, such as ceval,cmmlu", group="what")
    source: Literal["modelscope", "huggingface"] = setting("modelscope", "the hub asked first", group="what")

    answers: int = setting(
        64, "rows that are answered (0: none); a seeded choice where there are more", group="answers"
    )
    max_new_tokens: int = setting(256, "tokens an answer at most", group="answers")
    temperature: float = setting(0.0, "0: always the likeliest token", group="answers")
    top_p: float = setting(1.0, "draw from the likeliest that together reach this probability", group="answers")
    repetition_penalty: float = setting(1.0, "above 1: what is there already becomes less likely", group="answers")
    seed: int = setting(42, "which rows are answered, and what is drawn", group="answers")

    task_path: str = setting("", "a folder of task YAMLs of your own", group="tasks")
    limit: int = setting(0, "questions a task at most (0: all)", group="tasks")
    num_fewshot: int = setting(-1, "examples before each question (-1: as the task says)", group="tasks")
    apply_chat_template: bool = setting(False, "ask as a user's turn instead of as plain text", group="tasks")

    max_length: int = setting(0, "tokens a row at most (0: as the run, else 512)", group="computation")
    tokens_per_pack: int = setting(8192, "tokens computed at once at most (CPU: 1024)", group="computation")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto", "auto: as the run was, where this machine multiplies it", group="computation"
    )
    device: str = setting("auto", "cuda where there is a card, else cpu", group="computation")

    show: int = setting(3, "answers shown in the terminal", group="output")
    json: bool = setting(False, "print everything as one JSON object instead", group="output")
    html: str = setting("", "write a page that opens offline", group="output")
    output: str = setting("", "a folder for evaluation.json, answers.jsonl and report.html", group="output")

    def check(self) -> None:
        """UserError for what can't work, before anything is read."""
        for name, least, below in (
            ("answers", 0, math.inf),
            ("max_length", 0, math.inf),
            ("tokens_per_pack", 1, math.inf),
            ("limit", 0, math.inf),
            ("num_fewshot", -1, math.inf),
            ("show", 0, math.inf),
            ("seed", 0, 2**32),
        ):
            value = getattr(self, name)
            if not least <= value < below:
                raise UserError(f"{name} is {value}; it is at least {least}")
        for name in ("data", "general", "train_data"):
            for path in files_of(getattr(self, name)):
                if not Path(path).is_file():
                    raise UserError(f"{path}: no such file")
        if self.task_path and not Path(self.task_path).is_dir():
            raise UserError(f"{self.task_path}: no such folder")
        if self.output and Path(self.output).exists() and not Path(self.output).is_dir():
            raise UserError(f"{self.output}: is a file; give a folder as --output")
        if self.html:
            place = Path(self.html)
            if place.is_dir() or not place.parent.is_dir():
                raise UserError(f"{self.html}: name a file in a folder that is there")
