"""DeepSpeed on the CPU: its numbers are ours, its checkpoints go to any stage and number of processes, and its file is
read as Hugging Face's users expect."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from runs import argv_of, rows_of, same, with_
from test_parallel import STEADY, close, together

from minitune import TrainConfig, UserError, train
from minitune.cli import main
from minitune.config import build, flatten, read_yaml
from minitune.train import zero_config

pytestmark = pytest.mark.usefixtures("undrawn")


def write(folder: Path, stage: int, offload: bool = False, **more: Any) -> str:
    """A file as the tutorial's: everything that our settings hold is auto. torch_adam: nothing is compiled."""
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": "auto"}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    params = {**dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto"), "torch_adam": True}
    sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    raw = {
        **dict.fromkeys(sizes, "auto"),
        "optimizer": {"type": "AdamW", "params": params},
        "fp16": {"enabled": "auto"},
        "bf16": {"enabled": "auto"},
        "zero_optimization": zero,
        **more,
    }
    path = folder / f"ds{stage}.json"
    path.write_text(json.dumps(raw), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("stage", "offload", "method", "size"),
    [
        (1, False, "full", 2),
        (2, True, "full", 4),
        (2, False, "full", 1),
        (3, False, "full", 2),
        (3, False, "full", 4),
        (2, True, "lora", 2),
        (3, True, "lora", 2),
    ],
)
def test_the_numbers_of_one(
    processes: Any, config: TrainConfig, tmp_path: Path, stage: int, offload: bool, method: Any, size: int
) -> None:
    """Losses, norms, held-out loss and weights are those of one process with our optimizer, weight decay on matrices
    alone, dropout on, the last step short; under stage 3 a step is several packs."""
    pytest.importorskip("deepspeed")
    pack = 64 if stage == 3 else 8192
    config = with_(
        config, method=method, eval_fraction=0.2, num_train_epochs=1, weight_decay=0.1, tokens_per_pack=pack, **STEADY
    )
    train(config, quiet=True)
    many = with_(config, output=str(tmp_path / "many"), deepspeed=write(tmp_path, stage, offload))
    launch = together(processes, tmp_path, many, size)
    close(config.output, many.output)
    assert f"ZeRO stage {stage}" in launch.said[0] and "done: 5 steps" in launch.said[0]
    assert not any("minitune" in said for said in launch.said[1:])


def test_resumed_in_another_stage(processes: Any, config: TrainConfig, tmp_path: Path) -> None:
    """Two processes of stage 2 stop; three of stage 3 go on, and end as one process does without a break."""
    pytest.importorskip("deepspeed")
    config = with_(config, method="full", num_train_epochs=1, save_steps=3, save_total_limit=9, **STEADY)
    train(config, quiet=True)
    broken = with_(config, output=str(tmp_path / "broken"), deepspeed=write(tmp_path, 2, True))
    together(processes, tmp_path, broken, 2)
    again = with_(broken, resume=f"{broken.output}/checkpoint-3")
    with pytest.raises(UserError, match="was saved by DeepSpeed; go on with --deepspeed"):
        train(with_(again, deepspeed=""), quiet=True)
    together(processes, tmp_path, with_(again, deepspeed=write(tmp_path, 3)), 3)
    close(config.output, broken.output)
    assert [row["step"] for row in rows_of(broken.output)] == list(range(1, 7))


def test_a_loss_scale_that_finds_its_size(processes: Any, config: TrainConfig, tmp_path: Path) -> None:
    """float16 from a scale that is too large: steps are skipped, the run goes on, and what is resumed between two
    changes of the scale is the run without a break, bit for bit."""
    pytest.importorskip("deepspeed")
    fp16 = {"enabled": "auto", "initial_scale_power": 20, "loss_scale_window": 2, "hysteresis": 2}
    file = write(tmp_path, 2, fp16=fp16)
    config = with_(config, dtype="float16", method="full", num_train_epochs=2, save_steps=1, deepspeed=file)
    config = with_(config, save_total_limit=99)
    together(processes, tmp_path, config, 1)
    norms = [row["grad_norm"] for row in rows_of(config.output)]
    assert norms[:2] == [None, None] and 4 < sum(norm is not None for norm in norms) < 10, norms
    for step in (1, 7):  # nothing was learned before the first
        broken = tmp_path / f"broken-{step}"
        shutil.copytree(config.output, broken)
        again = with_(config, output=str(broken), resume=f"{broken}/checkpoint-{step}")
        together(processes, tmp_path, again, 1)
        same(config.output, broken)


