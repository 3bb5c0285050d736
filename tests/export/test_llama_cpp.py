"""Invariant 6 with the real llama.cpp: our log-probabilities, our greedy tokens, our ids. Slow parts run once a module."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import real
import small
import torch
from torch import Tensor
from twins import hub_twin, rewrite_config

import minitune
from minitune.checkpoint.embedded import embedded_default
from minitune.checkpoint.gguf import GgufFile
from minitune.checkpoint.hub import resolve
from minitune.checkpoint.tokenizer import load_tokenizer
from minitune.data.forms import Message
from minitune.data.template import Template
from minitune.export import export
from minitune.export.stream import Gguf, hidden, logits

Golden = Callable[[str], Path]
IDS = [[1, *range(3, 60, 3)], [1, 77, 250, 9, 9, 300, 31], [1, *range(340, 20, -7)]]
# llama.cpp rounds what a weight is multiplied with, to float16 or (quantised weights) to blocks of 8 bits. The bands:
# mean KL divergence in nats, the largest difference of a log-probability that is not far down the tail, and the share
# of greedy tokens kept. Measured on these models: 4e-5, 0.085 and 99.5 % (f16); 0.001, 0.38 and 93 % (quantised).
BANDS = {"f16": (1e-4, 0.15, 0.98), "quantised": (0.01, 0.6, 0.88)}


@torch.no_grad()
def ours(model: Any, documents: list[list[int]]) -> Tensor:
    """Log-probabilities of the decoder with its adapter, float32."""
    return torch.cat([model.logits(torch.tensor([d]))[0] for d in documents]).log_softmax(-1)


def agree(theirs: Tensor, want: Tensor, kind: str) -> None:
    divergence, bound, share = BANDS["f16" if kind == "f16" else "quantised"]
    log_q = theirs.log_softmax(-1)
    kl = (want.exp() * (want - log_q)).sum(-1).mean().item()
    worst = (log_q - want)[want > want.max(-1, keepdim=True).values - 10].abs().max().item()
    same = (theirs.argmax(-1) == want.argmax(-1)).float().mean().item()
    said = f"{kind}: {kl:.2g} nats a token, at worst {worst:.3f}, {same:.1%} of the greedy tokens"
    assert kl < divergence and worst < bound and same >= share, said


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A MiniCPM with scalings of its own, grouped keys and a head of its own, and its adapter."""
    root = tmp_path_factory.mktemp("tuned")
    base = small.minicpm(root / "base", sharp=2.0)
    return base, small.adapter(root / "adapter", base)


@pytest.mark.parametrize("quant", ["f16", "q8_0", "q4_0"])
def test_minicpm_with_scalings(tuned: tuple[Path, Path], tmp_path: Path, quant: str) -> None:
    """f16: the log-probabilities of base + adapter. Quantised: those of the file as we read it, within the band."""
    export(*tuned, format="gguf", quant=quant, output=tmp_path / "x.gguf", quiet=True)
    theirs = real.logits(tmp_path / "x.gguf", IDS, tmp_path / "logits.npy")
    if quant == "f16":
        agree(theirs, ours(minitune.load_model(*tuned, device="cpu"), IDS), quant)
    else:
        model = Gguf(tmp_path / "x.gguf")
        agree(theirs, logits(model, hidden(model, IDS)).log_softmax(-1), quant)
    assert theirs.softmax(-1).max(-1).values.mean() > 0.1, "the model is decided, or agreeing would prove nothing"


def test_k_quants(tmp_path: Path) -> None:
    """q4_k_m on widths of 256: llama.cpp made it, runs it, and gives what our reader makes of it."""
    base = small.minicpm(
        tmp_path / "base", sharp=2.0, hidden_size=256, intermediate_size=512, num_attention_heads=4,
        num_key_value_heads=2, num_hidden_layers=2, dim_model_base=64,
    )  # fmt: skip
    report = export(base, format="gguf", quant="q4_k_m", output=tmp_path / "x.gguf", quiet=True)
    kinds = {GgufFile(tmp_path / "x.gguf").kind(n) for n in ("model.layers.0.mlp.gate_proj.weight", "lm_head.weight")}
    assert kinds == {"Q4_K", "Q6_K"} and report.notes == []
    assert report.comparison is not None and 1e-3 < report.comparison.kl < 0.3
    assert not list(tmp_path.glob("**/f16.gguf"))
    theirs = real.logits(tmp_path / "x.gguf", IDS, tmp_path / "logits.npy")
    model = Gguf(tmp_path / "x.gguf")
    agree(theirs, logits(model, hidden(model, IDS)).log_softmax(-1), "q4_k_m")


