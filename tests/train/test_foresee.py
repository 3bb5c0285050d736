"""What a run says and refuses before it loads anything, what holds it under --memory, and `minitune plan`."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.cells import cell_len
from rich.console import Console
from runs import argv_of, with_

from minitune.checkpoint.weights import read_config
from minitune.cli import main
from minitune.config import TrainConfig, UserError
from minitune.data.loader import Loader
from minitune.data.store import EncodedRows
from minitune.data.template import Encoded
from minitune.train import across, cards, memory, plan_view, speed
from minitune.train.foresee import Foretold, foresee, hopeless
from minitune.train.memory import GIB, MIB
from minitune.train.parallel import ALONE
from minitune.train.plan import methods
from minitune.train.prepare import Prepared, prepare
from minitune.train.run import train

CARD = torch.device("cuda")
ROOT = Path(__file__).resolve().parents[2]


class FakeCard:
    """What torch would say of a card; the fraction that was set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, gib: float, capability: tuple[int, int] = (9, 0)):
        self.total, self.free, self.reserved = int(gib * GIB), int(gib * GIB) - 500 * MIB, 0
        self.fraction: tuple[float, int] | None = None
        card = self
        for name, answer in {
            "mem_get_info": lambda device: (card.free - card.reserved, card.total),
            "memory_reserved": lambda device: card.reserved,
            "get_device_capability": lambda device=None: capability,
            "get_device_properties": lambda device: SimpleNamespace(name="NVIDIA Some", total_memory=card.total),
            "get_device_name": lambda device=None: "NVIDIA Some",
            "get_arch_list": lambda: ["sm_75", "sm_80", "sm_90", "sm_120"],
            "current_device": lambda: 0,
            "set_per_process_memory_fraction": lambda fraction, index: setattr(card, "fraction", (fraction, index)),
        }.items():
            monkeypatch.setattr(torch.cuda, name, answer)


@pytest.fixture
def ready(config: TrainConfig) -> Prepared:
    return prepare(config)


def on_card(config: TrainConfig, ready: Prepared, **settings: Any) -> Any:
    config = with_(config, device="auto", dtype="bfloat16", **settings)
    return foresee(config, ready, CARD, read_config(ready.base), ALONE)