def test_auto_is_ours(config: TrainConfig, tmp_path: Path) -> None:
    """Each auto gets the value that our settings have, the sizes those of a pack; nothing else changes."""
    config = with_(config, deepspeed=write(tmp_path, 3, overlap_comm=True), weight_decay=0.25)
    raw = json.loads(Path(config.deepspeed).read_text(encoding="utf-8"))
    raw["zero_optimization"] |= {"stage3_prefetch_bucket_size": "auto", "stage3_param_persistence_threshold": "auto"}
    ds = zero_config.filled(raw, config, "bfloat16", 64, 4)
    params = {"lr": 2e-3, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.25, "torch_adam": True}
    assert ds["optimizer"] == {"type": "AdamW", "params": params}
    assert (ds["train_batch_size"], ds["train_micro_batch_size_per_gpu"], ds["gradient_accumulation_steps"]) == (
        4,
        1,
        1,
    )
    assert ds["gradient_clipping"] == 1.0 and ds["bf16"]["enabled"] is True and ds["fp16"]["enabled"] is False
    zero = {"stage": 3, "reduce_bucket_size": 4096, "stage3_prefetch_bucket_size": 3686}
    assert ds["zero_optimization"] == {**zero, "stage3_param_persistence_threshold": 640}
    assert ds["overlap_comm"] is True


def test_the_recipes(tmp_path: Path) -> None:
    """Both are settings as they stand, and leave no auto in the file that they name; what the tutorial's own file has
    beside it is passed over."""
    root = Path(__file__).parents[2]
    for name, method in (("lora", "lora"), ("full", "full")):
        values = read_yaml(root / "recipes" / f"minicpm_2b_{name}_deepspeed.yaml")
        config = build(TrainConfig, flatten(values), name)
        assert config.method == method and config.deepspeed == "recipes/ds_config.json"
        raw = json.loads((root / config.deepspeed).read_text(encoding="utf-8"))
        assert zero_config.notes(raw, config)[0].endswith("DeepSpeed's own sizes count packs")
        raw["zero_optimization"] |= {"offload_param": {"device": "cpu", "pin_memory": True}}
        raw |= {"scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": "auto"}}}
        ds = zero_config.filled(raw, config, "bfloat16", 2304, 1)
        assert "scheduler" not in ds and "offload_param" not in ds["zero_optimization"]
        assert ds["optimizer"]["params"]["lr"] == config.learning_rate and "auto" not in json.dumps(ds)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"gradient_accumulation_steps": 8}, "gradient_accumulation_steps is 8, the run's is 2"),
        ({"gradient_clipping": 0.5}, "gradient_clipping is 0.5, the run's is 1.0 (max_grad_norm)"),
        ({"fp16": {"enabled": True}}, "fp16.enabled is True, the run's is False (dtype float32)"),
        ({"optimizer": {"type": "Lamb"}}, "optimizer.type is Lamb; it takes AdamW"),
        ({"comms_logger": {"ratio": "auto"}}, 'comms_logger.ratio is "auto", which says nothing here'),
    ],
)
def test_contradictions_are_refused(config: TrainConfig, tmp_path: Path, change: dict[str, Any], said: str) -> None:
    config = with_(config, deepspeed=write(tmp_path, 2, **change))
    raw = json.loads(Path(config.deepspeed).read_text(encoding="utf-8"))
    with pytest.raises(UserError) as error:
        zero_config.filled(raw, config, "float32", 64, 2)
    assert str(error.value).startswith(config.deepspeed) and said in str(error.value)


