"""What a card's runs add: the plan's sizes, strips from the settings, batches made ahead, one flat optimizer state."""

from __future__ import annotations

import copy
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import log_of, result_of, with_

from minitune.checkpoint.shards import Shards
from minitune.checkpoint.weights import load_decoder, skeleton
from minitune.config import TrainConfig
from minitune.data.loader import Loader
from minitune.data.template import Encoded
from minitune.model.lora import LoraConfig, attach
from minitune.train import fast
from minitune.train.optim import AdamW
from minitune.train.run import train


def loader_of(rows: int, **settings: Any) -> Loader:
    """Rows of 3 to 40 tokens; some learn their first token, which never counts."""
    generator = torch.Generator().manual_seed(2)
    made = []
    for length in torch.randint(3, 41, (rows,), generator=generator).tolist():
        ids = torch.randint(0, 99, (length,), generator=generator).tolist()
        learned = torch.randint(0, 2, (length,), generator=generator).tolist()
        made.append(Encoded(ids, [i if on else -100 for i, on in zip(ids, [*learned[:-1], 1], strict=True)]))
    return Loader(made, seed=3, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"rows_per_step": 4},
        {"rows_per_step": 4, "tokens_per_pack": 80},  # some steps are two packs
        {"rows_per_step": 1, "tokens_per_pack": 20},  # a longer row is a pack of its own
        {"rows_per_step": 0, "tokens_per_step": 90, "shuffle": False},
    ],
)
def test_the_plan_knows_the_sizes(settings: dict[str, Any]) -> None:
    """Tokens, documents and supervised positions of each step of one pack, as its batch has them; the run's end cuts."""
    loader = loader_of(50, **settings)
    per_epoch = [len(loader.steps(e)) for e in range(3)]
    total = sum(per_epoch) - 2
    want = []
    for place in [(e, i) for e, n in enumerate(per_epoch) for i in range(n)][:total]:
        packs = loader.batch(*place).packs
        if len(packs) == 1:
            want.append([*place, packs[0].tokens, len(packs[0].lengths), packs[0].supervised])
    assert fast.one_pack_steps(loader, per_epoch, total).tolist() == want
    assert fast.one_pack_steps(loader, per_epoch, 1).shape[0] <= 1


def test_the_sizes_of_a_long_run_cost_little() -> None:
    """Sizes and capacities of 60,000 steps: a tutorial's 700 are far below a second."""
    rows = loader_of(20_000, rows_per_step=1)
    start = time.perf_counter()
    plan = fast.one_pack_steps(rows, [20_000] * 3, 60_000)
    fast.graph.capacities([(t * 200, d, s) for t, d, s in plan[:, 2:].tolist()])
    assert len(plan) == 60_000 and time.perf_counter() - start < 2