@pytest.mark.parametrize(
    ("family", "rope"), [("granite", "default"), ("granite", "linear"), ("llama", "llama3"), ("llama", "default")]
)
def test_twins(tmp_path: Path, family: str, rope: str) -> None:
    """Llama and Granite (an attention scale of its own) and scalings of positions, against transformers."""
    twin = hub_twin(tmp_path / "base", family, rope, vocab_size=384, tie_word_embeddings=False)
    small.sentencepiece_tokenizer(tmp_path / "base")
    export(tmp_path / "base", format="gguf", output=tmp_path / "x.gguf", quiet=True)
    documents = [[1, *range(3, 60)], [1, 77, 250, 9, 9, 300, 31]]
    theirs = real.logits(tmp_path / "x.gguf", documents, tmp_path / "logits.npy")
    with torch.no_grad():
        want = torch.cat([twin(torch.tensor([d])).logits[0] for d in documents]).log_softmax(-1)
    agree(theirs, want, "f16")


@pytest.mark.parametrize("family", ["minicpm", "llama"])
@pytest.mark.parametrize("long", [False, True])
def test_longrope(tmp_path: Path, family: str, long: bool) -> None:
    """MiniCPM4's positions. llama.cpp takes the long factors where its context is longer than the trained length,
    the hub where the text is: a text of the one kind in a context of the other kind differs, and export says so."""
    scaling = {
        "rope_type": "longrope",
        "short_factor": [1.0 + 0.05 * i for i in range(8)],
        "long_factor": [1.0 + 0.7 * i for i in range(8)],
        "original_max_position_embeddings": 256,
    }
    base = small.minicpm(tmp_path / "base", sharp=2.0, rope_scaling=scaling, max_position_embeddings=1024)
    if family == "llama":
        rewrite_config(base, architectures=["LlamaForCausalLM"], model_type="llama")
    report = export(base, format="gguf", output=tmp_path / "x.gguf", quiet=True)
    assert any("long factors" in note for note in report.notes)
    document = [1, *(3 + i * 7 % 370 for i in range(400 if long else 60))]
    theirs = real.logits(tmp_path / "x.gguf", [document], tmp_path / "logits.npy", 512 if long else 256)
    agree(theirs, ours(minitune.load_model(base, device="cpu"), [document]), "f16")


STRINGS = ["...", "a...b", "a -- b", "你好。。。。", "  two  spaces", "\n\n\t x", "</s>", "<s>abc</s>", "x" * 30]
STRINGS += [
    "<h1>标题</h1>",
    "🙂 表情 é ü Ω ≈",
    "def f(x):\n    return x",
    "１＋１＝２",
    " ",
    "<用户>你好<AI>",
    "<0x41>",
]


