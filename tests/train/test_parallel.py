"""Several processes: the numbers of one, whatever their number; one voice; a fault of one ends all, and is named."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import ROWS, Launch, argv_of, free_port, log_of, one_of, result_of, rows_of, with_
from talker import write_rows
from torch.distributed import TCPStore

from minitune import TrainConfig, UserError, train
from minitune.checkpoint import resume
from minitune.data.loader import Loader
from minitune.data.template import Encoded
from minitune.train import lifeline, parallel, sharded
from minitune.train.checks import check_settings

pytestmark = pytest.mark.usefixtures("undrawn")
# Adam divides a gradient by its own size: one that is almost zero, and rounded otherwise, would move a weight otherwise.
STEADY: dict[str, Any] = {"adam_epsilon": 1e-3}


def close(one: str | Path, other: str | Path, what: float = 2e-6) -> None:
    """Equal but for the order of additions in float32: every number of the log, every tensor."""
    for a, b in zip(log_of(one), log_of(other), strict=True):
        assert a.keys() == b.keys()
        assert list(a.values()) == pytest.approx(list(b.values()), rel=1e-4)
    a, b = result_of(one), result_of(other)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=what, msg=lambda text, n=name: f"{n}: {text}")


def together(processes: Any, folder: Path, config: TrainConfig, size: int) -> Launch:
    """A run of `size` processes that must end well."""
    launch = Launch(processes, folder, [argv_of(config)] * size)
    assert launch.codes() == [0] * size, launch.said
    return launch


def test_every_row_once() -> None:
    """The shares of a step are its rows, each once; every process has as many packs; the whole step's numbers are
    those of one process."""
    rows = [Encoded(list(range(2, 5 + n)), [-100, *range(3, 5 + n)]) for n in range(11)]
    settings: dict[str, Any] = {"rows_per_step": 4, "tokens_per_pack": 12, "seed": 3}
    alone = list(Loader(rows, **settings).batches())
    for ranks in (2, 3, 4):
        shares = [list(Loader(rows, **settings, rank=r, ranks=ranks).batches()) for r in range(ranks)]
        for whole, parts in zip(alone, zip(*shares, strict=True), strict=True):
            assert {len(p.packs) for p in parts} == {max(len(p.packs) for p in parts)}
            assert {(p.rows, p.tokens, p.supervised) for p in parts} == {(whole.rows, whole.tokens, whole.supervised)}
            uids = [
                torch.cat([p.token_uids for b in batches for p in b.packs if p.supervised])
                for batches in ([whole], parts)
            ]
            assert sorted(uids[0].tolist()) == sorted(uids[1].tolist())
    # the last step has three rows: with four processes, one of them has none
    assert [sum(p.supervised for p in share[-1].packs) for share in shares].count(0) == 1


@pytest.mark.parametrize(("method", "size"), [("lora", 2), ("lora", 4), ("full", 2), ("full", 4)])
def test_the_numbers_of_one(processes: Any, config: TrainConfig, tmp_path: Path, method: Any, size: int) -> None:
    """Losses, norms, held-out losses and weights, dropout on, an epoch's last step short (with four processes,
    some have no row in it); rank 0 alone writes and speaks."""
    config = with_(config, method=method, eval_fraction=0.2, tokens_per_pack=64, num_train_epochs=1, **STEADY)
    train(config, quiet=True)
    many = with_(config, output=str(tmp_path / "many"))
    launch = together(processes, tmp_path, many, size)
    close(config.output, many.output)
    assert "done: 5 steps" in launch.said[0] and launch.said[1:] == [""] * (size - 1)
    assert len(rows_of(many.output)) == len(rows_of(config.output))


def one_of_whole(*args: Any) -> None:
    """The body of a process whose layers stay whole until backward, as on cards that have the memory."""
    sharded.keeps_whole = lambda *_: True
    one_of(*args)


def test_layers_that_stay_whole(processes: Any, config: TrainConfig, tmp_path: Path) -> None:
    """The numbers of one process, several packs a step, a held-out loss and a checkpoint between steps."""
    settings: dict[str, Any] = {"method": "full", "eval_fraction": 0.2, "tokens_per_pack": 64, "eval_steps": 2}
    config = with_(config, num_train_epochs=1, save_steps=3, **settings, **STEADY)
    train(config, quiet=True)
    many = with_(config, output=str(tmp_path / "many"))
    launch = Launch(processes, tmp_path, [argv_of(many)] * 2, body=one_of_whole)
    assert launch.codes() == [0, 0], launch.said
    close(config.output, many.output)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize(("method", "first", "then"), [("full", 2, 3), ("full", 2, 1), ("full", 1, 2), ("lora", 2, 1)])
def test_resumed_by_another_number(
    processes: Any, config: TrainConfig, tmp_path: Path, method: Any, first: int, then: int
) -> None:
    """A checkpoint of some processes, taken up by more or fewer, ends as one process ends without a break."""
    config = with_(config, method=method, num_train_epochs=1, save_steps=3, save_total_limit=9, **STEADY)
    train(config, quiet=True)
    broken = with_(config, output=str(tmp_path / "broken"))
    for size, begin in ((first, ""), (then, f"{broken.output}/checkpoint-3")):
        if size == 1:
            train(with_(broken, resume=begin), quiet=True)
        else:
            together(processes, tmp_path, with_(broken, resume=begin), size)
    close(config.output, broken.output)
    assert [row["step"] for row in rows_of(broken.output)] == list(range(1, 7))


def alive(launch: Launch, folder: Path, step: int) -> None:
    """Waits until a checkpoint of at least `step` is there."""
    end = time.monotonic() + 100
    while not any(int(p.name[11:]) >= step for p in folder.glob("checkpoint-*")):
        assert time.monotonic() < end and all(p.is_alive() for p in launch.ranks), launch.said
        time.sleep(0.05)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies(processes: Any, config: TrainConfig, tmp_path: Path, victim: int) -> None:
    """Rank 1, or rank 0, at which all meet, is killed: within a minute the others have ended, one line says whose
    death it was and how to go on, and the checkpoint can be read."""
    config = with_(config, max_steps=100_000, save_steps=2)
    launch = Launch(processes, tmp_path, [argv_of(config)] * 3)
    alive(launch, Path(config.output), 2)
    begun = time.monotonic()
    os.kill(launch.ranks[victim].pid, signal.SIGKILL)
    codes = launch.codes(60)
    assert time.monotonic() - begun < 60
    assert [code for rank, code in enumerate(codes) if rank != victim] == [1, 1], launch.said
    lines = [line for said in launch.said for line in said.splitlines() if line.startswith("minitune: ")]
    assert len(lines) == 1 and f"rank {victim}" in lines[0], lines
    assert "is good; go on with: " in lines[0] and lines[0].endswith("--resume")
    last = resume.newest(Path(config.output))
    assert last is not None and resume.read_state(last)["step"] >= 2


def three_watched(said: list[str]) -> list[lifeline.Lifeline]:
    """Lifelines of three processes, not started, that say why they would end instead of ending."""

    class Watched(lifeline.Lifeline):
        def _leave(self, why: str) -> None:
            said.append(why)
            self._ended.set()

    store = TCPStore("127.0.0.1", free_port(), is_master=True, wait_for_workers=False)
    return [Watched(store, rank, 3, lambda: "") for rank in range(3)]


def test_a_process_that_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beats keep all alive; one whose beats end is named by another, once, also where no connection breaks."""
    monkeypatch.setattr(lifeline, "BEAT", 0.05)
    monkeypatch.setattr(lifeline, "SILENT", 0.6)
    said: list[str] = []
    three = three_watched(said)
    for one in three:
        one.start()
    time.sleep(1.5)
    assert said == []
    three[2].end()  # its thread stops, as that of a stopped process does
    for one in three:
        one.join(10)
    assert len(said) == 2 and sorted(said)[0] == "" and sorted(said)[1].startswith("rank 2 on "), said


