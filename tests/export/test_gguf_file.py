"""What a GGUF file holds, read with gguf's own reader and by plain formulas; how it is written; what is refused."""

from __future__ import annotations

import errno
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
import torch
from twins import hub_twin

import minitune
from minitune.checkpoint.gguf import GgufFile
from minitune.checkpoint.tokenizer import load_tokenizer
from minitune.checkpoint.weights import hub_parameters
from minitune.config import UserError
from minitune.export import export, gguf
from minitune.model.lora import merge


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("gguf")
    base = small.minicpm(root / "base", sharp=2.0)
    return base, small.adapter(root / "run", base)


def fields(path: Path) -> dict[str, Any]:
    """The metadata by the library's plain reader."""
    reader = pytest.importorskip("gguf").GGUFReader(path)
    return {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}


def test_metadata(tuned: tuple[Path, Path], tmp_path: Path) -> None:
    """llama.cpp's keys: shape, scalings by MiniCPM's formulas, vocabulary, special tokens, template, file type."""
    export(*tuned, format="gguf", quant="Q8_0", output=tmp_path / "x.gguf", quiet=True)
    said = fields(tmp_path / "x.gguf")
    wanted = {
        "general.architecture": "minicpm", "general.file_type": 7, "general.quantization_version": 2,
        "minicpm.block_count": 3, "minicpm.embedding_length": 96, "minicpm.feed_forward_length": 160,
        "minicpm.attention.head_count": 6, "minicpm.attention.head_count_kv": 2, "minicpm.context_length": 256,
        "minicpm.rope.dimension_count": 16, "minicpm.vocab_size": 384, "minicpm.embedding_scale": 7.0,
        "minicpm.residual_scale": np.float32(1.1 / 3**0.5), "minicpm.logit_scale": 96 / 24,
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0, "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False, "tokenizer.ggml.add_space_prefix": True,
    }  # fmt: skip
    assert {key: said.get(key) for key in wanted} == wanted
    assert "minicpm.attention.scale" not in said
    kinds, tokens = said["tokenizer.ggml.token_type"], said["tokenizer.ggml.tokens"]
    assert len(kinds) == len(tokens) == len(said["tokenizer.ggml.scores"]) == 384
    assert [kinds[i] for i in (0, 1, 2)] == [2, 3, 3] and kinds.count(6) == 256
    assert kinds[tokens.index("...")] == kinds[tokens.index("--")] == 4 and kinds[-1] == 5 and tokens[-1] == "[PAD383]"
    template = load_tokenizer(tuned[0])
    assert "<用户>" in said["tokenizer.chat_template"] and "eos_token" in said["tokenizer.chat_template"]
    assert "name: minicpm" in said["minitune.run"] and template is not None


@pytest.mark.parametrize("quant", ["f16", "q8_0", "q4_0"])
def test_tensors(tuned: tuple[Path, Path], tmp_path: Path, quant: str) -> None:
    """Each is the merged weight, q and k with the rows of a rotated pair side by side, rounded once."""
    library = pytest.importorskip("gguf")
    report = export(*tuned, format="gguf", quant=quant, output=tmp_path / "x.gguf", quiet=True)
    reader = library.GGUFReader(tmp_path / "x.gguf")
    stored = {t.name: t for t in reader.tensors}
    decoder = minitune.load_model(*tuned, device="cpu")
    merge(decoder)
    weights = {n: t.detach().numpy() for n, t in hub_parameters(decoder).items()}
    assert report.merged == 12 and len(stored) == len(weights) == report.tensors
    bound = {"f16": 5e-4, "q8_0": 0.01, "q4_0": 0.12}[quant]
    for name, hub, heads in (
        ("blk.1.attn_q.weight", "model.layers.1.self_attn.q_proj.weight", 6),
        ("blk.2.attn_k.weight", "model.layers.2.self_attn.k_proj.weight", 2),
        ("blk.0.attn_v.weight", "model.layers.0.self_attn.v_proj.weight", 0),
        ("blk.0.ffn_down.weight", "model.layers.0.mlp.down_proj.weight", 0),
        ("token_embd.weight", "model.embed_tokens.weight", 0),
        ("output.weight", "lm_head.weight", 0),
    ):
        meant = weights[hub]
        if heads:  # row i and row i + 8 of a head of 16 turn together
            meant = meant[[16 * h + row for h in range(heads) for i in range(8) for row in (i, i + 8)]]
        got = library.quants.dequantize(stored[name].data, stored[name].tensor_type)
        assert np.linalg.norm(got - meant) < bound * np.linalg.norm(meant), name
        if quant == "f16":
            assert (got == meant.astype(np.float16)).mean() > 0.999, "the sum in float32, rounded once"
    assert stored["output_norm.weight"].tensor_type.name == "F32"
    assert stored["token_embd.weight"].tensor_type.name == {"f16": "F16"}.get(quant, "Q8_0")


