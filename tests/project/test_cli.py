"""What a user gets wrong is one line and exit code 2, with nothing half-written; what a user may spell, works."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from talker import write_rows
from twins import hub_twin

from minitune import cli
from minitune.config import TrainConfig, build, read_yaml

ROOT = Path(__file__).resolve().parents[2]
Run = Callable[..., tuple[int, str, str]]
pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.json", 6)


@pytest.fixture
def refused(run: Run, tmp_path: Path) -> Callable[..., str]:
    """Runs a command that must be refused: exit code 2, one line on stderr, none on stdout, no file more than before."""

    def call(*argv: object, notes: bool = False) -> str:
        before = tree(tmp_path)
        code, out, err = run(*argv)
        assert (code, out) == (2, ""), err
        if notes:  # a warning may stand before it
            err = err.splitlines(True)[-1]
        assert err.startswith("minitune: ") and err.count("\n") == 1 and len(err) < 600, err
        assert tree(tmp_path) == before
        return err

    return call


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() if p.is_file() else b"" for p in sorted(folder.rglob("*"))}


def train(model: object, data: object, output: object, *more: object) -> list[object]:
    base = ["train", "--model", model, "--data", data, "--output", output, "--device", "cpu", "--dtype", "float32"]
    return [*base, "--max_steps", 2, *more]


# Bad input


BAD_FILES: dict[str, tuple[str, bytes | None, tuple[str, ...]]] = {
    "missing": ("gone.json", None, ("gone.json", "no such file")),
    "not UTF-8": ("rows.json", "[{\"instruction\": \"问\", \"output\": \"答\"}]".encode("gbk"), ("UTF-8",)),
    "cut short": ("rows.json", b'[\n {"instruction": "a", "output": "b"},\n {"instruction": "c", "outp', ("line 3", "column")),
    "empty output": ("rows.json", json.dumps([{"instruction": "a", "output": o} for o in ("b", "c", "")]).encode(), ("row 3", "output")),
    "blank output": ("rows.json", json.dumps([{"instruction": "a", "output": o} for o in ("b", " \n")]).encode(), ("row 2", "output")),
    "output is a number": ("rows.json", json.dumps([{"instruction": "a", "output": 3}]).encode(), ("row 1", "output")),
    "misspelt": ("rows.json", json.dumps([{"instrution": "a", "output": "b"}]).encode(), ("instrution", "did you mean", "instruction")),
    "nothing": ("rows.json", b"", ("rows.json",)),
    "no rows": ("rows.json", b"[]", ("rows.json",)),
    "of another kind": ("rows.xlsx", b"PK\x03\x04", ("rows.xlsx",)),
}  # fmt: skip


@pytest.mark.parametrize("command", ["train", "check", "preview"])
@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_data(refused: Callable[..., str], run: Run, model: Path, tmp_path: Path, name: str, command: str) -> None:
    """Each command that reads conversations says the same of the same file; check goes on where some rows are good."""
    file, content, words = BAD_FILES[name]
    path = tmp_path / "in" / file
    path.parent.mkdir()
    if content is not None:
        path.write_bytes(content)
    argv = {
        "train": train(model, path, tmp_path / "out"),
        "check": ["data", "check", path],
        "preview": ["data", "preview", path, "--model", model],
    }[command]
    if command == "check" and name in ("empty output", "blank output"):
        code, said, err = run(*argv)
        assert (code, err) == (1, "")
    else:
        said = refused(*argv)
    assert all(word in said for word in (*words, str(path)))


def test_a_folder_is_no_file(refused: Callable[..., str], model: Path, tmp_path: Path, data: Path) -> None:
    """Folders where files are needed, and files where folders are."""
    assert str(tmp_path) in refused(*train(model, tmp_path, tmp_path / "out"))
    assert "is a file" in refused(*train(model, data, data))
    assert str(data) in refused(*train(model, data, data / "out"))
    assert "is a file" in refused(*train(data, data, tmp_path / "out"))
    assert str(tmp_path) in refused(*train(model, data, tmp_path / "out", "--config", tmp_path))
    assert "no such file" in refused(*train(model, data, tmp_path / "out", "--config", tmp_path / "x.yaml"))


def test_a_checkpoint_that_is_not_whole(
    refused: Callable[..., str], golden: Callable[[str], Path], model: Path, tmp_path: Path, data: Path
) -> None:
    """A missing shard, a file cut short, no tokenizer: named, before anything is written."""
    broken = tmp_path / "sharded"
    shutil.copytree(golden("tiny-2b-bin"), broken)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(model / name, broken / name)
    os.chmod(broken, 0o755)
    (broken / "pytorch_model-00002-of-00002.bin").unlink()
    assert "pytorch_model-00002-of-00002.bin" in refused(*train(broken, data, tmp_path / "out"))
    short = tmp_path / "short"
    shutil.copytree(model, short)
    weights = (short / "model.safetensors").read_bytes()
    (short / "model.safetensors").write_bytes(weights[:-9])
    assert "cut short" in refused(*train(short, data, tmp_path / "out"))
    (short / "model.safetensors").write_bytes(weights)
    (short / "tokenizer.json").unlink()
    assert "tokenizer" in refused(*train(short, data, tmp_path / "out"))
    other = tmp_path / "other"
    shutil.copytree(model, other)
    config = json.loads((other / "config.json").read_text(encoding="utf-8"))
    for architecture in ("MiniCPM3ForCausalLM", "MixtralForCausalLM"):
        (other / "config.json").write_text(json.dumps(config | {"architectures": [architecture]}), encoding="utf-8")
        said = refused(*train(other, data, tmp_path / "out"))
        assert architecture in said and "LlamaForCausalLM" in said


def test_an_adapter_for_another_model(
    refused: Callable[..., str], golden: Callable[[str], Path], model: Path, tmp_path: Path
) -> None:
    """chat and export say what it was trained on, name the tensor that does not fit, and write nothing."""
    lora = golden("tiny-2b-lora")
    other = tmp_path / "other"
    hub_twin(other, vocab_size=512, hidden_size=96)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(model / name, other / name)
    jinja = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    (other / "chat_template.jinja").write_text(jinja, encoding="utf-8")
    for argv in (
        ["chat", "--model", other, "--adapter", lora, "--prompt", "hi"],
        ["export", "--model", other, "--adapter", lora, "--output", tmp_path / "out"],
    ):
        assert "made for another model" in refused(*argv, notes=True)
    assert "no adapter" in refused("chat", "--model", model, "--adapter", tmp_path, "--prompt", "hi")


def test_export_takes_the_base_that_the_adapter_names(
    run: Run, refused: Callable[..., str], golden: Callable[[str], Path], model: Path, tmp_path: Path
) -> None:
    """--adapter alone, or the run's folder as --model, write what both flags write."""
    lora = tmp_path / "run"
    shutil.copytree(golden("tiny-2b-lora"), lora)
    config = json.loads((lora / "adapter_config.json").read_text(encoding="utf-8"))
    (lora / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": str(model)}), encoding="utf-8"
    )
    both = ("--model", model, "--adapter", lora)
    for name, flags in {"both": both, "adapter": ("--adapter", lora), "model": ("--model", lora)}.items():
        assert run("export", *flags, "--output", tmp_path / name)[0] == 0
        whole = (tmp_path / name / "model.safetensors").read_bytes()
        assert whole == (tmp_path / "both" / "model.safetensors").read_bytes()
    assert "give --model" in refused("export", "--output", tmp_path / "none")


