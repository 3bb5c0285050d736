"""What is written wrong is found and not kept: each of these breaks the file in one place, as a fault of ours would."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small
import torch
from torch import Tensor

from minitune.checkpoint import gguf as reading
from minitune.config import UserError
from minitune.export import export, gguf, hf, verify
from minitune.model import quantized


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("verify")
    base = small.minicpm(root / "base", sharp=2.0)
    return base, small.adapter(root / "run", base)


BREAKS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "rows in another order": ("model.layers.1.self_attn.v_proj.weight", lambda t: t.flip(0)),
    "a layer's weight lost": ("model.layers.2.mlp.down_proj.weight", lambda t: t * 0),
    "not a number": ("model.layers.0.mlp.up_proj.weight", lambda t: t * torch.nan),
}


@pytest.mark.parametrize("broken", BREAKS)
@pytest.mark.parametrize(
    "words", [{"format": "hf"}, {"format": "hf", "quant": "int4"}, {"format": "gguf", "quant": "q4_0"}], ids=str
)
def test_a_tensor(
    tuned: tuple[Path, Path], tmp_path: Path, broken: str, words: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tensor that is not the one that was meant, whatever four bits' noise would hide of it in the logits."""
    name, change = BREAKS[broken]
    pieces, tensors = gguf._pieces, hf._tensors

    def broken_pieces(source: Any, asked: str) -> Any:
        yield from (change(piece) if asked == name else piece for piece in pieces(source, asked))

    def broken_tensors(*arguments: Any) -> Any:
        for asked, value in tensors(*arguments):
            meant = asked.removesuffix("_packed").removesuffix("_scale") == name
            meant = meant and not (value.dtype == torch.int32 and broken == "not a number")
            yield asked, change(value).to(value.dtype) if meant else value

    monkeypatch.setattr(gguf, "_pieces", broken_pieces)
    monkeypatch.setattr(hf, "_tensors", broken_tensors)
    with pytest.raises(UserError, match=f"not the model that was trained: {name}") as caught:
        export(*tuned, output=tmp_path / "out", quiet=True, **words)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "value"),
    [("logits_scaling", 1.0), ("residual_multiplier", 1.0), ("embedding_multiplier", 12.0), ("rms_norm_eps", 1e-6)],
)
def test_a_number(
    tuned: tuple[Path, Path], tmp_path: Path, name: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scaling that the file does not hold: every tensor is right, and four bits' noise could hide it."""
    whole = reading._config
    monkeypatch.setattr(reading, "_config", lambda *a: whole(*a) | {name: value})
    with pytest.raises(UserError, match=f"{name} is {value:g}, not "):
        export(*tuned, format="gguf", quant="q4_0", output=tmp_path / "x.gguf", quiet=True)
    assert not list(tmp_path.iterdir())
    export(*tuned, format="gguf", quant="q4_0", output=tmp_path / "x.gguf", quiet=True, verify=False)
    assert (tmp_path / "x.gguf").is_file()


@pytest.mark.parametrize("scalar", ["logits_scaling", "residual_multiplier", "embedding_multiplier"])
def test_the_logits_see_a_scaling(
    tuned: tuple[Path, Path], tmp_path: Path, scalar: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same with the numbers not looked at: what is computed differs past the bound of 16 bits."""
    whole = reading._scalars
    monkeypatch.setattr(reading, "_scalars", lambda *a: whole(*a) | {scalar: 1.0})
    monkeypatch.setattr(verify, "same_numbers", lambda *a: None)
    with pytest.raises(UserError, match="KL divergence"):
        export(*tuned, format="gguf", output=tmp_path / "x.gguf", quiet=True)
    assert not list(tmp_path.iterdir())


def test_what_is_said(tuned: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """One line with the largest difference; rows of one's own instead of the built-in prompts."""
    report = export(*tuned, output=tmp_path / "out")
    line = next(x for x in capsys.readouterr().out.splitlines() if "verified" in x)
    assert "of the largest logit" in line and "built-in prompts" in line
    assert report.comparison is not None and report.comparison.largest < 1e-5 and report.comparison.agreement == 1
    rows = tmp_path / "held.json"
    rows.write_text('[{"instruction": "你好", "input": "", "output": "你好，世界"}]', encoding="utf-8")
    export(*tuned, output=tmp_path / "rows", verify_data=rows)
    assert "(rows of held.json)" in capsys.readouterr().out
    with pytest.raises(UserError, match="no such file|not found|absent|does not exist"):
        export(*tuned, output=tmp_path / "more", verify_data=tmp_path / "none.json", quiet=True)
    assert not (tmp_path / "more").exists()


def test_divergence_is_kullback_leiblers() -> None:
    """Against torch's own, in float64."""
    torch.manual_seed(0)
    p, q = torch.randn(40, 300, dtype=torch.float64) * 3, torch.randn(40, 300, dtype=torch.float64) * 3
    want = torch.nn.functional.kl_div(q.log_softmax(-1), p.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(verify.divergence(p, q), want, rtol=1e-12, atol=0)


def test_bounds() -> None:
    """What is not finite never passes; every kind that can be written has its bounds."""
    sound = verify.Comparison(0.0, 0.0, 1.0, 1.0, 10, "", 0.0, "")
    for kind in verify.LIMITS:
        sound.check(kind)
    for change in ({"kl": float("nan")}, {"largest": float("nan")}, {"tensor": float("nan")}, {"decided": 0.1}):
        with pytest.raises(UserError):
            verify.Comparison(**{**sound.__dict__, **change}).check("float32")  # type: ignore[arg-type]
    assert set(gguf.LIMITS) == set(gguf.QUANTS) and set(gguf.LIMITS.values()) <= set(verify.LIMITS)
    assert quantized.GROUPS == (128, 64, 32)
