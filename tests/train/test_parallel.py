"""Several processes: the numbers of one, whatever their number; one voice; a fault of one ends all, and is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from runs import Launch, argv_of, log_of, result_of, rows_of, with_

from minitune import TrainConfig, train
from minitune.data.loader import Loader
from minitune.data.template import Encoded

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
    config = with_(config, method=method, eval_fraction=0.2, tokens_per_pack=64, **STEADY)
    train(config, quiet=True)
    many = with_(config, output=str(tmp_path / "many"))
    launch = together(processes, tmp_path, many, size)
    close(config.output, many.output)
    assert "done: 10 steps" in launch.said[0] and launch.said[1:] == [""] * (size - 1)
    assert len(rows_of(many.output)) == len(rows_of(config.output))