def test_rows_that_no_block_fits(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Rows of 80 and 112 weights stay f16, which is said."""
    base = small.minicpm(
        tmp_path / "base",
        sharp=2.0,
        hidden_size=80,
        intermediate_size=112,
        num_attention_heads=5,
        num_key_value_heads=5,
    )
    export(base, format="gguf", quant="q4_0", output=tmp_path / "x.gguf")
    assert "23 tensors have rows that are no multiple of 32 weights: f16 there" in capsys.readouterr().err
    assert GgufFile(tmp_path / "x.gguf").kind("model.layers.0.mlp.down_proj.weight") == "F16"


@pytest.mark.parametrize("format, output", [("hf", "out"), ("gguf", "out"), ("gguf", "x.gguf")])
def test_every_file_that_is_named_is_there(
    tuned: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture, format: Any, output: str
) -> None:
    """Each line on stdout begins with what was written; the one on other programs' ids names what they read."""
    export(*tuned, format=format, output=tmp_path / output)
    lines = capsys.readouterr().out.splitlines()
    assert all(Path(line.split(": ")[0]).exists() for line in lines), lines
    named = next(line.split(": ")[0] for line in lines if "other programs" in line)
    assert named.endswith("chat_template.jinja" if format == "hf" else ".gguf")


def test_a_folder_or_a_file(tuned: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """`--output DIR` and `--output x.gguf`; a Modelfile beside it in both; nothing is ever written over."""
    export(*tuned, format="gguf", output=tmp_path / "out")
    assert {f.name for f in (tmp_path / "out").iterdir()} == {"out-f16.gguf", "Modelfile"}
    assert str(tmp_path / "out" / "out-f16.gguf") in capsys.readouterr().out.splitlines()
    export(*tuned, format="gguf", output=tmp_path / "new" / "x.gguf", quiet=True)
    assert {f.name for f in (tmp_path / "new").iterdir()} == {"x.gguf", "x.Modelfile"}
    assert (tmp_path / "new" / "x.gguf").stat().st_mode & 0o777 == (
        tmp_path / "new" / "x.Modelfile"
    ).stat().st_mode & 0o777
    (tmp_path / "y.Modelfile").write_text("mine", encoding="utf-8")
    (tmp_path / "z.gguf").write_text("mine", encoding="utf-8")
    for target, words in (
        ("out", "holds files already"),
        ("y.gguf", "y.Modelfile: is there already"),
        ("z.gguf", "is a file"),
    ):
        with pytest.raises(UserError, match=words):
            export(*tuned, format="gguf", output=tmp_path / target, quiet=True)
    assert (tmp_path / "z.gguf").read_text(encoding="utf-8") == "mine"


def test_words_that_do_not_go_together(tuned: tuple[Path, Path], tmp_path: Path) -> None:
    """One line each, with what to write instead; nothing is written."""
    for arguments, words in (
        ({"format": "hf", "quant": "q8_0"}, "--format hf takes --quant int4, not 'q8_0'; q8_0 goes with --format gguf"),
        ({"format": "minicpm", "quant": "int4"}, "--format minicpm takes --quant none.*int4 goes with --format hf"),
        ({"format": "gguf", "quant": "int4"}, "int4 goes with --format hf"),
        ({"format": "gguf", "quant": "q3"}, "takes --quant f16, q8_0, q4_0"),
        ({"format": "gguf", "dtype": "float32"}, "takes no --dtype; give --quant"),
        ({"format": "hf", "output": tmp_path / "x.gguf"}, "writes a folder"),
        ({"format": "gguf", "verify_data": tmp_path / "none.json"}, "none.json"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            export(*tuned, **{"output": tmp_path / "out", "quiet": True, **arguments})  # type: ignore[arg-type]
        assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_what_llama_cpp_has_no_form_for(tmp_path: Path) -> None:
    """No tokenizer, a tokenizer that is no BPE, more tokens than rows, positions that stretch with the text."""
    hub_twin(tmp_path / "bare", "llama")
    small.sentencepiece_tokenizer(hub(tmp_path / "many", "llama", vocab_size=97))
    small.sentencepiece_tokenizer(hub(tmp_path / "dynamic", "llama", "dynamic", vocab_size=384))
    small.sentencepiece_tokenizer(hub(tmp_path / "word", "llama", vocab_size=384))
    (tmp_path / "word" / "tokenizer.json").write_text(WORD_LEVEL, encoding="utf-8")
    for name, words in (
        ("bare", "has no tokenizer"),
        ("many", "has 37. tokens, the model 97 rows"),
        ("dynamic", "rope_scaling is dynamic"),
        ("word", "WordLevel tokenizer"),
    ):
        before = sorted(tmp_path.iterdir())
        with pytest.raises(UserError, match=words) as caught:
            export(tmp_path / name, format="gguf", output=tmp_path / "x.gguf", quiet=True)
        assert "\n" not in str(caught.value) and sorted(tmp_path.iterdir()) == before


WORD_LEVEL = '{"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": {"a": 0, "<unk>": 1}, "unk_token": "<unk>"}}'


def hub(folder: Path, *words: Any, **changes: Any) -> Path:
    hub_twin(folder, *words, **changes)
    return folder


@pytest.mark.parametrize("fail", ["disk", "interrupt"])
@pytest.mark.parametrize("target", ["x.gguf", "out"])
def test_nothing_half_written(
    tuned: tuple[Path, Path], tmp_path: Path, fail: str, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk in the middle is one line; neither file is left, not even when interrupted."""
    error = OSError(errno.ENOSPC, "No space left on device") if fail == "disk" else KeyboardInterrupt()
    whole, calls = gguf._encode, iter(range(99))

    def fails_later(*arguments: Any) -> Any:
        if next(calls) == 9:
            raise error
        return whole(*arguments)

    monkeypatch.setattr(gguf, "_encode", fails_later)
    with pytest.raises(KeyboardInterrupt if fail == "interrupt" else UserError) as caught:
        export(*tuned, format="gguf", output=tmp_path / target, quiet=True)
    assert not list(tmp_path.iterdir())
    if fail == "disk":
        assert str(caught.value).startswith(f"{tmp_path / target}: no space left") and "\n" not in str(caught.value)


def test_a_disk_that_is_full(tuned: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The write itself fails, with the number that says why: numpy's own `tofile` would hide it."""
    plain = io.BufferedWriter.write

    class Full(io.BufferedWriter):
        def write(self, data: Any) -> int:
            if self.tell() > 200_000:
                raise OSError(errno.ENOSPC, "No space left on device")
            return plain(self, data)

    library = pytest.importorskip("gguf.gguf_writer")
    monkeypatch.setattr(library, "open", lambda name, mode: Full(io.FileIO(name, "w")), raising=False)
    with pytest.raises(UserError, match="no space left on the disk"):
        export(*tuned, format="gguf", output=tmp_path / "x.gguf", quiet=True)
    assert not list(tmp_path.iterdir())


def test_k_quants_need_a_library(tuned: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it, one line that says what to install, before anything is read; a failure of its own is one line."""
    from minitune.export import kquant

    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(UserError, match="pip install 'minitune"):
            export("nowhere", format="gguf", quant="q4_k_m", output=tmp_path / "x.gguf", quiet=True)
    monkeypatch.setattr(kquant, "check", lambda: None)
    monkeypatch.setattr(kquant, "PROGRAM", "import sys\nprint('llama: no luck')\nsys.exit(1)")
    with pytest.raises(UserError, match="q4_k_m: llama.cpp's quantiser failed .llama: no luck"):
        export(*tuned, format="gguf", quant="q4_k_m", output=tmp_path / "x.gguf", quiet=True)
    assert not list(tmp_path.iterdir())


def test_there_and_back(tuned: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GGUF is a base too: exported as a hub folder again, its numbers are the file's."""
    monkeypatch.setenv("MINITUNE_CACHE", str(tmp_path / "cache"))
    export(*tuned, format="gguf", quant="q8_0", output=tmp_path / "x.gguf", quiet=True)
    export(tmp_path / "x.gguf", format="hf", output=tmp_path / "back", quiet=True)
    ids = torch.tensor([[1, *range(3, 60, 3)]])
    with torch.no_grad():
        one = minitune.load_model(tmp_path / "x.gguf", device="cpu").logits(ids)
        other = minitune.load_model(tmp_path / "back", device="cpu").logits(ids)
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    (tmp_path / "x.gguf").rename(tmp_path / "y.gguf")
    minitune.load_model(tmp_path / "y.gguf", device="cpu")
    assert [f.name.split("-")[1] for f in (tmp_path / "cache").glob("gguf-*")] == ["y"], "what is gone is not kept"


def test_help_names_the_words() -> None:
    """Every quantisation that can be asked for stands in `minitune export --help`."""
    from minitune.cli import main
    from minitune.export import QUANTS

    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", out)
        with pytest.raises(SystemExit):
            main(["export", "--help"])
    assert all(quant in out.getvalue() for quants in QUANTS.values() for quant in quants)
    assert "--verify" in out.getvalue() and "gguf" in out.getvalue()