def test_minicpms_own_tokenizer(golden: Golden, tmp_path: Path) -> None:
    """MiniCPM-2B's 122753 pieces: llama.cpp's ids are ours, of strange strings and of whole conversations."""
    base = small.minicpm(
        tmp_path / "base", golden("tokenizer-minicpm"), hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    run = small.adapter(tmp_path / "run", base)
    report = export(base, run, "gguf", tmp_path / "x.gguf", quiet=True, verify=False)
    tokenizer = load_tokenizer(base)
    said = real.tokens(tmp_path / "x.gguf", STRINGS)
    mine = tokenizer(STRINGS, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert said["plain"] == mine
    assert (said["bos"], said["eos"], said["add_bos"], said["ends"]) == (1, 2, True, [2])
    assert report.first_turns_equal is True and 0 < report.later_differ < report.later_ids / 4
    template = Template.recorded(tokenizer, {}, run)
    served = real.serve(tmp_path / "x.gguf", [("/apply-template", {"messages": TURNS}), *(_chat(t) for t in TALKS)])
    assert served[0]["prompt"].endswith("<用户>再说一次<AI>") and "我是助手。</s><用户>" in served[0]["prompt"]
    for talk, answer in zip(TALKS, served[1:], strict=True):
        prompt = template.prompt_ids([Message(m["role"], m["content"]) for m in talk])  # type: ignore[arg-type]
        assert answer["usage"]["prompt_tokens"] == len(prompt), talk


def test_a_tokenizer_model_alone(tuned: tuple[Path, Path], tmp_path: Path) -> None:
    """Scores and bytes of a tokenizer.model: llama.cpp's ids are sentencepiece's.

    A user-defined piece stays whole in both; llama.cpp then begins anew behind it, with a ▁ that sentencepiece does not
    write.
    """
    export(*tuned, format="gguf", output=tmp_path / "x.gguf", quiet=True)
    tokenizer = load_tokenizer(tuned[0])
    plain = [s for s in STRINGS if not any(piece in s for piece in ("...", "--", "<s>", "</s>", "<0x"))]
    said = real.tokens(tmp_path / "x.gguf", [*plain, "...", "a -- b"])["plain"]
    assert len(plain) > 8 and said[:-2] == [tokenizer(s, add_special_tokens=False)["input_ids"] for s in plain]
    dots, dashes = (tokenizer.convert_tokens_to_ids(piece) for piece in ("...", "--"))
    assert dots in said[-2] and dashes in said[-1]


TURNS = [
    {"role": "user", "content": " 你是谁？ "},
    {"role": "assistant", "content": "我是助手。"},
    {"role": "user", "content": "再说一次"},
]
TALKS = [
    [{"role": "user", "content": "  Hello, how are you?\n"}],
    [{"role": "system", "content": "你是一位老师。"}, {"role": "user", "content": "1+1=2…… 🙂"}],
]


def _chat(messages: list[dict[str, str]], **settings: Any) -> tuple[str, dict[str, Any]]:
    asked = {"messages": messages, "temperature": 0, "max_tokens": 1, "cache_prompt": False, **settings}
    return "/v1/chat/completions", asked


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """(base, adapter, exported f16 file) of the embedded model."""
    root = tmp_path_factory.mktemp("smollm2")
    base = embedded_default()
    run = small.adapter(root / "adapter", base)
    export(base, run, "gguf", root / "x.gguf", quiet=True, verify=False)
    return base, run, root / "x.gguf"


def test_smollm2_with_an_adapter(smollm2: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """A real model in llama.cpp's own server: each greedy token, its log-probability, and those of the five next."""
    base, run, file = smollm2
    tokenizer = load_tokenizer(base)
    template = Template.recorded(tokenizer, json.loads((base / "config.json").read_text()), run)
    model = minitune.load_model(base, run, device="cpu")
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    settings: dict[str, Any] = {"max_tokens": 12, "logprobs": True, "top_logprobs": 5}
    strings = [s for s in STRINGS if s != "<0x41>"]
    (answer, *ids) = real.serve(
        file,
        [_chat(messages, **settings), *(("/tokenize", {"content": s, "parse_special": False}) for s in strings)],
    )
    prompt = template.prompt_ids([Message("user", messages[0]["content"])])
    assert answer["usage"]["prompt_tokens"] == len(prompt)
    steps = answer["choices"][0]["logprobs"]["content"]
    row = prompt + [step["id"] for step in steps]
    want = ours(model, [row])[len(prompt) - 1 :]
    assert len(steps) > 3
    for step, line in zip(steps, want, strict=False):
        assert step["id"] == line.argmax().item()
        for choice in step["top_logprobs"]:
            assert abs(choice["logprob"] - line[choice["id"]].item()) < 0.05
    for text, said in zip(strings, ids, strict=True):
        assert said["tokens"] == tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"], text


def test_a_gguf_is_a_model_to_us(smollm2: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: Any) -> None:
    """`--model x.gguf`: weights, tokenizer, template and what was trained come out of the file alone."""
    base, run, file = smollm2
    monkeypatch.setenv("MINITUNE_CACHE", str(tmp_path / "cache"))
    folder = resolve(str(file))
    assert folder == resolve(str(file)), "made once"
    assert {f.name for f in folder.iterdir()} >= {"run.yaml", "chat_template.jinja", "tokenizer.json", "model.gguf"}
    ids = [[1, 4093, 198, 26843, 2, 198]]
    want, got = (
        ours(minitune.load_model(base, run, device="cpu"), ids),
        ours(minitune.load_model(file, device="cpu"), ids),
    )
    assert (want - got)[want > -10].abs().max() < 0.05
    tokenizer, before = load_tokenizer(folder), load_tokenizer(base)
    assert [tokenizer(s)["input_ids"] for s in STRINGS] == [before(s)["input_ids"] for s in STRINGS]
    assert Template.recorded(tokenizer, {}, folder).tuned
