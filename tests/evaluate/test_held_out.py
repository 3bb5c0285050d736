"""The held-out loss is transformers' loss of the same rows, and training's eval_loss, however rows share packs."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from twins import hub_loss, hub_twin, rows

from minitune.checkpoint.weights import load_model
from minitune.data.template import Encoded
from minitune.evaluate.loss import Losses, Probe, losses, packs_of, score_probes
from minitune.train.step import held_out_loss

LENGTHS = [5, 31, 2, 17, 17, 40, 9, 60, 3]


@pytest.mark.parametrize("family", ["granite", "llama"])
@pytest.mark.parametrize("tokens_per_pack", [1, 70, 8192])
def test_equals_transformers(tmp_path: Path, family: str, tokens_per_pack: int) -> None:
    """Row by row and in the mean."""
    theirs = hub_twin(tmp_path, family)
    decoder = load_model(tmp_path, device="cpu", dtype="float32")
    encoded = [row for row in rows(3, LENGTHS) if row.supervised]
    found = losses(decoder, encoded, tokens_per_pack)
    with torch.no_grad():
        for i, row in enumerate(encoded):
            assert found.of(i) == pytest.approx(float(hub_loss(theirs, [row])), abs=2e-5)
        assert found.mean == pytest.approx(float(hub_loss(theirs, encoded)), abs=2e-5)
    assert found.tokens == sum(row.supervised for row in encoded)
    assert found.perplexity == pytest.approx(math.exp(found.mean))


def test_equals_training(tmp_path: Path) -> None:
    """The number that a run writes as eval_loss, on the same rows."""
    from minitune.data.loader import Loader

    hub_twin(tmp_path)
    decoder = load_model(tmp_path, device="cpu", dtype="float32")
    encoded = [row for row in rows(4, LENGTHS) if row.supervised]
    batches = list(Loader(encoded, rows_per_step=4, tokens_per_pack=64, shuffle=False).batches())
    assert losses(decoder, encoded, 50).mean == pytest.approx(held_out_loss(decoder, batches), rel=1e-6)


def test_a_token_weighs_the_same_everywhere() -> None:
    """The mean is over tokens, not over rows."""
    found = Losses([(10.0, 1), (2.0, 4)])
    assert found.mean == pytest.approx(12 / 5) and found.of(1) == 0.5 and found.tokens == 5
    assert Losses([(1000.0, 1)]).perplexity == math.inf


def test_probes_ask_a_place_more_than_once(tmp_path: Path) -> None:
    """Several targets behind one prefix: log-probabilities and the likeliest token are those of transformers."""
    theirs = hub_twin(tmp_path, "llama")
    decoder = load_model(tmp_path, device="cpu", dtype="float32")
    texts = [[5, 6, 7, 8, 9], [11, 12], [13]]
    with torch.no_grad():
        want = [F.log_softmax(theirs(torch.tensor([ids])).logits[0], -1) for ids in texts]
    best = int(want[0][4].argmax())
    probes = [Probe(texts[0], [(4, 3), (4, best), (0, 6), (4, 90)]), Probe(texts[1], []), Probe(texts[2], [(0, 44)])]
    got = score_probes(decoder, probes, 4)
    assert got[0][0].tolist() == pytest.approx([float(want[0][at, token]) for at, token in probes[0].asked], abs=2e-5)
    assert got[0][1].tolist() == [token == int(want[0][at].argmax()) for at, token in probes[0].asked]
    assert got[0][1][1] and len(got[1][0]) == 0
    assert got[2][0].tolist() == pytest.approx([float(want[2][0, 44])], abs=2e-5)


def test_packs() -> None:
    """Each probe once, within the limit, a longer one alone; on a CPU at most 1,024 tokens."""
    probes = [Probe([0] * n, []) for n in (5, 3000, 700, 400, 300, 1)]
    found = packs_of(probes, 8192, torch.device("cpu"))
    assert sorted(i for pack in found for i in pack) == list(range(6))
    assert all(sum(len(probes[i].ids) for i in pack) <= 1024 or len(pack) == 1 for pack in found)
    assert [len(pack) for pack in packs_of(probes, 8192, torch.device("meta"))] == [6]


def test_the_first_token_is_not_asked() -> None:
    assert Probe.of(Encoded([1, 2, 3], [1, -100, 3])).asked == [(1, 3)]
