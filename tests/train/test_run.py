"""Whole runs on a tiny model: the folder, the log, the held-out loss, and what a kill at any moment changes: nothing."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from runs import ROWS, argv_of, log_of, same, with_
from talker import command, write_rows, write_tokenizer
from twins import assert_close, hub_twin

from minitune import TrainConfig, UserError, load_model, load_tokenizer, train
from minitune.config import TemplateConfig, build, read_yaml
from minitune.data import records
from minitune.data.template import Template
from minitune.train import run as run_module
from minitune.train.stop import Stopped

LOG_KEYS = {"step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second", "memory_gib"}
RESULT = {"lora": ["adapter_config.json", "adapter_model.safetensors"], "full": ["config.json", "model.safetensors"]}
BESIDE = ["chat_template.jinja", "log.jsonl", "loss.png", "run.yaml", "summary.json", "tokenizer.json"]


@pytest.fixture(autouse=True)
def quick(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """loss.png takes longer than training the tiny model: drawn in one test."""
    if "folder" not in request.node.name:
        monkeypatch.setattr("minitune.train.report.draw", lambda *_: None)


@pytest.mark.parametrize(("method", "optim"), [("lora", "auto"), ("full", "adamw"), ("full", "adamw_8bit_in_backward")])
def test_the_folder(config: TrainConfig, tmp_path: Path, method: str, optim: str) -> None:
    """Everything that DESIGN.md lists is there, says what happened, and run.yaml repeats the run exactly."""
    config = with_(config, method=method, optim=optim)
    summary = train(config, quiet=True)
    out = Path(config.output)
    assert [n for n in [*RESULT[method], *BESIDE, "tokenizer_config.json"] if not (out / n).is_file()] == []
    assert [p.name for p in out.iterdir() if p.name.startswith(".")] == []
    assert sorted(p.name for p in out.glob("checkpoint-*")) == ["checkpoint-12", "checkpoint-6"]

    lines = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [set(line) for line in lines] == [LOG_KEYS] * 12
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert [line["epoch"] for line in lines] == [round(i / 6, 4) for i in range(1, 13)]
    assert lines[0]["learning_rate"] == 2e-3 and lines[-1]["learning_rate"] == pytest.approx(2e-3 / 12)
    template = Template(load_tokenizer(config.model), TemplateConfig("minicpm"))
    tokens = sum(len(template.encode(c.messages).input_ids) for c in records.load(config.data).conversations)
    assert sum(line["tokens"] for line in lines[:6]) == sum(line["tokens"] for line in lines[6:]) == tokens
    first, last = (sum(line["loss"] for line in part) for part in (lines[:6], lines[6:]))
    assert last < first
    assert all(line["grad_norm"] > 0 and line["tokens_per_second"] > 0 and line["memory_gib"] > 0 for line in lines)

    assert json.loads((out / "summary.json").read_text(encoding="utf-8")) == summary
    assert (summary["steps"], summary["tokens"], summary["method"]) == (12, 2 * tokens, method)
    import matplotlib.image

    picture = matplotlib.image.imread(out / "loss.png", format="png")
    assert picture.shape[0] > 300 and picture.std() > 0.01

    read = build(TrainConfig, read_yaml(out / "run.yaml"))
    assert read == with_(config, template=TemplateConfig("minicpm"))
    train(with_(read, output=str(tmp_path / "again")), quiet=True)
    same(out, tmp_path / "again")


def test_run_yaml_is_resolved(config: TrainConfig) -> None:
    """What was left to choose is written as it was chosen, so that another machine repeats the same run."""
    train(with_(config, learning_rate=None, dtype="auto", max_steps=1), quiet=True)
    read = build(TrainConfig, read_yaml(Path(config.output) / "run.yaml"))
    assert (read.learning_rate, read.template.name, read.resume) == (1e-4, "minicpm", "")
    assert read.dtype in ("float32", "bfloat16")


def test_the_adapter_serves_by_its_template(config: TrainConfig, model: Path) -> None:
    """The run's folder and its checkpoints alike record the template that they were trained with."""
    train(with_(config, max_steps=2, save_steps=1, template=TemplateConfig("auto", bos=False, strip=False)), quiet=True)
    tokenizer = load_tokenizer(model)
    for folder in (config.output, Path(config.output) / "checkpoint-2"):
        template = Template.recorded(tokenizer, {}, folder, model)
        assert template.tuned and template.config == TemplateConfig("minicpm", bos=False, strip=False)


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"max_steps": 5}, 5),
        ({"max_steps": 8, "num_train_epochs": 1}, 8),
        ({"max_steps": -1, "num_train_epochs": 1}, 6),  # the Trainer's way to say "by epochs"
        ({"num_train_epochs": 0.5}, 3),
        ({"num_train_epochs": 1.5, "per_device_train_batch_size": 11}, 2),
    ],
)
def test_number_of_steps(config: TrainConfig, settings: dict[str, Any], steps: int) -> None:
    """By steps, by epochs and by parts of an epoch; the schedule ends with the run."""
    assert train(with_(config, **settings), quiet=True)["steps"] == steps
    log = log_of(config.output)
    assert [row["step"] for row in log] == list(range(1, steps + 1))
    assert log[-1]["learning_rate"] == pytest.approx(2e-3 / steps)


