"""How a run ends before its last step: no better held-out loss, Ctrl-C, SIGTERM, no memory; and how it goes on."""

from __future__ import annotations

import json
import os
import random
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import argv_of, in_terminal, log_of, result_of, rows_of, same, with_
from talker import command, write_rows

from minitune import TrainConfig, UserError, load_model, load_tokenizer, train
from minitune.cli import main
from minitune.data import dataset
from minitune.data.template import Template
from minitune.train import run as run_module
from minitune.train.optim import AdamW
from minitune.train.step import TrainStep, held_out_loss
from minitune.train.steps import make_loader
from minitune.train.stop import Best, Interrupt, Stopped, go_on, memory_said, mends, out_of_memory

pytestmark = pytest.mark.usefixtures("undrawn")


def checkpoints(folder: str | Path) -> list[int]:
    return sorted(int(p.name.split("-")[1]) for p in Path(folder).glob("checkpoint-*"))


# Early stopping


@pytest.mark.parametrize("threshold", [0.0, 0.05])
@pytest.mark.parametrize("patience", [1, 3])
def test_patience_is_hugging_faces(threshold: float, patience: int) -> None:
    """Over random losses, `Best` stops where transformers' own callback stops a Trainer, and names its best metric."""
    from transformers import EarlyStoppingCallback, TrainerControl, TrainerState, TrainingArguments

    args = TrainingArguments(metric_for_best_model="eval_loss", greater_is_better=False, report_to="none")
    chance = random.Random(f"{threshold} {patience}")
    stops = set()
    for _ in range(40):
        theirs, state = EarlyStoppingCallback(patience, threshold), TrainerState()
        ours = Best(patience, threshold)
        for step in range(1, 25):
            loss = round(2 - 0.05 * step + chance.uniform(-0.3, 0.3), 2)
            control = TrainerControl()
            theirs.on_evaluate(args, state, control, {"eval_loss": loss})
            if state.best_metric is None or loss < state.best_metric:  # Trainer._determine_best_metric, afterwards
                state.best_metric, state.best_global_step = loss, step
            ours.take(step, loss)
            assert ours.stop == control.should_training_stop and (ours.step, ours.loss) == (
                state.best_global_step,
                state.best_metric,
            )
            if ours.stop:
                break
        stops.add(step)
    assert len(stops) > 3, "the losses never differ in where they stop"