def test_a_folder_that_holds_another_run(
    refused: Callable[..., str], run: Run, model: Path, tmp_path: Path, data: Path
) -> None:
    """Never overwritten; --resume goes on with it, and only with itself."""
    out = tmp_path / "out"
    assert "no checkpoint to go on from" in refused(*train(model, data, out, "--resume"))
    code, said, err = run(*train(model, data, out))
    assert code == 0 and f"minitune chat --model {model} --adapter {out}" in said and "step 2/2" in err
    assert f"{out}: holds another run (run.yaml); add --resume" in refused(*train(model, data, out))
    assert "holds another run" in refused(*train(tmp_path / "absent", data, out, "--method", "full"))
    assert "lora_r" in refused(*train(model, data, out, "--resume", "--lora_r", 4))
    assert "no checkpoint there" in refused(*train(model, data, tmp_path / "new", "--resume", tmp_path / "nowhere"))
    assert run(*train(model, data, out, "--resume"))[0] == 0
    elsewhere = tmp_path / "elsewhere"
    assert run(*train(model, data, elsewhere))[0] == 0
    assert "holds another run" in refused(*train(model, data, elsewhere, "--resume", out))
    copied = tmp_path / "copied"
    assert run(*train(model, data, copied, "--resume", out / "checkpoint-2"))[0] == 0