def test_steps_of_tokens(config: TrainConfig) -> None:
    """`tokens_per_step` bounds each step and loses no row."""
    train(config, quiet=True)
    whole = sum(row["tokens"] for row in log_of(config.output))
    shutil.rmtree(config.output)
    train(with_(config, tokens_per_step=120), quiet=True)
    tokens = [row["tokens"] for row in log_of(config.output)]
    assert sum(tokens) == whole and max(tokens) <= 120 and len(tokens) > 12


def test_packs_and_recomputation_change_nothing(config: TrainConfig, tmp_path: Path) -> None:
    """Small packs, and activations computed again, give the same run but for the order of additions."""
    train(config, quiet=True)
    losses = [row["loss"] for row in log_of(config.output)]
    for name, settings in (("packs", {"tokens_per_pack": 40}), ("again", {"gradient_checkpointing": "true"})):
        train(with_(config, output=str(tmp_path / name), **settings), quiet=True)
        assert [row["loss"] for row in log_of(tmp_path / name)] == pytest.approx(losses, rel=1e-4)


@pytest.mark.parametrize("kind", ["eval_data", "eval_fraction"])
def test_held_out(config: TrainConfig, model: Path, data: Path, tmp_path: Path, kind: str) -> None:
    """The held-out loss is that of the finished adapter on rows that were not learned, recomputed row by row."""
    everything = records.load(data).conversations
    if kind == "eval_data":
        other = write_rows(tmp_path / "other.json", 7, start=100)
        config, held, learned = with_(config, eval_data=str(other)), records.load(other).conversations, ROWS
    else:
        config, learned = with_(config, eval_fraction=0.2), ROWS - 4
        order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(config.seed))[:4].tolist()
        held = [everything[i] for i in sorted(order)]
    summary = train(with_(config, eval_steps=2), quiet=True)
    log = log_of(config.output)
    steps = -(-learned // 4) * 2
    assert [row["step"] for row in log if "eval_loss" in row] == list(range(2, steps + 1, 2))
    assert summary["steps"] == steps and summary["eval_loss"] == log[-1]["eval_loss"]
    decoder = load_model(model, config.output, "float32", "cpu")
    template = Template(load_tokenizer(model), TemplateConfig("minicpm"))
    total, count = 0.0, 0
    for conversation in held:
        row = template.encode(conversation.messages)
        with torch.no_grad():
            logits = decoder.logits(torch.tensor([row.input_ids]))[0, :-1]
        labels = torch.tensor(row.labels[1:])
        total += F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum").item()
        count += int((labels != -100).sum())
    assert summary["eval_loss"] == pytest.approx(total / count, rel=1e-5)
    template = Template(load_tokenizer(model), TemplateConfig("minicpm"))
    tokens = {c.row: len(template.encode(c.messages).input_ids) for c in everything}
    if kind == "eval_fraction":
        learned_tokens = sum(tokens.values()) - sum(tokens[c.row] for c in held)
        assert sum(row["tokens"] for row in log if "tokens" in row) == 2 * learned_tokens


def test_the_newest_checkpoints_are_kept(config: TrainConfig) -> None:
    """Every `save_steps`, at most `save_total_limit`; what a kill left half-written goes."""
    (Path(config.output) / ".checkpoint-3.part").mkdir(parents=True)
    train(with_(config, save_steps=2, save_total_limit=3), quiet=True)
    names = sorted(p.name for p in Path(config.output).iterdir() if "checkpoint" in p.name)
    assert names == ["checkpoint-10", "checkpoint-12", "checkpoint-8"]


def test_the_adapter_opens_in_peft(config: TrainConfig, tmp_path: Path) -> None:
    """A run on a Granite twin: PEFT on `transformers`' model gives our logits; a full run's folder opens in it whole."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = write_tokenizer(tmp_path / "granite")
    hub = hub_twin(base, vocab_size=512, max_position_embeddings=256, initializer_range=0.1)
    ids = torch.tensor([[1, 9, 300, 4, 77, 12, 50, 301, 2]])
    config = with_(config, model=str(base), template=TemplateConfig("minicpm"), max_length=200)
    train(with_(config, lora_target_modules=("q_proj", "v_proj", "down_proj")), quiet=True)
    full = str(tmp_path / "full")
    train(with_(config, method="full", output=full), quiet=True)
    with torch.no_grad():
        plain = hub(ids).logits
        theirs = PeftModel.from_pretrained(hub, config.output).eval()(ids).logits
        assert float((theirs - plain).abs().max()) > 0.1, "nothing was learned"
        assert_close(load_model(base, config.output, "float32", "cpu").logits(ids), theirs, 3e-5)
        theirs = AutoModelForCausalLM.from_pretrained(full, dtype=torch.float32).eval()(ids).logits
        assert float((theirs - plain).abs().max()) > 0.1
        assert_close(load_model(full, None, "float32", "cpu").logits(ids), theirs, 3e-5)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_half_precision(config: TrainConfig, method: str) -> None:
    """float16 with loss scaling and bfloat16 with masters learn what float32 learns; the log says what was skipped."""
    losses = {}
    for dtype in ("float32", "float16", "bfloat16"):
        summary = train(with_(config, method=method, dtype=dtype, output=f"{config.output}-{dtype}"), quiet=True)
        losses[dtype] = [row["loss"] for row in log_of(f"{config.output}-{dtype}")]
        assert summary["dtype"] == dtype
    for dtype in ("float16", "bfloat16"):
        assert losses[dtype] == pytest.approx(losses["float32"], rel=0.03)


@pytest.mark.parametrize("optim", ["auto", "adamw_8bit", "adamw_8bit_in_backward"])
def test_a_loss_that_is_not_finite_stops(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], optim: str
) -> None:
    """One line, exit code 1, the last good checkpoint kept; resumed with a sane rate, the run is as if it never was."""
    from minitune.cli import main

    rate = run_module.learning_rate_at
    config = with_(config, method="lora" if optim == "auto" else "full", optim=optim)
    train(with_(config, save_steps=2), quiet=True)
    other = with_(config, save_steps=2, output=f"{config.output}-bad")
    monkeypatch.setattr(run_module, "learning_rate_at", lambda i, *a: 1e30 if i == 4 else rate(i, *a))
    argv = ["train", "--output", other.output, "--config", f"{config.output}/run.yaml", "--logging_steps", "1"]
    assert main(argv) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("minitune: step 6: the loss or a gradient is not finite")
    with pytest.raises(Stopped):
        train(with_(other, output=f"{config.output}-worse"), quiet=True)
    assert sorted(p.name for p in Path(other.output).glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    bad = [row["loss"] is None or row["grad_norm"] is None for row in log_of(other.output)]
    assert bad == [False] * 5 + [True]
    monkeypatch.undo()
    assert main([*argv, "--resume"]) == 0
    same(config.output, other.output)


# Resumed = never interrupted


def reached(folder: Path) -> int:
    """The step of the newest checkpoint that is written, or being written; -1 before the run has begun to write."""
    names = os.listdir(folder) if folder.exists() else []
    steps = [int(name.split("-")[1].split(".")[0]) for name in names if "checkpoint-" in name]
    return max(steps, default=0 if "run.yaml" in names else -1)


@pytest.mark.parametrize(
    "kind", ["lora float32", "lora float16", "full bfloat16", "full bfloat16 adamw_8bit", "full bfloat16 adamw_8bit_in_backward"]
)  # fmt: skip
def test_killed_at_any_moment(config: TrainConfig, tmp_path: Path, processes: Any, kind: str) -> None:
    """Killed before the first checkpoint, while writing one and at random moments after, then resumed until it ends, a
    run leaves the same tensors and the same log."""
    method, dtype, *optim = kind.split()
    config = with_(
        config, method=method, dtype=dtype, optim=optim[0] if optim else "auto", save_steps=2, save_total_limit=1, eval_steps=3, eval_fraction=0.1,
        logging_steps=3,
    )  # fmt: skip
    said = str(tmp_path / "said")
    whole, broken = tmp_path / "whole", tmp_path / "broken"

    def run(output: Path, *more: str, kill_at: int | None = None, delay: float = 0.0) -> int:
        argv = [*argv_of(config, output=str(output)), *more]
        process = processes.Process(target=command, args=(argv, said))
        process.start()
        if kill_at is not None:
            while process.is_alive() and reached(output) < kill_at:
                time.sleep(0.0005)
            time.sleep(delay)
            process.kill()
        process.join()
        return process.exitcode

    assert run(whole) == 0, Path(said).read_text(encoding="utf-8")
    chance = random.Random(kind)
    for moment in (0, 2, 6):
        more = ["--resume"] if reached(broken) >= 0 else []
        code = run(broken, *more, kill_at=moment, delay=chance.choice((0, chance.uniform(0, 0.05))))
        assert code == -signal.SIGKILL, Path(said).read_text(encoding="utf-8")
    assert reached(broken) < 10
    assert run(broken, "--resume") == 0, Path(said).read_text(encoding="utf-8")
    same(whole, broken)
    assert not list(broken.glob(".*checkpoint*"))


@pytest.mark.parametrize("method", ["lora", "full"])
def test_killed_while_writing(config: TrainConfig, method: str) -> None:
    """What a kill in the middle of a write leaves: half a checkpoint, half a log line, a checkpoint without its state."""
    config = with_(config, method=method, save_steps=3, save_total_limit=9)
    train(config, quiet=True)
    broken = Path(f"{config.output}-broken")
    shutil.copytree(config.output, broken)
    for name in (*RESULT[method], "summary.json"):
        (broken / name).unlink()
    (broken / "checkpoint-12").rename(broken / ".checkpoint-12.part")
    (broken / ".checkpoint-12.part" / "training_state.pt").write_bytes(b"PK")
    (broken / "checkpoint-9" / "training_state.pt").unlink()
    text = (broken / "log.jsonl").read_text(encoding="utf-8")
    (broken / "log.jsonl").write_text(text[: -len(text) // 40], encoding="utf-8")
    (broken / ".part").mkdir()
    train(with_(config, output=str(broken), resume="auto"), quiet=True)
    same(config.output, broken)


def test_killed_and_resumed_by_hand(config: TrainConfig, tmp_path: Path) -> None:
    """The same with the command itself, killed in its first epoch, resumed by naming the run's folder."""
    out, whole = Path(config.output), tmp_path / "whole"
    argv = [sys.executable, "-m", "minitune", *argv_of(config)]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    with open(tmp_path / "said", "wb") as log:
        process = subprocess.Popen(argv, env=environment, stdout=log, stderr=log)
        while reached(out) < 6 and process.poll() is None:
            time.sleep(0.002)
        process.kill()
        assert process.wait() == -signal.SIGKILL, (tmp_path / "said").read_text(encoding="utf-8")
    resumed = subprocess.run([*argv, f"--resume={out}"], env=environment, capture_output=True, encoding="utf-8")
    if resumed.returncode:  # the first checkpoint was not whole yet
        assert "no checkpoint there" in resumed.stderr
        resumed = subprocess.run([*argv, "--resume"], env=environment, capture_output=True, encoding="utf-8")
    assert resumed.returncode == 0 and re.search(r"going on from|beginning at the first step", resumed.stderr)
    train(with_(config, output=str(whole)), quiet=True)
    same(out, whole)


def test_ctrl_c_ends_a_step_first(config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the middle of an update: the step is finished, saved and said; the resumed run equals the whole one."""
    from minitune.train.optim import AdamW

    train(with_(config, output=str(tmp_path / "whole")), quiet=True)
    inner, calls = AdamW.step, []

    def step(self: AdamW, *args: Any) -> None:
        inner(self, *args)
        calls.append(1)
        if len(calls) == 5:
            assert threading.current_thread() is threading.main_thread()
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(AdamW, "step", step)
    with pytest.raises(Stopped, match="stopped at step 5; go on with: "):
        train(config, quiet=True)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert [row["step"] for row in log_of(config.output)] == [1, 2, 3, 4, 5]
    train(with_(config, resume="auto"), quiet=True)
    same(config.output, tmp_path / "whole")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora_r": 4}, "was trained with lora_r 8, now it is 4"),
        ({"method": "full"}, "was trained with method lora, now it is full"),
        ({"learning_rate": 1e-5}, "learning_rate 0.002, now it is 1e-05"),
        ({"lora_target_modules": ("q_proj",)}, "lora_target_modules"),
        ({"dtype": "bfloat16"}, "dtype float32"),
        ({"method": "full", "optim": "adamw_8bit"}, "method lora"),
    ],
)
def test_another_run_is_not_resumed(config: TrainConfig, changes: dict[str, Any], words: str) -> None:
    """Settings that change what is computed are named, and the folder stays as it was."""
    train(with_(config, max_steps=2), quiet=True)
    before = {p: p.read_bytes() for p in Path(config.output).rglob("*") if p.is_file()}
    with pytest.raises(UserError, match=words) as caught:
        train(with_(config, max_steps=2, resume="auto", **changes), quiet=True)
    assert "\n" not in str(caught.value)
    assert {p: p.read_bytes() for p in Path(config.output).rglob("*") if p.is_file()} == before


def test_other_rows_are_not_resumed(config: TrainConfig, tmp_path: Path) -> None:
    """A file that was changed since is another data set."""
    own = write_rows(tmp_path / "own.json", 8)
    train(with_(config, data=str(own)), quiet=True)
    write_rows(own, 8, start=1)
    with pytest.raises(UserError, match="trained on other rows"):
        train(with_(config, data=str(own), resume="auto"), quiet=True)
