"""Whole evaluations of tiny runs: the numbers are those of other programs, the rows those that the run held out."""

from __future__ import annotations

import json
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from talker import write_rows
from twins import hub_loss

from minitune import TrainConfig, UserError, load_tokenizer, train
from minitune.cli import main
from minitune.data.records import Message
from minitune.data.template import Template
from minitune.evaluate import held_out, subject
from minitune.evaluate.run import evaluate
from minitune.evaluate.settings import EvaluateConfig
from minitune.train.prepare import prepare


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.json", 60)


@pytest.fixture(scope="module")
def runs(twin: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, TrainConfig]:
    """One run of LoRA and one of every parameter, each with a quarter of the rows held out."""
    folder = tmp_path_factory.mktemp("runs")
    out = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minitune.train.report.draw", lambda *_: None)
        for method, rate in (("lora", 3e-2), ("full", 3e-3)):
            out[method] = TrainConfig(
                model=str(twin),
                data=str(data),
                output=str(folder / method),
                method=method,  # type: ignore[arg-type]
                eval_fraction=0.25,
                num_train_epochs=2,
                learning_rate=rate,
                dtype="float32",
                device="cpu",
                seed=5,
            )
            train(out[method], quiet=True)
    return out


def summary_of(config: TrainConfig) -> dict[str, Any]:
    return json.loads((Path(config.output) / "summary.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def results(runs: dict[str, TrainConfig]) -> dict[str, dict[str, Any]]:
    """Both runs evaluated with nothing given but their folders."""
    return {
        "lora": evaluate(EvaluateConfig(adapter=runs["lora"].output, max_new_tokens=12), quiet=True),
        "full": evaluate(EvaluateConfig(model=runs["full"].output, max_new_tokens=12), quiet=True),
    }


def theirs(config: TrainConfig, tuned: bool) -> Any:
    """The model as transformers and PEFT open it."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    if tuned and config.method == "full":
        return AutoModelForCausalLM.from_pretrained(config.output, dtype=torch.float32).eval()
    model = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32)
    return PeftModel.from_pretrained(model, config.output).eval() if tuned else model.eval()


@pytest.mark.parametrize("method", ["lora", "full"])
def test_held_out_rows_and_their_loss(
    runs: dict[str, TrainConfig], results: dict[str, dict[str, Any]], method: str
) -> None:
    """The rows that the run held out; training's own eval_loss; and transformers' loss of the same rows, each."""
    config, found = runs[method], results[method]
    held = prepare(config).held_out
    assert [row["row"] for row in found["held_out"]["base"]["rows"]] == held.numbers.tolist() and len(held) == 15
    assert found["held_out"]["tuned"]["loss"] == pytest.approx(summary_of(config)["eval_loss"], rel=1e-6)
    rows = list(held)
    with torch.no_grad():
        for side in ("base", "tuned"):
            model = theirs(config, side == "tuned")
            assert found["held_out"][side]["loss"] == pytest.approx(float(hub_loss(model, rows)), abs=5e-5)
            for row, one in list(zip(rows, found["held_out"][side]["rows"], strict=True))[:4]:
                assert one["loss"] == pytest.approx(float(hub_loss(model, [row])), abs=5e-5)
                assert one["tokens"] == row.supervised
    assert found["held_out"]["tuned"]["loss"] < found["held_out"]["base"]["loss"] - 0.1


@pytest.mark.parametrize("method", ["lora", "full"])
def test_answers_are_those_of_transformers(
    runs: dict[str, TrainConfig], results: dict[str, dict[str, Any]], method: str, twin: Path
) -> None:
    """Greedy, of both sides, prompted as trained; and what is counted of them."""
    config, found = runs[method], results[method]["answers"]
    tokenizer = load_tokenizer(twin)
    template = Template.recorded(tokenizer, {}, config.output)
    assert [r["row"] for r in found["rows"]] == [r["row"] for r in results[method]["held_out"]["base"]["rows"]]
    for side in ("base", "tuned"):
        model = theirs(config, side == "tuned")
        for row in found["rows"][:5]:
            turns = [Message(m["role"], m["content"]) for m in row["messages"]]
            prompt = template.prompt_ids(turns)
            with torch.no_grad():
                out = model.generate(
                    input_ids=torch.tensor([prompt]), do_sample=False, max_new_tokens=12, pad_token_id=0,
                    eos_token_id=list(template.stop_ids),
                )[0, len(prompt) :].tolist()  # fmt: skip
            stopped = out[-1] in template.stop_ids
            said = out[:-1] if stopped else out
            text = tokenizer.decode(said, skip_special_tokens=True)
            # an answer that is cut inside a character ends before it
            assert row[side]["text"] == text or (not stopped and row[side]["text"] + "�" == text)
            assert (row[side]["finish"], row[side]["tokens"]) == ("stop" if stopped else "length", len(said))
        stops = [row[side]["finish"] == "stop" for row in found["rows"]]
        assert found[side]["stops"] == pytest.approx(sum(stops) / len(stops))
        assert found[side]["tokens"] == pytest.approx(sum(r[side]["tokens"] for r in found["rows"]) / len(stops))
        echoes = [row[side]["text"].split() == row["messages"][-1]["content"].split() for row in found["rows"]]
        assert found[side]["echoes"] == pytest.approx(sum(echoes) / len(stops))
        assert 0 <= found[side]["repetition"] <= 1 and 0 <= found[side]["recited"] <= 1
    assert found["train_data"] == [config.data]


def test_what_was_held_out_is_not_what_is_recited(
    runs: dict[str, TrainConfig], results: dict[str, dict[str, Any]]
) -> None:
    """Rows of the run's own file that it did not learn are no source of recitals."""
    config = EvaluateConfig(adapter=runs["lora"].output)
    found = subject.subject(config)
    held = held_out.read(held_out.choose(config, found), prepare(runs["lora"]).template)
    learned = held_out.Learned.of(config, held, found, [])
    assert learned is not None
    places = [place for place, _ in learned.answers()]
    assert len(places) == 45 and not set(places) & set(held.places)
    assert set(places) | set(held.places) == {(runs["lora"].data, row) for row in range(1, 61)}


def test_several_files_and_another_length(twin: Path, tmp_path: Path) -> None:
    """The split is the run's own whatever --max_length is asked for here: its length decided what there was to split."""
    files = []
    for n, count in enumerate((20, 30)):
        rows = json.loads(write_rows(tmp_path / f"{n}.json", count, 100 * n).read_text(encoding="utf-8"))
        rows.insert(5, {"instruction": "你" * 90, "input": "", "output": "x"})  # nothing to learn within 64 tokens
        files.append(tmp_path / f"{n}.json")
        files[-1].write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    run = TrainConfig(
        model=str(twin), data=",".join(map(str, files)), output="x", eval_fraction=0.3, max_length=64, max_samples=25, seed=9
    )  # fmt: skip
    ready = prepare(run)
    found = subject.Subject([], run, str(tmp_path))
    for length in (0, 128):
        config = EvaluateConfig(max_length=length)
        held = held_out.read(held_out.choose(config, found), ready.template)
        assert [(list(r.input_ids), list(r.labels)) for r in held.rows] == [
            (r.input_ids, r.labels) for r in ready.held_out
        ]
        assert [row for _, row in held.places] == ready.held_out.numbers.tolist()
        assert {file for file, _ in held.places} == set(map(str, files))
        assert all(ready.template.encode(c.messages).input_ids == r.input_ids for c, r in zip(held.conversations, held.rows, strict=True))  # fmt: skip
        assert held.learned is not None and len(held.learned) == len(ready.learn)
        learned = held_out.Learned.of(config, held, found, [])
        assert learned is not None and {p for p, _ in learned.answers()} == held.learned


def test_rows_that_were_learned_too_are_said(
    twin: Path, data: Path, tmp_path: Path, runs: dict[str, TrainConfig]
) -> None:
    """A held-out file that repeats training rows: they are named; an own row of the same file is not."""
    rows = json.loads(data.read_text(encoding="utf-8"))
    leaky = tmp_path / "leaky.json"
    leaky.write_text(
        json.dumps([rows[0], {"instruction": "新的?", "input": "", "output": "是。"}, rows[7]]), encoding="utf-8"
    )
    config = EvaluateConfig(adapter=runs["lora"].output, data=str(leaky), train_data=str(data), max_new_tokens=2)
    found = evaluate(config, quiet=True)
    assert [r["row"] for r in found["answers"]["also_learned"]] == [1, 3] and len(
        found["held_out"]["base"]["rows"]
    ) == 3
    same = EvaluateConfig(adapter=runs["lora"].output, data=str(leaky), train_data=str(leaky), max_new_tokens=2)
    assert evaluate(same, quiet=True)["answers"]["also_learned"] == []


def test_the_base_alone(twin: Path, data: Path) -> None:
    """Without an adapter there is one side, and no verdict."""
    general = data.parent / "general.txt"
    general.write_text("今天 is a day. " * 30, encoding="utf-8")
    config = EvaluateConfig(model=str(twin), data=str(data), general=str(general), answers=3, max_new_tokens=4)
    found = evaluate(config, quiet=True)
    assert set(found["sides"]) == {"base"} and "verdict" not in found["general"] and len(found["answers"]["rows"]) == 3
    assert len(found["held_out"]["base"]["rows"]) == 60 and "recited" not in found["answers"]["base"]


def test_forgetting(runs: dict[str, TrainConfig], tmp_path: Path) -> None:
    """The same text before and after; a run at this rate has forgotten much of anything else."""
    general = tmp_path / "general.jsonl"
    lines = [{"text": f"abc def ghi {i} " * 20} for i in range(8)]
    general.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    found = evaluate(EvaluateConfig(adapter=runs["lora"].output, general=str(general), answers=0), quiet=True)
    part = found["general"]
    assert part["base"]["tokens"] == part["tuned"]["tokens"] > 500
    assert (
        part["rise"] == pytest.approx(part["tuned"]["loss"] - part["base"]["loss"]) and "forgotten" in part["verdict"]
    )
    assert "answers" not in found


# The command


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_command(
    runs: dict[str, TrainConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """stdout: a table and answers side by side; a folder and a page with the same numbers."""
    monkeypatch.setenv("COLUMNS", "80")
    out, page = tmp_path / "out", tmp_path / "page.html"
    argv = [
        "evaluate",
        "--adapter",
        runs["lora"].output,
        "--max_new_tokens",
        "8",
        "--output",
        str(out),
        "--html",
        str(page),
    ]
    assert main(argv) == 0
    said = capsys.readouterr()
    assert "held out by the run, 0.25 of them at seed 5" in said.err and "tuned:" in said.err
    kept = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))
    answers = [json.loads(line) for line in (out / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    before, after = (f"{kept['held_out'][side]['loss']:.4f}" for side in ("base", "tuned"))
    assert re.search(rf"held-out loss, nats a token +{before} +{after}", said.out)
    assert re.search(r"answers that stop +[\d.]+% +[\d.]+%", said.out) and "12 more answers" in said.out
    assert len(answers) == 15 and answers[0]["wanted"] in said.out and "rows" not in kept["answers"]
    shown = [line for line in said.out.splitlines() if "│" in line]
    assert shown and all(len(line) <= 80 for line in shown)
    for path in (page, out / "report.html"):
        read = Tags()
        read.feed(path.read_text(encoding="utf-8"))
        assert not read.tags & {"script", "link", "img", "iframe"} and not read.attributes & {"src", "href"}
        assert before in read.text and after in read.text
        assert all(row["wanted"] in read.text for row in answers)
    assert {p.name for p in out.iterdir()} == {"evaluation.json", "answers.jsonl", "report.html"}


def test_json_is_all_that_stdout_holds(runs: dict[str, TrainConfig], capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["evaluate", "--adapter", runs["lora"].output, "--answers", "2", "--max_new_tokens", "3", "--json"]
    assert main(argv) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert len(found["answers"]["rows"]) == 2 and found["held_out"]["tuned"]["perplexity"] > 1
    again = evaluate(EvaluateConfig(adapter=runs["lora"].output, answers=2, max_new_tokens=3), quiet=True)
    assert [r["row"] for r in again["answers"]["rows"]] == [r["row"] for r in found["answers"]["rows"]]


def test_a_full_run_given_as_the_adapter(runs: dict[str, TrainConfig], twin: Path, tmp_path: Path) -> None:
    """A whole model beside its base, whichever flag names it; another base can be given."""
    full = runs["full"].output
    for config in (EvaluateConfig(model=full), EvaluateConfig(adapter=full)):
        sides = subject.subject(config).sides
        assert [(s.name, s.model, s.adapter) for s in sides] == [("base", str(twin), ""), ("tuned", full, "")]
    assert subject.subject(EvaluateConfig(adapter=full, model="other")).sides[0].model == "other"
    assert [s.name for s in subject.subject(EvaluateConfig(model=str(twin))).sides] == ["base"]


def test_faults_are_one_line(
    runs: dict[str, TrainConfig], twin: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lone = tmp_path / "lone"
    lone.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (lone / name).write_bytes((Path(runs["lora"].output) / name).read_bytes())
    lora = runs["lora"].output
    for flags, reason in (
        ([], "no model; give --model"),
        (["--model", str(twin)], "no held-out rows; give --data"),
        (["--adapter", str(lone)], "lone has no run.yaml; give --data"),
        (["--adapter", str(twin)], "no adapter there"),
        (["--adapter", lora, "--data", "gone.json"], "gone.json: no such file"),
        (["--adapter", lora, "--answers", "-1"], "answers is -1"),
        (["--adapter", lora, "--temperature", "-1"], "temperature is -1"),
        (["--adapter", lora, "--max_new_tokens", "0"], "max_new_tokens is 0"),
        (["--adapter", lora, "--html", str(tmp_path / "no" / "x.html")], "name a file in a folder that is there"),
        (["--adapter", lora, "--output", str(Path(lora) / "run.yaml")], "is a file; give a folder"),
        (["--adapter", lora, "--dats", "x"], "did you mean data?"),
    ):
        assert main(["evaluate", *flags]) == 2
        said = capsys.readouterr()
        fault = said.err.strip().splitlines()
        assert reason in fault[-1] and fault[-1].startswith("minitune: ") and not said.out, flags


def test_data_that_has_moved(runs: dict[str, TrainConfig], tmp_path: Path) -> None:
    """A run whose data is not where run.yaml says: named, with the flag that helps."""
    found = subject.subject(EvaluateConfig(adapter=runs["lora"].output))
    moved = subject.Subject(found.sides, found.run, found.run_folder)
    with pytest.raises(UserError, match=r"names gone\.json, which is not here; give --data"):
        subject.here("gone.json", moved)


def test_what_is_not_finite_is_null_and_a_missing_package_is_a_note(
    runs: dict[str, TrainConfig], data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One window has no standard error; without sacrebleu all but its scores is there, and a line says what to install."""
    from minitune.evaluate import page

    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    general = tmp_path / "short.txt"
    general.write_text("abc def", encoding="utf-8")
    config = EvaluateConfig(adapter=runs["lora"].output, general=str(general), answers=2, max_new_tokens=2)
    found = evaluate(config, quiet=True)
    assert math.isnan(found["general"]["standard_error"]) and "scores" not in found["answers"]["tuned"]
    assert [note for note in found["notes"] if "minitune[eval]" in note] == found["notes"]
    page.write_folder(str(tmp_path / "out"), found)
    kept = json.loads((tmp_path / "out" / "evaluation.json").read_text(encoding="utf-8"))
    assert kept["general"]["standard_error"] is None and kept["general"]["rise"] == found["general"]["rise"]
