"""Sample prompts while a run learns: what is answered, when, and that the run does not notice."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import argv_of, log_of, rows_of, same, with_

from minitune import TrainConfig, UserError, load_model, load_tokenizer, train
from minitune.cli import main
from minitune.cli.train import answer
from minitune.data.template import Template
from minitune.infer.chat import Message
from minitune.model.decoder import Decoder
from minitune.train.optim import AdamW
from minitune.train.stop import Stopped
from minitune.train.watch import Ask, read_prompts

pytestmark = pytest.mark.usefixtures("undrawn")

PROMPTS = ["你是谁?", "你好吗 today?"]


@pytest.fixture
def watched(config: TrainConfig, tmp_path: Path) -> TrainConfig:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\ufeff" + "\n\n".join(PROMPTS) + "\n", encoding="utf-8")
    return with_(config, watch=str(prompts), watch_max_new_tokens=12)


@pytest.mark.parametrize("kind", ["lora float32", "lora bfloat16", "full float32"])
def test_the_run_is_the_same(watched: TrainConfig, kind: str) -> None:
    """Bit for bit, with dropout, held-out losses and recomputation, whatever is answered in between."""
    method, dtype = kind.split()
    watched = with_(
        watched, method=method, dtype=dtype, eval_fraction=0.2, gradient_checkpointing="true", watch_steps=1,
        watch_temperature=0.9,
    )  # fmt: skip
    train(watched, quiet=True, answer=answer)
    without = with_(watched, watch="", output=f"{watched.output}-without")
    train(without, quiet=True)
    same(watched.output, without.output)
    assert len(rows_of(watched.output, "watch.jsonl")) == 2 * (1 + log_of(watched.output)[-1]["step"])
    assert not (Path(without.output) / "watch.jsonl").exists()


def test_nothing_that_an_answer_does_stays(watched: TrainConfig) -> None:
    """An answer that draws from every source of chance and leaves the decoder in another mode changes nothing."""
    seen: list[tuple[bool, Any]] = []

    def rude(decoder: Decoder, tokenizer: Any, ask: Ask) -> Sequence[tuple[str, str]]:
        seen.append((decoder.training, (float(torch.rand(())), random.random(), float(np.random.rand()))))
        torch.manual_seed(0)
        decoder.train()
        return [("", "stop")] * len(ask.prompt_ids)

    torch.manual_seed(1), random.seed(2), np.random.seed(3)
    train(watched, quiet=True, answer=rude)
    after = (float(torch.rand(())), random.random(), float(np.random.rand()))
    assert not any(training for training, _ in seen)
    assert {chance for _, chance in seen} == {after}, "an answer moved a generator"


def test_what_is_answered_and_when(watched: TrainConfig, tmp_path: Path) -> None:
    """Before the first step, every N steps and at the end; the last answers are the greedy ones of the finished
    adapter, found by the plain forward pass without a cache."""
    watched = with_(watched, watch_steps=5)
    train(watched, quiet=True, answer=answer)
    rows = rows_of(watched.output, "watch.jsonl")
    assert [(r["step"], r["prompt"]) for r in rows] == [(s, p) for s in (0, 5, 10, 12) for p in PROMPTS]
    assert [r["epoch"] for r in rows[::2]] == [0.0, round(5 / 6, 4), round(10 / 6, 4), 2.0]
    base = load_model(watched.model, None, "float32", "cpu")
    tuned = load_model(watched.model, watched.output, "float32", "cpu")
    tokenizer = load_tokenizer(watched.model)
    template = Template.recorded(tokenizer, {}, watched.output, Path(watched.model))
    for decoder, answers in ((base, rows[:2]), (tuned, rows[-2:])):
        for row in answers:
            ids = template.prompt_ids([Message("user", row["prompt"])])
            start, finish = len(ids), "length"
            for _ in range(12):
                with torch.no_grad():
                    best = int(decoder.logits(torch.tensor([ids]))[0, -1].argmax())
                if best in template.stop_ids:
                    finish = "stop"
                    break
                ids.append(best)
            assert (row["answer"], row["finish"]) == (tokenizer.decode(ids[start:], skip_special_tokens=True), finish)
    assert rows[0]["answer"] != rows[-2]["answer"], "nothing was learned"


def test_by_epochs_and_resumed(watched: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default at the end of each epoch; a stopped and resumed run leaves the same watch.jsonl."""
    train(watched, quiet=True, answer=answer)
    assert [r["step"] for r in rows_of(watched.output, "watch.jsonl")[::2]] == [0, 6, 12]
    other = with_(watched, output=f"{watched.output}-stopped")
    inner, calls = AdamW.step, []

    def step(self: AdamW, *args: Any) -> None:
        inner(self, *args)
        calls.append(1)
        if len(calls) == 8:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(AdamW, "step", step)
    with pytest.raises(Stopped):
        train(other, quiet=True, answer=answer)
    monkeypatch.setattr(AdamW, "step", inner)
    shutil.rmtree(Path(other.output) / "checkpoint-8")  # as if killed a moment before: its rows are dropped
    with (Path(other.output) / "watch.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 7, "prompt": "x"}\n{"step": 8, "pro')
    train(with_(other, resume="auto"), quiet=True, answer=answer)
    assert rows_of(other.output, "watch.jsonl") == rows_of(watched.output, "watch.jsonl")
    same(watched.output, other.output)


def test_time_spent_is_not_the_steps(watched: TrainConfig) -> None:
    """tokens_per_second counts steps alone: an answer that takes 0.3 s does not show in it."""

    def slow(decoder: Decoder, tokenizer: Any, ask: Ask) -> Sequence[tuple[str, str]]:
        time.sleep(0.3)
        return [("", "stop")] * len(ask.prompt_ids)

    train(with_(watched, watch_steps=1, logging_steps=1, max_steps=5), quiet=True, answer=slow)
    seconds = sorted(r["tokens"] / r["tokens_per_second"] for r in rows_of(watched.output))
    assert seconds[len(seconds) // 2] < 0.3


def test_a_failing_answer_is_a_note(watched: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    """No memory for an answer, or scores that are not finite: said, and the run goes on."""
    errors: list[Exception] = [torch.OutOfMemoryError("CUDA out of memory.\nmore"), UserError("not finite")]

    def failing(decoder: Decoder, tokenizer: Any, ask: Ask) -> Sequence[tuple[str, str]]:
        if errors:
            raise errors.pop(0)
        return [("好", "stop")] * len(ask.prompt_ids)

    assert train(watched, answer=failing)["steps"] == 12
    said = [line for line in capsys.readouterr().err.splitlines() if "no answers" in line]
    assert said == ["note: step 0: no answers (CUDA out of memory.)", "note: step 6: no answers (not finite)"]
    assert [(r["step"], r["answer"]) for r in rows_of(watched.output, "watch.jsonl")] == [(12, "好"), (12, "好")]


def test_the_command(watched: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    """`--watch` on the command line; in plain lines an answer is one line, whatever is in it."""
    assert main([*argv_of(watched), "--max_steps=1"]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "  watch " in line]
    starts = [f"step {s}/1  watch {i}  {p} -> " for s in (0, 1) for i, p in enumerate(PROMPTS, 1)]
    assert all(line.startswith(start) for line, start in zip(said, starts, strict=True))
    assert all(c.isprintable() for line in said for c in line)


def test_from_python_an_answer_is_needed(watched: TrainConfig) -> None:
    with pytest.raises(UserError, match=r"pass answer=minitune\.cli\.train\.answer"):
        train(watched, quiet=True)
    assert not Path(watched.output).exists()


# The file


def test_messages(tmp_path: Path) -> None:
    """Every form of a line of a .jsonl file."""
    turns = [{"role": "system", "content": "你是甄嬛"}, {"role": "user", "content": "你好"}]
    more = [*turns, {"role": "assistant", "content": "嗯"}, {"role": "user", "content": "再见"}]
    lines = [{"messages": turns}, more, {"prompt": "谁?"}, "直接"]
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n\n", encoding="utf-8")
    got = [[(m.role, m.content) for m in talk] for talk in read_prompts(path)]
    plain = [[(m["role"], m["content"]) for m in talk] for talk in (turns, more)]
    assert got == [*plain, [("user", "谁?")], [("user", "直接")]]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("p.txt", "\n \n", "no prompt in it; write one a line"),
        ("p.txt", '\n{"messages": []}\n', "line 2: this is JSON; name the file .jsonl"),
        ("p.jsonl", '"a"\n你好\n', "line 2: not JSON"),
        ("p.jsonl", '{"messages": [{"role": "user"}]}', "line 1: it takes"),
        ("p.jsonl", '{"question": "x"}', "line 1: it takes"),
        ("p.jsonl", '{"prompt": " "}', "line 1: it takes"),
        (
            "p.jsonl",
            '[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]',
            "the last one is user's",
        ),
        ("p.jsonl", '[{"role": "assistant", "content": "a"}]', "then user and assistant in turn"),
        ("missing.txt", None, "no such file; --watch names a file of prompts"),
        ("p.txt", b"\xc4\xe3", "not UTF-8; save the file as UTF-8"),
    ],
)
def test_bad_files(config: TrainConfig, tmp_path: Path, name: str, text: str | bytes | None, words: str) -> None:
    """One line that names the file and the line, before anything is loaded or written."""
    path = tmp_path / name
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as caught:
        train(with_(config, watch=str(path), model="not/there"), quiet=True, answer=answer)
    assert words in str(caught.value) and str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
    assert not Path(config.output).exists()


def test_a_prompt_that_is_too_long(watched: TrainConfig) -> None:
    limit = load_model(watched.model, None, "float32", "cpu").config.max_position_embeddings
    Path(watched.watch).write_text("你" * limit, encoding="utf-8")
    with pytest.raises(UserError, match=rf"prompt 1 has \d+ tokens, the model reads {limit}; shorten it"):
        train(watched, quiet=True, answer=answer)
    assert not Path(watched.output).exists()