def test_a_step_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that go on, one process that saves for long, then one that stays behind in its step: that one is named,
    once, and neither the first step nor the saving was taken for a fault."""
    for name, value in (("BEAT", 0.05), ("HANG", 0.5), ("PAUSES", 2), ("SILENT", 60.0)):
        monkeypatch.setattr(lifeline, name, value)
    said: list[str] = []
    three = three_watched(said)
    doing = ["steps"] * 3
    for rank, one in enumerate(three):
        one.doing = lambda r=rank: doing[r]  # type: ignore[misc]
        one.steps = 1
        one.start()
    time.sleep(1.0)  # the first step
    for _ in range(5):
        for one in three:
            one.steps += 1
        time.sleep(0.1)
    doing[0] = "saving"
    time.sleep(1.0)
    assert said == []
    doing[0] = "steps"
    for one in three[:2]:
        one.steps += 1
    for one in three:
        one.join(10)
    assert len(said) >= 1 and [line for line in said if line] == [next(filter(None, said))], said
    assert "no step has ended for" in next(filter(None, said)) and "rank 2 on " in next(filter(None, said))
    assert "rank 0" not in "".join(said) and "rank 1" not in "".join(said)


def test_what_no_step_asks_is_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step may take its time, whatever the processes have asked each other before; steps as long as it are
    no hang, some three times as long are."""
    monkeypatch.setattr(parallel.dist, "all_reduce", lambda *_: None)
    line = lifeline.Lifeline(TCPStore("127.0.0.1", free_port(), is_master=True, wait_for_workers=False), 0, 2, str)
    team, doing = parallel.Team(0, 2, line), ["model"]
    team.watched(lambda: None, lambda: doing[0])
    team.any(False)
    doing[0] = "steps"
    team.any(False)
    assert line.steps == 1
    still, now = lifeline.Still(), 0.0
    for mark in (1, 2, 3):  # steps of 700 s
        for _ in range(70):
            assert still.behind([mark, mark], now) == []
            now += 10
    assert still.behind([4, 3], now) == [] and still.behind([4, 3], now + 20 * 700 - 1) == []
    assert still.behind([4, 3], now + 20 * 700) == [1]