@pytest.mark.parametrize(
    ("stage", "more", "said"),
    [
        (2, {"zero": {"offload_param": {"device": "cpu"}}}, "offload_param is ignored under stage 2"),
        (2, {"fp16": {"enabled": True, "loss_scale": 1}}, "fixed loss_scale of 1: small gradients may be lost"),
        (2, {"scheduler": {"type": "WarmupLR"}}, "scheduler is ignored: lr_scheduler_type linear"),
        (2, {"activation_checkpointing": {}}, "activation_checkpointing is ignored: gradient_checkpointing auto"),
        (3, {}, "a step is 4 rows on any number of cards"),
    ],
)
def test_what_is_passed_over_is_said(
    config: TrainConfig, tmp_path: Path, stage: int, more: dict[str, Any], said: str
) -> None:
    config = with_(config, deepspeed=write(tmp_path, stage, **more))
    raw = json.loads(Path(config.deepspeed).read_text(encoding="utf-8"))
    raw["zero_optimization"] |= raw.pop("zero", {})
    assert sum(said in line for line in zero_config.notes(raw, config)) == 1


def test_faults_of_the_file(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line each, before anything is loaded: no file, no JSON, stage 0, no package."""

    def said(file: str) -> str:
        assert main(argv_of(config, deepspeed=file)) == 2
        return capsys.readouterr().err.splitlines()[-1]

    assert "none.json: no such file" in said(str(tmp_path / "none.json"))
    bad = tmp_path / "bad.json"
    bad.write_text("{", encoding="utf-8")
    assert "bad.json: not JSON" in said(str(bad))
    assert "stage is 0; write 1, 2 or 3" in said(write(tmp_path, 0))
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    assert "pip install 'minitune[deepspeed]'" in said(write(tmp_path, 2))
    assert not Path(config.output).exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"zero_optimization": "x"}, 'zero_optimization is "x"; write an object'),
        ({"zero_optimization": {"stage": "auto"}}, 'zero_optimization.stage is "auto"; write 1, 2 or 3'),
        ({"zero_optimization": {"stage": "2"}}, 'zero_optimization.stage is "2"; write 1, 2 or 3'),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}}, 'offload_optimizer is "cpu"; write an obj'),
        ({"optimizer": "AdamW"}, 'optimizer is "AdamW"; write an object'),
        ({"optimizer": None}, "optimizer is null; write an object"),
        ({"optimizer": {"type": "AdamW", "params": None}}, "optimizer.params is null; write an object"),
        ({"fp16": True}, "fp16 is true; write an object"),
        ({"fp16": None}, "fp16 is null; write an object"),
    ],
)
def test_malformed_parts_are_named(config: TrainConfig, tmp_path: Path, change: dict[str, Any], said: str) -> None:
    config = with_(config, deepspeed=write(tmp_path, 2, **change))
    with pytest.raises(UserError) as error:
        zero_config.read(config)
    assert str(error.value).startswith(config.deepspeed) and said in str(error.value)


def test_preflight(config: TrainConfig, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """18 bytes a parameter of the host's memory, and a compiler, are asked for before the weights are read."""
    monkeypatch.setattr(zero_config, "read", lambda c: json.loads(Path(c.deepspeed).read_text(encoding="utf-8")))
    config = with_(config, method="full", deepspeed=write(tmp_path, 2, offload=True))
    monkeypatch.setattr(zero_config, "available_gib", lambda: 221_760 * 18 / 2**30 * 1.01)
    assert len(zero_config.preflight(config, model)) == 1
    monkeypatch.setattr(zero_config, "available_gib", lambda: 221_760 * 18 / 2**30 * 0.99)
    with pytest.raises(UserError, match="GiB are free"):
        zero_config.preflight(config, model)
    raw = json.loads(Path(config.deepspeed).read_text(encoding="utf-8"))
    raw["zero_optimization"] |= {"stage": 3, "offload_param": {"device": "cpu"}}
    Path(config.deepspeed).write_text(json.dumps(raw), encoding="utf-8")
    monkeypatch.setattr(zero_config, "available_gib", lambda: 221_760 * 20 / 2**30 * 1.01)
    assert "of weights, masters, gradients and moments" in zero_config.preflight(config, model)[0]
    monkeypatch.setattr(zero_config, "available_gib", lambda: 221_760 * 20 / 2**30 * 0.99)
    with pytest.raises(UserError, match="GiB are free"):
        zero_config.preflight(config, model)
    raw["optimizer"]["params"].pop("torch_adam")
    Path(config.deepspeed).write_text(json.dumps(raw), encoding="utf-8")
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(UserError, match=r"can't be built here: there is no C\+\+ compiler; install g\+\+"):
        zero_config.preflight(config, model)