@pytest.mark.parametrize(
    ("targets", "r", "want"),
    [
        (("q_proj", "k_proj", "v_proj", "o_proj"), 8, {"attn.qkv": 64, "attn.o": 64}),
        (("q_proj", "v_proj"), 40, {"attn.qkv": 128}),
        ("all-linear", 22, {"attn.qkv": 128, "attn.o": 64, "mlp.gate_up": 64, "mlp.down": 64}),
        (r"model\.layers\.0\..*", 8, {}),  # they differ from layer to layer: not fused
    ],
)
def test_strips_of_the_settings(model: Path, targets: tuple[str, ...] | str, r: int, want: dict[str, int]) -> None:
    """Told before anything is loaded; what is loaded into widened weights is the same."""
    lora = LoraConfig(r, target_modules=targets)
    with Shards(model) as shards:
        assert fast.strips_of(skeleton(shards), lora) == want
    plain = load_decoder(model, "float32", "cpu")
    wide = load_decoder(model, "float32", "cpu", lambda decoder: fast.strips_of(decoder, lora))
    assert {kind: t.shape[-1] - wide.of_kind(kind)[0].in_features for kind, t in wide.strips.items()} == want
    for a, b in zip(plain.parameters(), wide.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_fused_stack_takes_those_strips(model: Path) -> None:
    """It allocates no second copy: the strips stay where they were."""
    pytest.importorskip("triton", reason="Triton is not installed")
    lora = LoraConfig(8)
    decoder = load_decoder(model, "float32", "cpu", lambda d: fast.strips_of(d, lora))
    before = {kind: t.data_ptr() for kind, t in decoder.strips.items()}
    attach(decoder, lora)
    fast.fused.FusedStack(decoder)
    assert {kind: t.data_ptr() for kind, t in decoder.strips.items()} == before


def test_one_flat_state_is_that_of_its_matrices() -> None:
    """Decay, updates and what is saved: several matrices in one parameter learn as they would apart, both ways."""
    config = TrainConfig(weight_decay=0.3)
    generator = torch.Generator().manual_seed(0)
    shapes = [torch.Size(s) for s in ((3, 5), (4, 2), (2, 2))]
    values = [torch.randn(s, generator=generator) for s in shapes]

    def apart() -> AdamW:
        return AdamW([torch.nn.Parameter(v.clone()) for v in values], config)

    def flat() -> AdamW:
        return AdamW([torch.nn.Parameter(torch.cat([v.reshape(-1) for v in values]))], config, shapes)

    def learn(optimizer: AdamW, seed: int) -> torch.Tensor:
        gradient = torch.randn(27, generator=torch.Generator().manual_seed(seed))
        for p, g in zip(optimizer.parameters, gradient.split([p.numel() for p in optimizer.parameters]), strict=True):
            p.grad = g.view_as(p)
        optimizer.rate.fill_(0.1)
        optimizer.step(torch.ones(()), torch.zeros(()))
        return torch.cat([p.detach().reshape(-1) for p in optimizer.parameters])

    assert flat().state_dict()["adamw"]["state"] == {}
    first, second = apart(), flat()
    for seed in range(3):
        assert torch.equal(learn(first, seed), learn(second, seed))
    for source, make in ((first, flat), (second, apart), (second, flat)):
        saved = copy.deepcopy(source.state_dict())  # as through a file
        assert {i: s["exp_avg"].shape for i, s in saved["adamw"]["state"].items()} == dict(enumerate(shapes))
        other = make()
        other.load_state_dict(saved)
        with torch.no_grad():
            now = torch.cat([p.reshape(-1) for p in source.parameters])
            for p, v in zip(other.parameters, now.split([p.numel() for p in other.parameters]), strict=True):
                p.copy_(v.view_as(p))
        assert torch.equal(learn(other, 9), learn(source, 9))


def test_batches_ahead() -> None:
    """The same batches in order; the next is made while one is in use; an error comes at its turn; closing ends it."""
    loader = loader_of(20, rows_per_step=4)
    places = [(e, i) for e in range(2) for i in range(5)]
    one, two = (list(fast.batches(loader.batch, places, ahead)) for ahead in (False, True))
    assert [p for p, _ in one] == [p for p, _ in two] == places
    assert all(torch.equal(a.packs[0].input_ids, b.packs[0].input_ids) for (_, a), (_, b) in zip(one, two, strict=True))

    made: list[int] = []
    second = threading.Event()

    def make(epoch: int, step: int) -> Any:
        made.append(step)
        if step == 1:
            second.set()
        if step == 2:
            raise OSError("no more")
        return step

    with closing(fast.batches(make, ((0, i) for i in range(9)), True)) as coming:
        assert next(coming) == ((0, 0), 0) and second.wait(5)
    assert made == [0, 1] and not [t for t in threading.enumerate() if t.name.startswith("batches")]
    coming = fast.batches(make, ((0, i) for i in range(9)), True)
    assert [next(coming)[1], next(coming)[1]] == [0, 1]
    with pytest.raises(OSError, match="no more"):
        next(coming)


@pytest.mark.gpu
def test_a_card_captures_and_resumes(
    config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], undrawn: None
) -> None:
    """Twelve captured steps, with held-out losses on the way; the same taken up from the checkpoint in the middle; the
    loss of the plain step beside them."""
    config = with_(
        config, device="cuda", dtype="bfloat16", max_steps=12, save_steps=6, save_total_limit=9, logging_steps=3,
        eval_steps=4, eval_fraction=0.1,
    )  # fmt: skip
    whole, broken = with_(config, output=str(tmp_path / "whole")), with_(config, output=str(tmp_path / "broken"))
    train(whole)
    assert "captured: " in capsys.readouterr().err
    train(broken)
    Path(broken.output, "adapter_model.safetensors").unlink()
    for later in Path(broken.output).glob("checkpoint-12"):
        for file in later.iterdir():
            file.unlink()
        later.rmdir()
    train(with_(broken, resume="auto"))
    assert "going on from" in capsys.readouterr().err
    for a, b in zip(log_of(whole.output), log_of(broken.output), strict=True):
        for key in a.keys() & {"loss", "eval_loss", "grad_norm"}:
            assert a[key] == pytest.approx(b[key], rel=1e-3), (a, b)
    plain = with_(config, output=str(tmp_path / "plain"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast, "why_plain", lambda decoder: "a test")
        patch.setattr(fast, "quicken", lambda step, *_: (step, "plain step: a test"))
        train(plain)
    assert "plain step: a test" in capsys.readouterr().err
    for a, b in zip(log_of(whole.output), log_of(plain.output), strict=True):
        for key in a.keys() & {"loss", "eval_loss"}:
            assert a[key] == pytest.approx(b[key], rel=3e-2), (a, b)
    assert all(torch.isfinite(t).all() for t in result_of(whole.output).values())


def test_the_profile_says_where_the_seconds_went(
    config: TrainConfig, capsys: pytest.CaptureFixture[str], undrawn: None
) -> None:
    """One line after the run; its parts are no more than the time that the process lives. Without it, none."""
    from minitune.train.clock import Clock

    train(with_(config, max_steps=3, eval_fraction=0.2, profile=True))
    (line,) = [said for said in capsys.readouterr().err.splitlines() if "seconds: " in said]
    parts = dict(part.rsplit(" ", 1) for part in line.partition("seconds: ")[2].split(", "))
    assert list(parts) == ["start", "data", "model", "steps", "held-out loss", "saving"]
    assert all(float(seconds) >= 0 for seconds in parts.values())
    train(with_(config, max_steps=2, output=f"{config.output}-2"))
    assert "seconds: " not in capsys.readouterr().err
    clock = Clock("a")
    with clock.during("b"):
        time.sleep(0.02)
    clock.begin("c")
    assert clock.seconds["b"] >= 0.02 > clock.seconds["a"] and clock.name == "c"


def test_a_run_over_fused_layers(config: TrainConfig, tmp_path: Path, undrawn: None) -> None:
    """A run whose layers are `model.fused`, in Triton's interpreter: losses, held-out losses (of the weights behind the
    update), result and checkpoints are the plain run's, and each goes on from the other's checkpoint."""
    pytest.importorskip("triton", reason="Triton is not installed")
    config = with_(
        config, max_steps=3, save_steps=2, save_total_limit=9, eval_steps=2, eval_fraction=0.05, weight_decay=0.1,
        per_device_train_batch_size=1,
    )  # fmt: skip
    plain, by_hand, crossed = (with_(config, output=str(tmp_path / n)) for n in ("plain", "by_hand", "crossed"))
    train(plain, quiet=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast, "why_not_on", lambda device: "")
        train(by_hand, quiet=True)
        train(with_(crossed, resume=f"{plain.output}/checkpoint-2"), quiet=True)
    other = with_(config, output=str(tmp_path / "back"), resume=f"{by_hand.output}/checkpoint-2")
    train(other, quiet=True)
    for folder in (by_hand.output, crossed.output, other.output):
        rows = {(r["step"], "eval_loss" in r): r for r in log_of(folder)}
        for want in log_of(plain.output):
            if got := rows.get((want["step"], "eval_loss" in want)):
                for key in want.keys() & {"loss", "eval_loss", "grad_norm"}:
                    assert got[key] == pytest.approx(want[key], rel=1e-4), folder
        a, b = result_of(folder), result_of(plain.output)
        assert a.keys() == b.keys()
        for name in a:
            assert float((a[name] - b[name]).norm()) <= 1e-3 * float(b[name].norm()), (folder, name)