def test_memory_is_held(config: TrainConfig, ready: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    """The allocator gets the bound less the driver's part, as planned, or as it is where that is more."""
    card = FakeCard(monkeypatch, 8)
    _, made, lines = on_card(config, ready, memory="2GiB")
    assert card.fraction is not None and card.fraction[1] == 0
    assert card.fraction[0] * card.total == pytest.approx(2 * GIB - made.parts.context, rel=1e-6)
    assert made.parts.context > 500 * MIB and made.parts.total <= 0.99 * 2 * GIB
    assert lines[0].startswith("plan: ") and "that --memory 2GiB leaves" in lines[0]
    card.free -= GIB
    on_card(config, ready, memory="2GiB")
    assert card.fraction[0] * card.total == pytest.approx(2 * GIB - memory.CONTEXT, rel=1e-6)
    card.fraction = None
    on_card(config, ready)
    assert card.fraction is None


def test_what_is_decided_becomes_a_setting(
    config: TrainConfig, ready: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeCard(monkeypatch, 8)
    decided, made, _ = on_card(config, ready, method="full")
    assert decided.optim == made.choice.optim == "adamw" and decided.tokens_per_pack == made.choice.pack == 8192


def test_a_run_that_cant_fit_is_refused(config: TrainConfig, ready: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is loaded, in one line; a plan that is over by less than the arithmetic may be wrong is tried,
    where no bound was named."""
    card = FakeCard(monkeypatch, 8)
    config = with_(config, gradient_checkpointing="false")
    need = on_card(config, ready)[1].parts.total
    card.total = card.free = int(need / 0.95 / 1.03)
    on_card(config, ready)
    card.total = card.free = int(need / 0.95 / 1.07)
    with pytest.raises(UserError, match=r"^lora \(.*\) needs 1\.\d GiB, the card has 1\.\d for it: try ") as refused:
        on_card(config, ready)
    assert "\n" not in str(refused.value)


def test_others_on_the_card_are_not_ours(config: TrainConfig, ready: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    """What other processes hold is no room, and what this one has read already is."""
    card = FakeCard(monkeypatch, 80)
    card.free = 3 * GIB
    assert cards.room_on(CARD, 0) == int(0.95 * (3 * GIB + memory.CONTEXT))
    card.reserved = GIB  # of the 3
    assert cards.room_on(CARD, 0) == int(0.95 * (3 * GIB + memory.CONTEXT))


def test_a_card_without_code(config: TrainConfig, ready: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pascal: one line that names the build; Volta where the build has code for it; a new card always."""
    FakeCard(monkeypatch, 8, (6, 1))
    with pytest.raises(UserError, match=r"compute capability 6\.1.*CUDA 12\.6.*whl/cu126") as refused:
        on_card(config, ready)
    assert "\n" not in str(refused.value)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_50", "sm_60", "sm_70", "sm_90a"])
    cards.check_served(CARD)
    FakeCard(monkeypatch, 8, (7, 5))
    cards.check_served(CARD)


def test_memory_is_for_a_card(config: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    for device in ("cpu", "auto"):
        if device == "auto" and torch.cuda.is_available():
            continue
        assert main(argv_of(config, device=device, memory="8GiB")) == 2
        assert "memory bounds a card" in capsys.readouterr().err
    assert main(argv_of(config, memory="a lot")) == 2
    assert "it takes a size such as 8GiB" in capsys.readouterr().err
    assert not Path(config.output).exists()


# Time


def test_the_end_is_foretold_once() -> None:
    """From steps behind the first interval, and only where steps are left."""
    loader = Loader([Encoded([1] * 10, [1] * 10)] * 8, rows_per_step=1)
    foretold = Foretold(100, None, loader)
    assert foretold.line(10, [(10, 5.0, 100)]) == ""
    assert foretold.line(15, [(10, 5.0, 100), (5, 0.5, 50)]) == ""
    said = foretold.line(20, [(10, 5.0, 100), (5, 0.5, 50), (5, 1.5, 50)])
    assert re.fullmatch(r"200 ms a step; the last of 100 at \d\d:\d\d:\d\d", said)
    assert foretold.line(30, [(10, 5.0, 100), (10, 2.0, 100), (10, 2.0, 100)]) == ""
    assert Foretold(20, None, loader).line(20, [(10, 5.0, 100), (10, 2.0, 100)]) == ""
    assert Foretold(18, None, loader).line(6, [(3, 5.0, 30), (3, 0.6, 30)]).startswith("200 ms a step; the last of 18 ")
    whole = [(10, 5.0, 100), (10, 2.0, 100), (10, 4.0, 100)]
    assert foretold.summary(whole) == {"step_seconds": 0.3, "probed_step_seconds": 0.2}
    assert foretold.summary(whole[:1])["step_seconds"] is None


def test_steps_that_are_shorter_later_are_foretold_by_their_tokens() -> None:
    """Of five rows, two a step: three steps, the last of one row."""
    foretold = Foretold(30, None, Loader([Encoded([1] * 30, [1] * 30)] * 5, rows_per_step=2))
    foretold.line(6, [(1, 9.0, 60), (5, 6.0, 300)])
    assert foretold.step_seconds == pytest.approx(1.0)  # all are 50 tokens long in the mean, not 60


def test_a_run_says_its_pace(config: TrainConfig, undrawn: None, capsys: pytest.CaptureFixture[str]) -> None:
    """summary.json has the mean of all steps, and what was foretold is near it."""
    summary = train(with_(config, max_steps=40, logging_steps=5))
    assert " a step; the last of 40 at " in capsys.readouterr().err
    log = [json.loads(row) for row in (Path(config.output) / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    rest = [row for row in log if row["step"] > 5]
    mean = sum(row["tokens"] / row["tokens_per_second"] for row in rest) / len(rest)
    assert summary["step_seconds"] == pytest.approx(mean, rel=0.25)
    assert summary["probed_step_seconds"] > 0


def test_a_short_run_says_its_pace_too(config: TrainConfig, undrawn: None, capsys: pytest.CaptureFixture[str]) -> None:
    """A run of fewer steps than two log intervals is looked at in between; its screen has no more lines for that."""
    summary = train(with_(config, max_steps=9, logging_steps=10))
    said = capsys.readouterr().err
    assert len(re.findall(" a step; the last of 9 at ", said)) == 1 and len(re.findall(r"^step \d", said, re.M)) == 1
    assert summary["probed_step_seconds"] and summary["step_seconds"]


@pytest.mark.parametrize(("seconds", "said"), [(0.0194, "19 ms"), (1.25, "1.2 s"), (95, "1:35"), (3700, "1:01:40")])
def test_seconds(seconds: float, said: str) -> None:
    assert speed.seconds_said(seconds) == said


# Cards by name


@pytest.mark.parametrize(
    ("typed", "name"),
    [("4090", "4090"), ("RTX 4090", "4090"), ("2080ti", "2080 Ti"), ("nvidia geforce rtx 2080", "2080"),
     ("4060 Ti", "4060 Ti 16GB"), ("A100-40GB", "A100 40GB"), ("h100", "H100")],
)  # fmt: skip
def test_cards_by_name(typed: str, name: str) -> None:
    assert cards.named(typed).name == name


def test_a_card_that_is_not_there() -> None:
    for name in ("7900 XTX", "", "A100"):
        with pytest.raises(UserError, match="is not in the table; it has 1080, "):
            cards.named(name)


@pytest.mark.parametrize(
    ("name", "gib", "want"),
    [("NVIDIA H100 80GB HBM3", 79.1, "H100"), ("NVIDIA GeForce RTX 2080 Ti", 10.7, "2080 Ti"),
     ("NVIDIA GeForce RTX 2080", 7.8, "2080"), ("NVIDIA A100-SXM4-40GB", 39.4, "A100 40GB"),
     ("NVIDIA A100 80GB PCIe", 79.2, "A100 80GB"), ("NVIDIA GeForce RTX 4060 Ti", 15.6, "4060 Ti 16GB"),
     ("NVIDIA GeForce RTX 4060 Ti", 7.6, None), ("NVIDIA GeForce RTX 4060 Laptop GPU", 7.6, None), ("NVIDIA L40S", 44.4, None), ("NVIDIA H200", 139.8, "H200")],
)  # fmt: skip
def test_the_card_here(name: str, gib: float, want: str | None) -> None:
    """By the driver's name; one of another memory is another card, whose time is not known."""
    found = cards.like(name, int(gib * GIB))
    assert (found and found.name) == want


# The command


def test_plan(config: TrainConfig, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """All methods of a named card side by side; the parts add up; nothing is loaded or written."""
    argv = ["plan", f"--model={config.model}", f"--data={config.data}", "--card", "4090"]
    assert main([*argv, "--json", "--png", str(tmp_path / "p.png")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [p["method"] for p in found["plans"]] == list(methods()) and found["known_card"] == "4090"
    for each in found["plans"]:
        assert sum(each["gib"].values()) == pytest.approx(each["total_gib"], abs=1e-3)
        assert each["fits"] and each["total_gib"] < found["room_gib"] < 24
        assert each["run_seconds"] == pytest.approx(each["steps"] * each["step_seconds"])
    assert found["advised"].startswith("advised: --method lora")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert main([*argv, "--method", "full"]) == 0
    said = capsys.readouterr().out
    assert "✓ fits" in said and "--method full fits" in said and not Path(config.output).exists()
    assert main([*argv, "--memory", "300MiB"]) == 1
    assert "✗ does not fit" in capsys.readouterr().out
    assert main([*argv[:-1], "1080"]) == 2
    assert "whl/cu126" in capsys.readouterr().err


def test_plan_of_a_folder_without_weights(
    config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """config.json and the tokenizer are all that is read of a model."""
    folder = tmp_path / "甄嬛"
    folder.mkdir()
    for file in Path(config.model).iterdir():
        if "safetensors" not in file.name:
            (folder / file.name).write_bytes(file.read_bytes())
    assert main(["plan", f"--model={folder}", f"--data={config.data}", "--card", "3060"]) == 0
    assert "甄嬛" in capsys.readouterr().out


def test_without_a_card_all_are_shown(config: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a card")
    assert main(["plan", f"--model={config.model}", f"--data={config.data}"]) == 0
    said = capsys.readouterr().out
    assert all(card.name in said for card in cards.CARDS if card.served) and "1080" not in said
    assert max(cell_len(line) for line in said.splitlines()) <= 80
    assert main(["plan", f"--model={config.model}", f"--data={config.data}", "--png", "p.png"]) == 2
    assert "name one: --card 4090" in capsys.readouterr().err


def test_without_a_card_what_was_asked_for_is_shown(
    config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One method, by its optimizer, also from a file; the status says whether anything fits."""
    if torch.cuda.is_available():
        pytest.skip("this machine has a card")
    (tmp_path / "c.yaml").write_text("method: full\noptim: adamw_8bit\n")
    asked = ["plan", f"--model={config.model}", f"--data={config.data}", "--config", str(tmp_path / "c.yaml")]
    assert main([*asked, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "1080" not in found and {p["optim"] for plans in found.values() for p in plans} == {"adamw_8bit"}
    assert main([*asked, "--memory", "0.8GiB"]) == 1
    said = capsys.readouterr().out
    assert "lora" not in said and "nothing of this fits any of them" in said


def test_the_table_is_no_wider_than_the_terminal(config: TrainConfig) -> None:
    """Wide characters count twice; the bar's parts end where their sums do."""
    config = with_(config, output="-")
    sheet = across.sheet(config, across.Where("3090", cards.named("3090")), False)
    sheet = plan_view.Sheet("甄嬛" * 60, *list(vars(sheet).values())[1:])
    for width in (60, 80, 140):
        out = io.StringIO()
        plan_view.show(sheet, Console(file=out, width=width, color_system=None))
        assert max(cell_len(line) for line in out.getvalue().splitlines()) <= width
    for made in sheet.plans:
        drawn = "".join(text for text, _ in plan_view.bar(made, 50, made.parts.total))
        assert len(drawn) == 50 and " " not in drawn
        assert drawn.count("▚") == pytest.approx(50 * made.parts.context / made.parts.total, abs=1)


def test_the_page_of_cards(shared: Path, tmp_path: Path) -> None:
    """docs/which-card.md, both languages: the table is what `bench/which_card.py` prints, for the real data's lengths."""
    lengths = json.loads((shared / "bench" / "huanhuan_lengths.json").read_text(encoding="utf-8"))
    rows = EncodedRows.of([Encoded([5] * (p + a), [-100] * p + [5] * a) for p, a in lengths])
    sys.path.insert(0, str(ROOT / "bench"))
    try:
        import train_command
        import which_card
    finally:
        sys.path.remove(str(ROOT / "bench"))
    (tmp_path / "config.json").write_text(json.dumps(train_command.CONFIG), encoding="utf-8")
    ready = Prepared(tmp_path, None, None, rows, rows[:0], [])  # type: ignore[arg-type]
    lines = which_card.table(TrainConfig(output="-"), ready)
    for page in ("which-card.md", "which-card.zh-CN.md"):
        text = (ROOT / "docs" / page).read_text(encoding="utf-8").splitlines()
        told = [line for line in text if line.startswith("|")][: len(lines)]
        assert told[2:] == lines[2:] and told[0].count("|") == lines[0].count("|"), page


def test_what_is_hopeless_is_not_read(config: TrainConfig, ready: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where not even the smallest step fits, whatever the rows are, the weights are left alone; such a run is refused."""
    card, shape = FakeCard(monkeypatch, 8), read_config(ready.base)
    for method in ("lora", "full"):
        changed = with_(config, method=method, device="auto", dtype="bfloat16")
        card.total = card.free = 8 * GIB
        assert not hopeless(changed, ready.base, shape, CARD)
        card.total = card.free = int(0.8 * memory.CONTEXT_SPARING)
        assert hopeless(changed, ready.base, shape, CARD)
        with pytest.raises(UserError, match="take a smaller --model|try "):
            foresee(changed, ready, CARD, shape, ALONE)
    assert not hopeless(config, ready.base, shape, torch.device("cpu"))