SETTINGS: list[tuple[list[str], tuple[str, ...]]] = [
    (["--learning_rate", "foo"], ("learning_rate", "'foo'", "a number")),
    (["--learning_rate", "nan"], ("learning_rate",)),
    (["--learning_rate=-1"], ("learning_rate",)),
    (["--lora_r", "1.5"], ("lora_r", "whole number")),
    (["--lora_r", "0"], ("lora_r is 0",)),
    (["--method", "qlora2"], ("method", "lora, qlora, full")),
    (["--overlong", "trim"], ("overlong", "cut, drop, error")),
    (["--template.bos", "maybe"], ("template.bos", "true or false")),
    (["--lerning_rate", "1"], ("lerning_rate", "did you mean learning_rate")),
    (["--lora-alfa", "1"], ("alfa", "did you mean lora_alpha")),
    (["--num_train_epochs"], ("num_train_epochs", "expected one argument")),
    (["--num_train_epochs", "inf", "--max_steps", "0"], ("num_train_epochs",)),
    (["extra"], ("extra",)),
    (["--adam_beta1", "1"], ("adam_beta1",)),
    (["--seed", "-1"], ("seed",)),
    (["--lora_dropout", "1"], ("lora_dropout",)),
    (["--eval_fraction", "1.5"], ("eval_fraction",)),
    (["--eval_fraction", "0.99"], ("too few to hold out",)),
    (["--eval_data", "gone.json"], ("gone.json", "no such file")),
    (["--max_length", "2"], ("--max_length",)),
    (["--lora_target_modules", "w_proj"], ("w_proj", "q_proj")),
    (["--lora_target_modules", "(.*"], ("regular expression",)),
    (["--template.name", "model"], ("chat template", "--template.name minicpm")),
    (["--device", "cuda:77"], ("cuda:77",)),
    (["--device", "tpu?"], ("tpu?",)),
    (["--output", ""], ("--output is missing",)),
]  # fmt: skip


@pytest.mark.parametrize(("more", "words"), SETTINGS, ids=[" ".join(more) for more, _ in SETTINGS])
def test_bad_settings(
    refused: Callable[..., str], model: Path, tmp_path: Path, data: Path, more: list[str], words: tuple[str, ...]
) -> None:
    """Each names the setting, what it was given and what it takes."""
    said = refused(*train(model, data, tmp_path / "out", *more))
    assert all(word in said for word in words), said


YAML: list[tuple[str, tuple[str, ...]]] = [
    ("lora_rr: 4\n", ("lora_rr", "did you mean lora_r")),
    ("template:\n  boss: true\n", ("template.boss", "did you mean template.bos")),
    ("learning_rate: quick\n", ("learning_rate", "'quick'")),
    ("max_length: true\n", ("max_length", "a whole number")),
    ("lora_r: [1\nx", ("not YAML",)),
    ("- a\n- b\n", ("name: value",)),
    ("output:\n", ("--output is missing",)),
]


@pytest.mark.parametrize(("text", "words"), YAML, ids=[t.split("\n")[0] for t, _ in YAML])
def test_bad_yaml(
    refused: Callable[..., str], model: Path, tmp_path: Path, data: Path, text: str, words: tuple[str, ...]
) -> None:
    """The file is named, and the setting in it."""
    path = tmp_path / "settings.yaml"
    path.write_text(text, encoding="utf-8")
    where = [] if "output" in text else ["--output", tmp_path / "out"]
    said = refused("train", "--config", path, "--model", model, "--data", data, *where)
    assert all(word in said for word in words) and (str(path) in said or "missing" in said), said