def test_a_loss_that_is_not_finite_is_never_the_best() -> None:
    best = Best(patience=2)
    assert not best.take(1, float("nan")) and best.loss is None
    assert best.take(2, 3.0) and not best.take(3, float("nan")) and not best.take(4, float("inf")) and best.stop


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The held-out losses that a run will see, one an evaluation."""
    given: list[float] = []
    monkeypatch.setattr(run_module, "held_out_loss", lambda *_: given.pop(0))
    return given


def test_the_best_is_kept_and_loaded(config: TrainConfig, losses: list[float]) -> None:
    """The best checkpoint outlives save_total_limit, the run ends when patience does, and the folder holds the best."""
    losses += [3.0, 2.0, 2.5, 2.4, 2.3, 9.9]
    config = with_(
        config, eval_fraction=0.1, eval_steps=1, save_steps=1, save_total_limit=1, early_stopping_patience=3,
        load_best_model_at_end=True,
    )  # fmt: skip
    summary = train(config, quiet=True)
    out = Path(config.output)
    assert checkpoints(out) == [2, 5] and losses == [9.9]
    assert [r["step"] for r in log_of(out) if "eval_loss" in r] == [1, 2, 3, 4, 5]
    found = {k: summary[k] for k in ("steps", "best_step", "best_eval_loss", "eval_loss", "stopped_early")}
    assert found == {"steps": 5, "best_step": 2, "best_eval_loss": 2.0, "eval_loss": 2.0, "stopped_early": True}
    assert json.loads((out / "summary.json").read_text(encoding="utf-8")) == summary
    final, best, last = (result_of(f) for f in (out, out / "checkpoint-2", out / "checkpoint-5"))
    assert all(torch.equal(final[name], best[name]) for name in best)
    assert any(not torch.equal(final[name], last[name]) for name in best)


def test_without_load_best_the_last_weights_stay(config: TrainConfig, losses: list[float]) -> None:
    """Patience alone stops the run; a new best is saved only where it is asked for."""
    losses += [3.0, 2.0, 2.5, 2.4]
    config = with_(config, eval_fraction=0.1, eval_steps=2, early_stopping_patience=2)
    summary = train(config, quiet=True)
    assert (summary["steps"], summary["best_step"], summary["eval_loss"]) == (8, 4, 2.4)
    assert checkpoints(config.output) == [5, 8]  # the end of the epoch of 5 steps, and where it stopped
    final, last = result_of(config.output), result_of(Path(config.output) / "checkpoint-8")
    assert all(torch.equal(final[name], last[name]) for name in last)


def test_the_result_has_the_best_loss(
    config: TrainConfig, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real run that is spoilt half-way: the folder, loaded anew, has the loss that the summary calls the best."""
    other = write_rows(tmp_path / "other.json", 7, start=100)
    config = with_(config, eval_data=str(other), eval_steps=1, load_best_model_at_end=True, method="full")
    monkeypatch.setattr(run_module, "learning_rate_at", lambda step, *_: 5e-3 if step < 6 else 1.0)
    summary = train(config, quiet=True)
    evals = {r["step"]: r["eval_loss"] for r in log_of(config.output) if "eval_loss" in r}
    best = min(evals, key=lambda step: evals[step])
    assert best < summary["steps"] and evals[best] < 0.95 * evals[summary["steps"]], "nothing was spoilt"
    assert (summary["best_step"], summary["best_eval_loss"], summary["eval_loss"]) == (best, evals[best], evals[best])
    decoder = load_model(config.output, None, "float32", "cpu")
    template = Template.recorded(load_tokenizer(model), {}, config.output, model)
    rows = dataset.load(str(other), template, config.max_length).rows
    batches = list(make_loader(config, rows, decoder.device, shuffle=False).batches())
    assert held_out_loss(decoder, batches) == pytest.approx(evals[best], rel=1e-6)


@pytest.mark.parametrize("behind", [-1, 2, 4])
def test_patience_survives_a_stop(config: TrainConfig, monkeypatch: pytest.MonkeyPatch, behind: int) -> None:
    """Interrupted and resumed, an early-stopped run ends at the same step, with the same bits and the same best."""
    config = with_(
        config, eval_fraction=0.1, eval_steps=1, learning_rate=0.3, lr_scheduler_type="constant", num_train_epochs=4,
        early_stopping_patience=5, load_best_model_at_end=True, save_total_limit=1,
    )  # fmt: skip
    whole = train(config, quiet=True)
    assert whole["stopped_early"] and whole["best_step"] < whole["steps"]
    at = whole["best_step"] + behind  # before the best, and while patience runs out
    assert 0 < at < whole["steps"]
    other = with_(config, output=f"{config.output}-stopped")
    interrupted_at(monkeypatch, at)
    with pytest.raises(Stopped):
        train(other, quiet=True)
    monkeypatch.undo()
    monkeypatch.setattr("minitune.train.report.draw", lambda *_: None)
    again = train(with_(other, resume="auto"), quiet=True)
    same(config.output, other.output)
    clocks = ("seconds", "peak_memory_gib", "step_seconds", "probed_step_seconds")
    assert {k: v for k, v in whole.items() if k not in clocks} == {k: v for k, v in again.items() if k not in clocks}
    more = train(with_(other, resume="auto", early_stopping_patience=0), quiet=True)  # more patience: it goes on
    assert more["steps"] > whole["steps"] and not more["stopped_early"]


@pytest.mark.parametrize("setting", ["early_stopping_patience", "load_best_model_at_end"])
def test_held_out_rows_are_needed(config: TrainConfig, setting: str) -> None:
    with pytest.raises(UserError, match=f"{setting} needs held-out rows; add --eval_fraction") as caught:
        train(with_(config, **{setting: 1}), quiet=True)
    assert "\n" not in str(caught.value) and not Path(config.output).exists()


# Signals