@pytest.mark.parametrize("fault", [None, UserError("bad")])
def test_the_signal_handler_of_before_comes_back(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, fault: UserError | None
) -> None:
    """Whoever called from Python has their SIGTERM handler again, however the run ended."""
    store = TCPStore("127.0.0.1", free_port(), is_master=True, wait_for_workers=False)
    store.set("here/1", "there")
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(parallel.dist, "rendezvous", lambda *_, **__: iter([(store, 0, 2)]))
    for name in ("init_process_group", "destroy_process_group", "all_reduce"):
        monkeypatch.setattr(parallel.dist, name, lambda *_, **__: None)

    def mine(*_: object) -> None:
        pass

    before = signal.signal(signal.SIGTERM, mine)
    try:
        with suppress(UserError), parallel.join(config, lambda: ""):
            assert signal.getsignal(signal.SIGTERM) is not mine
            if fault:
                raise fault
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_signal_ends_all_at_one_step(processes: Any, config: TrainConfig, tmp_path: Path) -> None:
    """SIGTERM reaches one process: all save and end behind the same step."""
    config = with_(config, max_steps=100_000, save_steps=2, method="full")
    launch = Launch(processes, tmp_path, [argv_of(config)] * 2)
    alive(launch, Path(config.output), 2)
    os.kill(launch.ranks[1].pid, signal.SIGTERM)
    assert launch.codes() == [1, 1], launch.said
    assert "stopped at step" in launch.said[0] and "minitune: " not in launch.said[1]
    last = resume.newest(Path(config.output))
    assert last is not None and f"stopped at step {resume.read_state(last)['step']};" in launch.said[0]


def test_what_one_process_lacks_is_named(processes: Any, config: TrainConfig, data: Path, tmp_path: Path) -> None:
    """A file that is missing for one process, and one that holds other rows: one line, rank 0's, for all."""
    other = write_rows(tmp_path / "other.json", ROWS, start=5)
    for file, said in ((tmp_path / "none.json", "none.json: no such file"), (other, "differs from rank 0's")):
        launch = Launch(processes, tmp_path, [argv_of(config), argv_of(config, data=str(file))])
        assert launch.codes() == [2, 2], launch.said
        line = next(x for x in launch.said[0].splitlines() if x.startswith("minitune: "))
        assert line.startswith("minitune: rank 1 on ") and said in line
        assert "minitune: " not in launch.said[1] and not Path(config.output).exists()


def test_a_process_that_never_comes(processes: Any, config: TrainConfig, tmp_path: Path) -> None:
    """The others wait for as long as they were told, and say who is missing."""
    launch = Launch(processes, tmp_path, [argv_of(config, join_timeout=4.0)], missing=1)
    assert launch.codes() == [2]
    assert "4 s" in launch.said[0] and launch.said[0].count("minitune: ") == 1, launch.said
    assert not Path(config.output).exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"watch": "prompts.txt"}, "no process holds all weights"), ({"optim": "adamw_8bit"}, "is for one process")],
)
def test_what_does_not_go_together(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], said: str
) -> None:
    """Refused before anything is read where a launcher has started two processes; taken by one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("你好", encoding="utf-8")
    config = with_(config, method="full", **changes)
    check_settings(config)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=said):
        check_settings(config)