def test_unknown_commands(refused: Callable[..., str], data: Path) -> None:
    """A command, an action, a choice and a flag that do not exist."""
    assert "did you mean train?" in refused("trian")
    assert "there are demo, download" in refused("xyzzy")
    assert "invalid choice" in refused("data", "chek", data)
    assert "--model is missing" in refused("data", "preview", data)
    assert "did you mean" in refused("data", "check", data, "--overlon", "cut")
    assert "--format" in refused("export", "--model", "x", "--output", "y", "--format", "zip")
    assert "is missing" in refused("train")


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Both hubs are a port that nothing listens on; their caches are empty."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # bound, not listening: refused at once
        nowhere = f"http://127.0.0.1:{held.getsockname()[1]}"
        for name in ("HF_ENDPOINT", "MODELSCOPE_ENDPOINT"):
            monkeypatch.setenv(name, nowhere)
        monkeypatch.setenv("MODELSCOPE_DOMAIN", nowhere.removeprefix("http://"))
        monkeypatch.delenv("HF_HUB_OFFLINE")
        for name in ("HF_HOME", "HF_HUB_CACHE", "MODELSCOPE_CACHE"):
            monkeypatch.setenv(name, str(tmp_path_factory.mktemp("cache")))
        yield


def test_a_name_that_no_hub_answers_for(no_hub: None, model: Path, tmp_path: Path, data: Path) -> None:
    """In a process of its own, as the clients read their addresses when they are imported."""
    argv = [sys.executable, "-m", "minitune", *map(str, train("nobody/no-such-model", data, tmp_path / "out"))]
    done = subprocess.run(argv, capture_output=True, encoding="utf-8", cwd=ROOT, timeout=120)
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert lines[-1].startswith("minitune: nobody/no-such-model: ") and "check the name and the network" in lines[-1]
    assert not (tmp_path / "out").exists()


def test_a_name_that_is_none(refused: Callable[..., str], tmp_path: Path, data: Path) -> None:
    """Neither a folder nor owner/name: said without asking anybody."""
    assert "no such folder" in refused(*train("no_such_model", data, tmp_path / "out"))
    assert "no such folder" in refused("download", "../models/mine/x")


def test_no_space_on_a_small_disk(model: Path, data: Path, tmp_path: Path) -> None:
    """A real full disk, of a size that holds the settings and not the weights: one line, no half-written folder."""
    disk = tmp_path / "disk"
    disk.mkdir()
    inner = f'mount -t tmpfs -o size=512k tmpfs "{disk}" || exit 77; "$@"; code=$?; find "{disk}" >&2; exit $code'
    argv = [sys.executable, "-m", "minitune", *map(str, train(model, data, disk / "out", "--method", "full"))]
    try:
        done = subprocess.run(
            ["unshare", "--mount", "sh", "-c", inner, "sh", *argv], capture_output=True, encoding="utf-8", cwd=ROOT
        )
    except FileNotFoundError:
        pytest.skip("no unshare here")
    if done.returncode == 77 or "unshare:" in done.stderr:
        pytest.skip("no right to mount a disk of its own here")
    said = [line for line in done.stderr.splitlines() if line.startswith("minitune: ")]
    assert done.returncode == 2 and len(said) == 1 and "Traceback" not in done.stderr, done.stderr
    assert f"{disk}/out/checkpoint-1: no space left on the disk" in said[0]
    files = [line for line in done.stderr.splitlines() if line.startswith(str(disk)) and "minitune" not in line]
    assert sorted(Path(f).name for f in files) == ["disk", "log.jsonl", "out", "run.yaml"]