def interrupted_at(monkeypatch: pytest.MonkeyPatch, at: int, *signals: int) -> None:
    """Signals in the middle of the update of step `at`."""
    inner, calls = AdamW.step, []

    def step(self: AdamW, *args: Any) -> None:
        calls.append(1)
        if len(calls) == at:
            for number in signals or (signal.SIGINT,):
                os.kill(os.getpid(), number)
                time.sleep(0)  # the handler runs
        inner(self, *args)

    monkeypatch.setattr(AdamW, "step", step)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_what_is_said_goes_on(
    config: TrainConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    number: int,
) -> None:
    """The command in the last line, pasted into a shell, ends the run as if nothing had been."""
    whole = with_(config, output=str(tmp_path / "whole"))
    train(whole, quiet=True)
    config = with_(config, output=str(tmp_path / "甄嬛's run $x"))
    monkeypatch.setattr(sys, "argv", ["/opt/bin/minitune", "train"])
    interrupted_at(monkeypatch, 5, number)
    assert main(argv_of(config)) == 1
    said = capfd.readouterr().err.splitlines()
    assert any(line.startswith("stopping after this step") for line in said)
    said_last = said[-1].removeprefix("minitune: stopped at step 5; go on with: ")
    assert said_last != said[-1] and checkpoints(config.output) == [5]
    monkeypatch.undo()
    program, *argv = shlex.split(said_last)
    assert program == "minitune" and main(argv) == 0
    same(whole.output, config.output)


def test_how_one_goes_on(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """From Python both ways are told; `python -m minitune` is told as such."""
    from minitune.train.stop import program

    config = with_(config, output="a b")
    shell = "minitune train --config 'a b/run.yaml' --resume"
    assert go_on(config, "minitune") == f"go on with: {shell}"
    assert go_on(config, "").endswith(f'(dataclasses.replace(config, resume="auto")), or in a terminal: {shell}')
    monkeypatch.setattr(sys, "argv", ["/x/minitune/__main__.py", "train"])
    monkeypatch.setattr(sys, "executable", "/my env/bin/python")
    assert program() == "'/my env/bin/python' -m minitune"


def test_a_second_ctrl_c_stops_at_once(config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It saves nothing; the checkpoint before is good, and the resumed run equals one that was never stopped."""
    config = with_(config, save_steps=2)
    train(with_(config, output=str(tmp_path / "whole")), quiet=True)
    interrupted_at(monkeypatch, 5, signal.SIGINT, signal.SIGINT)
    assert main(argv_of(config)) == 130
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert checkpoints(config.output) == [2, 4] and not list(Path(config.output).glob(".*part"))
    monkeypatch.setattr("minitune.train.report.draw", lambda *_: None)
    train(with_(config, resume="auto"), quiet=True)
    same(config.output, tmp_path / "whole")


def test_a_signal_that_was_to_be_ignored_is() -> None:
    """`nohup` ignores SIGHUP, and a script's background job SIGINT: they stay ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupt() as interrupt:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not interrupt.wanted and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            os.kill(os.getpid(), signal.SIGTERM)
            assert interrupt.wanted
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_a_launcher_passes_on_is_no_second_wish(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's launcher sends SIGTERM behind a terminal's Ctrl-C: still one wish. The same signal again stops, and
    so does any second one where no launcher is."""
    for launched, second in ((True, signal.SIGINT), (True, signal.SIGTERM), (False, signal.SIGTERM)):
        if launched:
            monkeypatch.setenv("WORLD_SIZE", "2")
        else:
            monkeypatch.delenv("WORLD_SIZE")
        with Interrupt() as interrupt:
            os.kill(os.getpid(), signal.SIGINT)
            if launched:
                os.kill(os.getpid(), signal.SIGTERM)
            assert interrupt.wanted
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), second)


def test_sigterm_to_the_process(config: TrainConfig, tmp_path: Path, processes: Any) -> None:
    """A machine that is shut down sends SIGTERM: a checkpoint of that very step, exit code 1."""
    config = with_(config, num_train_epochs=400)
    said = tmp_path / "said"
    process = processes.Process(target=command, args=([*argv_of(config), "--logging_steps=1"], str(said)))
    process.start()
    log = Path(config.output) / "log.jsonl"
    while process.is_alive() and not (log.is_file() and log.stat().st_size):
        time.sleep(0.01)
    process.terminate()
    process.join(60)
    text = said.read_text(encoding="utf-8")
    assert process.exitcode == 1, text
    last = rows_of(config.output)[-1]["step"]
    assert checkpoints(config.output)[-1] == last and f"stopped at step {last}; go on with: " in text


@pytest.mark.parametrize("how", ["end", "ctrl-c", "twice", "error"])
def test_the_terminal_is_left_as_it_was(config: TrainConfig, processes: Any, how: str) -> None:
    """Whatever ends the run: the cursor is visible, the style plain, the last line at a line's beginning."""
    changes: dict[str, Any] = {"num_train_epochs": 2 if how == "end" else 400}
    if how == "error":
        changes["learning_rate"] = 1e30
    master, slave = os.openpty()
    argv = [*argv_of(config, **changes), "--logging_steps=1"]
    process = processes.Process(target=in_terminal, args=(argv, os.ttyname(slave), {}, 2.0 * (how == "twice")))
    process.start()
    os.set_blocking(master, False)
    out, pressed = b"", 0
    while process.is_alive():
        try:
            out += os.read(master, 65536)
        except BlockingIOError:
            time.sleep(0.01)
        due = {"ctrl-c": 1, "twice": 2}.get(how, 0)
        if pressed < due and (b"GiB" in out if pressed == 0 else b"Ctrl-C again: at once" in out):
            os.write(master, b"\x03")
            pressed += 1
    process.join()
    while True:
        try:
            out += os.read(master, 65536)
        except (BlockingIOError, OSError):
            break
    text = out.decode("utf-8", "replace")
    assert "\x1b[?25l" in text, "there was no live view"
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l")
    assert text.count("\x1b[?2026h") == text.count("\x1b[?2026l")
    code, line = {
        "end": (0, "done: "),
        "ctrl-c": (1, "minitune: stopped at step "),
        "twice": (130, "minitune: stopped"),
        "error": (1, "minitune: step 2: the loss or a gradient is not finite"),
    }[how]
    assert process.exitcode == code, text[-3000:]
    assert f"\n{line}" in text.replace("\x1b[?25h", ""), text[-700:]


# Memory


def no_memory(at: int, fail: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    inner = TrainStep.__call__

    def call(self: TrainStep, *args: Any) -> Any:
        if int(self.step_index) == at - 1:
            fail()
        return inner(self, *args)

    monkeypatch.setattr(TrainStep, "__call__", call)


def card_full() -> None:
    raise torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 7.7 GiB.\nIf reserved memory"
    )


def python_full() -> None:
    raise MemoryError


@pytest.mark.parametrize(
    ("fail", "words"),
    [
        (lambda: torch.empty(1 << 60), "out of memory: try"),  # the allocator's own words
        (python_full, "out of memory: try"),
        (card_full, "out of memory on the card (2.50 GiB more were asked for): try"),
    ],
    ids=["allocator", "python", "card"],
)
def test_no_memory(
    config: TrainConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fail: Callable[[], Any],
    words: str,
) -> None:
    """One line with mends that are flags, exit code 1; the named checkpoint goes on with the first two of them."""
    config = with_(config, save_steps=2, method="full")
    no_memory(6, fail, monkeypatch)
    assert main(argv_of(config)) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"minitune: {words}") and "Traceback" not in line
    assert f"from {config.output}/checkpoint-4, which is good" in line
    assert "--method lora" in line and "--max_length " not in line  # the longest row is short
    monkeypatch.undo()
    monkeypatch.setattr("minitune.train.report.draw", lambda *_: None)
    flags = [word for word in line.replace(" and ", " ").split() if word.startswith("--")][:2]
    assert flags == ["--gradient_checkpointing", "--tokens_per_pack"]
    pack = line.partition("--tokens_per_pack ")[2].split()[0]
    more = ["--gradient_checkpointing", "true", "--tokens_per_pack", pack, "--resume"]
    assert main([*argv_of(config), *more]) == 0
    said = capsys.readouterr().err
    assert f"note: tokens_per_pack was 8192, now it is {pack}: the same steps, rounded otherwise" in said
    train(with_(config, output=str(tmp_path / "whole")), quiet=True)
    theirs, ours = log_of(tmp_path / "whole"), log_of(config.output)
    assert [r["loss"] for r in ours] == pytest.approx([r["loss"] for r in theirs], rel=1e-3)


def test_no_memory_under_a_bound(config: TrainConfig) -> None:
    """The line names the bound, and a larger one first."""
    bound = with_(config, memory="8GiB")
    with pytest.raises(Stopped) as stopped, memory_said(bound, torch.device("cuda")):
        card_full()
    line = str(stopped.value)
    assert line.startswith("out of memory within --memory 8GiB (2.50 GiB more were asked for): try a larger --memory")
    assert "--gradient_checkpointing true" in line and "\n" not in line


def test_other_errors_are_not_memory(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug stays a traceback."""

    def bug() -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    no_memory(1, bug, monkeypatch)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        train(config, quiet=True)
    assert out_of_memory(ValueError("not enough memory")) == ""


# Going on


def test_other_spellings_of_the_same_paths(
    config: TrainConfig, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """./x, x and the absolute path, a link, another working folder: one model, one file, one run."""
    train(with_(config, output=str(tmp_path / "whole")), quiet=True)
    here = tmp_path / "here"
    here.mkdir()
    shutil.copytree(model, here / "m")
    shutil.copy(data, here / "d.json")
    monkeypatch.chdir(here)
    train(with_(config, model="m", data="d.json", output="out", max_steps=11), quiet=True)
    assert checkpoints("out") == [6, 11]
    (tmp_path / "link").symlink_to(here)
    (here / "moved").mkdir()
    shutil.copy("d.json", "moved/d.json")
    for again, (m, d) in enumerate(
        [("./m", "./d.json"), (str(here / "m"), str(here / "d.json")), ("../link/m", "moved/d.json")]
    ):
        shutil.copytree("out", f"out-{again}")
        train(with_(config, model=m, data=d, output=f"./out-{again}", max_steps=11, resume="auto"), quiet=True)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(here / "out", "from-above")
    train(
        with_(config, model="here/m", data="here/d.json", output="from-above", max_steps=11, resume="auto"), quiet=True
    )
    shutil.copytree(model, "another")
    with pytest.raises(UserError, match="was trained with model m, now it is another"):
        train(with_(config, model="another", output="from-above", max_steps=11, resume="auto"), quiet=True)


def test_a_step_of_the_same_rows(config: TrainConfig, tmp_path: Path) -> None:
    """A smaller batch with more accumulation is the same run; another product is another."""
    train(with_(config, output=str(tmp_path / "whole")), quiet=True)
    shutil.copytree(tmp_path / "whole", config.output)
    shutil.rmtree(Path(config.output) / "checkpoint-12")
    train(with_(config, per_device_train_batch_size=1, gradient_accumulation_steps=4, resume="auto"), quiet=True)
    same(config.output, tmp_path / "whole")
    with pytest.raises(UserError, match="per_device_train_batch_size 1, now it is 2|gradient_accumulation_steps"):
        train(with_(config, gradient_accumulation_steps=4, resume="auto"), quiet=True)


def test_other_held_out_rows_are_not_resumed(config: TrainConfig, tmp_path: Path) -> None:
    other = write_rows(tmp_path / "other.json", 5, start=50)
    config = with_(config, eval_data=str(other), max_steps=2)
    train(config, quiet=True)
    write_rows(other, 5, start=60)
    with pytest.raises(UserError, match="its held-out rows were others"):
        train(with_(config, resume="auto"), quiet=True)


def test_a_smaller_optimizer_is_named() -> None:
    """Of those that are smaller; inside backward a step is one pack, so a smaller pack is no mend."""
    said = {}
    for optim in ("auto", "adamw", "adamw_8bit", "adamw_8bit_in_backward"):
        said[optim] = " ".join(sum(mends(TrainConfig(method="full", optim=optim), 200, True), []))
    assert "--optim adamw_8bit (" in said["adamw"] and "--optim adamw_8bit_in_backward (" in said["adamw_8bit"]
    assert "--optim" not in said["auto"] + said["adamw_8bit_in_backward"]
    assert "--tokens_per_pack" in said["adamw_8bit"] and "--tokens_per_pack" not in said["adamw_8bit_in_backward"]