@pytest.mark.parametrize("what", ["log.jsonl", "run.yaml", "summary.json", "loss.png", "adapter"])
def test_no_space_at_any_file(
    run: Run, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Wherever the disk is full, one line names the place; with room again, --resume ends the run as if nothing was."""
    import minitune.checkpoint.adapter as adapter
    import minitune.train.report as report

    out = tmp_path / "out"
    open_, write_ = Path.open, Path.write_text

    def full(self: Path, *args: Any, **more: Any) -> Any:
        if what in self.name and (args or more.get("mode")) and "r" not in args[:1]:
            raise OSError(errno.ENOSPC, "No space left on device")
        return open_(self, *args, **more)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    if what == "loss.png":
        monkeypatch.undo()
        import matplotlib.figure

        monkeypatch.setattr(matplotlib.figure.Figure, "savefig", fail)
    if what == "adapter":
        monkeypatch.setattr(adapter, "save_tensors", fail)
    code, _, err = run(*train(model, data, out))
    said = [line for line in err.splitlines() if line.startswith("minitune: ")]
    assert code == 2 and len(said) == 1 and "no space left on the disk" in said[0] and str(out) in said[0], err
    assert not [p for p in out.rglob("*") if p.name.endswith(".part")]
    monkeypatch.undo()
    monkeypatch.setattr(report, "draw", lambda *_: None)
    assert Path.write_text is write_
    begun = (out / "run.yaml").exists()
    assert run(*train(model, data, out, *(["--resume"] if begun else [])))[0] == 0
    assert (out / "adapter_model.safetensors").exists() and (out / "summary.json").exists()


def test_a_place_that_may_not_be_written(refused: Callable[..., str], model: Path, data: Path) -> None:
    """Read-only and forbidden places are named too; /proc refuses even root."""
    assert "/proc/" in refused(*train(model, data, "/proc/minitune-out"))


# Good input, spelled as people spell it


def test_spellings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Hugging Face's and other projects' names, hyphens, `=`, switches without a value, nested settings."""
    seen: list[TrainConfig] = []
    summary = {"steps": 1, "seconds": 0.0, "loss": 1.0, "eval_loss": None, "peak_memory_gib": 0.1}
    monkeypatch.setattr("minitune.train.run.train", lambda config, **_: seen.append(config) or summary)
    monkeypatch.setattr("minitune.train.checks.check_settings", lambda config: None)  # of files that are none
    for argv in (
        "--model_name_or_path m --dataset d --output_dir o --lora_rank 4 --template.bos false --max_seq_length 99",
        "--model m --data d --output o --lora-r 4 --template.bos=no --max-length=99",
        "--model-name-or-path=m --train_file d --output-dir o --lora-rank=4 --template.bos FALSE --cutoff-len 99",
    ):
        assert cli.main(["train", *argv.split()]) == 0
    assert len(set(map(str, seen))) == 1
    assert seen[0] == build(
        TrainConfig, {"model": "m", "data": "d", "output": "o", "lora_r": 4, "max_length": 99, "template.bos": False}
    )
    more = "--use_rslora --resume --learning_rate 1E-4 --lora_target_modules q_proj,v_proj --max_steps 1e2"
    assert cli.main(["train", *argv.split(), *more.split()]) == 0
    last = seen[-1]
    assert (last.use_rslora, last.resume, last.learning_rate) == (True, "auto", 1e-4)
    assert (last.lora_target_modules, last.max_steps) == (("q_proj", "v_proj"), 100)
    assert (
        cli.main(["train", *argv.split(), "--resume", "out/checkpoint-3", "--lora_target_modules", r".*\.[qv]_proj"])
        == 0
    )
    assert (seen[-1].resume, seen[-1].lora_target_modules) == ("out/checkpoint-3", r".*\.[qv]_proj")


def test_yaml_and_flags(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A file gives settings, under any of their names; flags win over it; a run.yaml is such a file."""
    seen: list[TrainConfig] = []
    summary = {"steps": 1, "seconds": 0.0, "loss": None, "eval_loss": 2.0, "peak_memory_gib": 0.1}
    monkeypatch.setattr("minitune.train.run.train", lambda config, **_: seen.append(config) or summary)
    monkeypatch.setattr("minitune.train.checks.check_settings", lambda config: None)  # of files that are none
    path = tmp_path / "settings.yaml"
    path.write_text(
        "\ufeffmodel_name_or_path: m\ndata: 数据.json\noutput_dir: o\nlearning_rate: 2e-5\nlora_rank: 16\n"
        "template:\n  bos: false\n  join: ' '\nlora_target_modules: [q_proj, o_proj]\nresume: false\neval_data:\n",
        encoding="utf-8",
    )
    assert cli.main(["train", "--config", str(path), "--output", "other", "--lora-r", "2"]) == 0
    got = seen[-1]
    assert (got.model, got.data, got.output, got.learning_rate, got.lora_r) == ("m", "数据.json", "other", 2e-5, 2)
    assert (got.template.bos, got.template.join, got.lora_target_modules) == (False, " ", ("q_proj", "o_proj"))
    assert (got.resume, got.eval_data) == ("", "")
    path.write_text("resume: true\nlora_target_modules: all-linear\ngradient_checkpointing: true\n", encoding="utf-8")
    assert cli.main(["train", "--config", str(path)]) == 0
    got = seen[-1]
    assert (got.resume, got.lora_target_modules, got.gradient_checkpointing) == ("true", "all-linear", "true")


def test_preview_and_check(run: Run, golden: Callable[[str], Path], model: Path, tmp_path: Path) -> None:
    """`data preview --json`: input_ids and labels of each row, nothing else on stdout. `data check`: 0 good, 1 hurts."""
    from minitune import load_tokenizer
    from minitune.config import TemplateConfig
    from minitune.data import records
    from minitune.data.template import Template

    data = write_rows(tmp_path / "rows.json", 5)
    code, out, err = run("data", "preview", data, "--model", model, "--json", "--template.strip", "false")
    assert code == 0 and "5 rows" in err
    template = Template(load_tokenizer(model), TemplateConfig("minicpm", strip=False))
    rows = [template.encode(c.messages) for c in records.load(data).conversations]
    assert [json.loads(line) for line in out.splitlines()] == [
        {"row": i + 1, "input_ids": row.input_ids, "labels": row.labels} for i, row in enumerate(rows)
    ]
    code, out, _ = run("data", "preview", data, "--model", model, "--rows", "2", "--template", "minicpm")
    assert code == 0 and "row 2:" in out and "row 3:" not in out
    assert run("data", "check", data)[0] == 0 and run("data", "check", data, "--model", model)[0] == 0
    code, out, _ = run("data", "check", data, "--model", model, "--max_length", "40")
    assert code == 1 and "cut at the tail" in out and "would hurt" in out
    lost = tmp_path / "lost.json"
    lost.write_text(json.dumps([{"instruction": "a\ufffd", "output": "b"}] * 2), encoding="utf-8")
    code, out, _ = run("data", "check", lost)
    assert code == 1 and "U+FFFD" in out and "repeats an earlier row" in out


def test_a_whole_command(model: Path, tmp_path: Path) -> None:
    """The command itself in a C locale: it trains, says so in UTF-8, writes run.yaml that reads back."""
    folder = tmp_path / "甄嬛 out"
    data = write_rows(tmp_path / "数据.json", 6)
    environment = {"PATH": os.environ["PATH"], "LC_ALL": "C", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, "-m", "minitune", *map(str, train(model, data, folder))]
    done = subprocess.run(argv, capture_output=True, encoding="utf-8", cwd=ROOT, env=environment)
    assert done.returncode == 0 and f"-> {folder}" in done.stdout and "数据.json" in done.stderr, done.stderr
    assert build(TrainConfig, read_yaml(folder / "run.yaml")).data == str(data)


# The process's end

PROCESS = """
import atexit, sys
from minitune import cli

class Held:
    def __del__(self):
        print("cleared up")

held = Held()

def main():
    atexit.register(print, "registered")
    print("said")
    if sys.argv[1] == "bug":
        raise RuntimeError("a bug")
    return 3

cli.main = main
raise SystemExit(cli.process())
"""


def test_a_rank_of_something_else_speaks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Schedulers set RANK for all that runs under them; only of several processes is one silent."""
    monkeypatch.setenv("RANK", "1")
    for size, speaks in (("1", True), ("2", False)):
        monkeypatch.setenv("WORLD_SIZE", size)
        with pytest.raises(SystemExit):
            cli.main(["--version"])
        assert ("minitune" in capsys.readouterr().out) == speaks


def test_a_process_ends_with_its_last_line() -> None:
    """The exit code and all output; what was registered runs, the interpreter's clearing up does not."""
    ran = subprocess.run([sys.executable, "-c", PROCESS, "work"], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout, ran.stderr) == (3, "said\nregistered\n", "")
    ran = subprocess.run([sys.executable, "-c", PROCESS, "bug"], capture_output=True, text=True)
    assert ran.returncode == 1 and "RuntimeError: a bug" in ran.stderr
    assert ran.stdout == "said\nregistered\ncleared up\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_output_that_is_lost_is_no_success() -> None:
    """A last line that can't be written is not passed over."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-c", PROCESS, "work"]
    with open("/dev/full", "w") as full:
        ran = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment)
    assert ran.returncode == 120 and "No space left" in ran.stderr
