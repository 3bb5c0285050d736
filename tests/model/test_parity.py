"""Invariant 1: logits, loss and gradients are those of the official code and of `transformers`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from twins import (
    assert_close,
    hub_gradients,
    hub_loss,
    hub_twin,
    learning,
    mean_loss,
    packed_logits,
    rewrite_config,
    rows,
)

from minitune import load_model
from minitune.checkpoint.adapter import adapter_parameters
from minitune.checkpoint.weights import hub_parameters, load_decoder
from minitune.data.template import Encoded
from minitune.model.decoder import DecoderConfig
from minitune.model.lora import merge

Golden = Callable[[str], Path]
MODELS = ["tiny-2b", "tiny-2b-bin", "tiny-1b"]


def encoded(expected: dict[str, torch.Tensor]) -> list[Encoded]:
    ids, labels = expected["input_ids"].tolist(), expected["labels"].tolist()
    return [Encoded(i, label) for i, label in zip(ids, labels, strict=True)]


@pytest.mark.parametrize("name", MODELS)
def test_golden_logits_alone_and_packed(golden: Golden, name: str) -> None:
    """The official code's logits: a batch, each document by itself, and all documents in one pack."""
    folder = golden(name)
    expected = load_file(folder / "expected.safetensors")
    decoder = load_model(folder, dtype="float32", device="cpu")
    with torch.no_grad():
        assert_close(decoder.logits(expected["input_ids"]), expected["logits"], 3e-5, name)
        documents = [expected[f"packed.{i}.input_ids"].tolist() for i in range(3)]
        for kernel in ("documents", "masked"):
            for i, packed in enumerate(packed_logits(decoder, documents, kernel)):
                assert_close(packed, expected[f"packed.{i}.logits"], 3e-5, f"{kernel} {i}")
        for i, document in enumerate(documents):
            assert_close(decoder.logits(torch.tensor([document]))[0], expected[f"packed.{i}.logits"], 3e-5, f"{i}")


@pytest.mark.parametrize("name", MODELS)
def test_golden_loss_and_gradients(golden: Golden, name: str) -> None:
    """Mean loss, each given gradient (a tied embedding's is of both uses) and the norm over all parameters."""
    folder = golden(name)
    expected = load_file(folder / "expected.safetensors")
    decoder = learning(folder)
    loss = mean_loss(decoder, encoded(expected))
    loss.backward()
    assert abs(loss.item() - expected["mean_loss"].item()) <= 1e-5
    ours = hub_gradients(decoder)
    given = [k for k in expected if k.startswith("grad.")]
    assert len(given) == 10
    for key in given:
        assert (ours[key.removeprefix("grad.")] - expected[key]).abs().max() <= 5e-5, key
    norm = math.sqrt(sum(p.grad.double().pow(2).sum().item() for p in decoder.parameters() if p.grad is not None))
    assert norm == pytest.approx(expected["grad_norm_all"].item(), rel=1e-5)


def test_golden_adapter(golden: Golden) -> None:
    """PEFT's adapter on the official model: logits, loss, A's and B's gradients, merged weights and their logits."""
    expected = load_file(golden("tiny-2b-lora") / "expected.safetensors")
    decoder = load_model(golden("tiny-2b"), adapter=golden("tiny-2b-lora"), dtype="float32", device="cpu")
    with torch.no_grad():
        assert_close(decoder.logits(expected["input_ids"]), expected["logits"], 3e-5)
    loss = mean_loss(decoder, encoded(expected))
    loss.backward()
    assert abs(loss.item() - expected["mean_loss"].item()) <= 1e-5
    gradients = {}
    learned = [p for p in decoder.parameters() if p.requires_grad]
    assert all(p.grad is None for p in decoder.parameters() if not p.requires_grad)
    for parameter in learned:  # the same mapping, laid over the gradients
        assert parameter.grad is not None
        parameter.data, parameter.grad.data = parameter.grad.data, parameter.data
    gradients = {k: v.detach().clone() for k, v in adapter_parameters(decoder).items()}
    for parameter in learned:
        assert parameter.grad is not None
        parameter.data, parameter.grad.data = parameter.grad.data, parameter.data
    given = [k for k in expected if k.startswith("grad.")]
    assert len(given) == 16
    for key in given:
        assert (gradients[key.removeprefix("grad.")] - expected[key]).abs().max() <= 5e-5, key
    merge(decoder)
    weights = hub_parameters(decoder)
    merged = [k for k in expected if k.startswith("merged.")]
    assert len(merged) == 4
    for key in merged:
        assert (weights[key.removeprefix("merged.")] - expected[key]).abs().max() <= 1e-6, key
    with torch.no_grad():
        assert_close(decoder.logits(expected["input_ids"]), expected["merged_logits"], 3e-5)


CASES = [
    ("granite", "default", True, 2, [31, 7, 18]),
    ("granite", "default", False, 4, [31, 7, 18]),
    ("granite", "linear", True, 1, [31, 40]),
    ("granite", "dynamic", False, 2, [30, 90, 64, 65]),
    ("granite", "longrope", True, 2, [20, 32, 33, 60]),
    ("llama", "default", True, 4, [31, 7, 18]),
    ("llama", "default", False, 2, [31, 7, 18]),
    ("llama", "linear", False, 2, [31, 40]),
    ("llama", "dynamic", True, 2, [30, 90, 64, 65]),
    ("llama", "longrope", False, 1, [20, 32, 33, 60]),
    ("llama", "llama3", False, 2, [20, 60]),
]


@pytest.mark.parametrize(("family", "rope", "tied", "kv", "lengths"), CASES)
def test_equals_transformers(tmp_path: Path, family: str, rope: str, tied: bool, kv: int, lengths: list[int]) -> None:
    """Logits, loss and every gradient of Llama and Granite with non-neutral scalars; documents of mixed lengths in
    one pack, some longer than the original maximum, equal each of them alone."""
    hub = hub_twin(tmp_path, family, rope, tie_word_embeddings=tied, num_key_value_heads=kv)
    decoder = learning(tmp_path)
    assert (decoder.lm_head is None) == tied
    data = rows(3, lengths)
    # transformers' dynamic RoPE remembers the longest document so far: shortest first, and forget between passes
    with torch.no_grad():
        ours = packed_logits(decoder, [r.input_ids for r in data])
        for row, logits in sorted(zip(data, ours, strict=True), key=lambda pair: len(pair[0].input_ids)):
            theirs = hub(torch.tensor([row.input_ids])).logits[0]
            assert_close(logits, theirs, 3e-5, f"{len(row.input_ids)} tokens")
        hub(torch.tensor([[1, 5, 6]]))
    loss, expected = mean_loss(decoder, data), hub_loss(hub, sorted(data, key=lambda r: len(r.input_ids)))
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    loss.backward()
    expected.backward()
    gradients = hub_gradients(decoder)
    named = dict(hub.named_parameters())
    assert gradients.keys() == named.keys()
    for name, parameter in named.items():
        assert_close(gradients[name], parameter.grad, 5e-5, name)


def test_minicpm_scalars_are_granites(tmp_path: Path) -> None:
    """scale_emb, scale_depth/√layers and hidden/dim_model_base are Granite's multipliers, by name."""
    hub_twin(tmp_path, "granite", attention_multiplier=0.25, seed=1)
    granite = learning(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    rewrite_config(tmp_path, attention_multiplier=0.25)
    as_granite = load_decoder(tmp_path)
    rewrite_config(
        tmp_path,
        architectures=["MiniCPMForCausalLM"],
        model_type="minicpm",
        scale_emb=config["embedding_multiplier"],
        scale_depth=config["residual_multiplier"] * math.sqrt(3),
        dim_model_base=64 / config["logits_scaling"],
        **dict.fromkeys(("embedding_multiplier", "residual_multiplier", "logits_scaling", "attention_multiplier")),
    )
    ids = torch.tensor([rows(1, [12])[0].input_ids])
    with torch.no_grad():
        minicpm = load_decoder(tmp_path).logits(ids)
        assert_close(minicpm, as_granite.logits(ids), 1e-6)
        assert not torch.allclose(minicpm, granite.logits(ids))  # attention_multiplier is used too


def test_absent_keys_are_the_published_defaults() -> None:
    """A MiniCPM config without a key means its class's default: tied, scalars of one, base 10000, 1e-6."""
    hub = {
        "architectures": ["MiniCPMForCausalLM"],
        "vocab_size": 10,
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
    }
    config = DecoderConfig.from_hub(hub)
    assert config.tie_word_embeddings and config.num_key_value_heads == 2 and config.head_dim == 4
    assert (config.embedding_multiplier, config.residual_multiplier, config.logits_scaling) == (1, 0.5, 8)
    assert (config.rope_theta, config.rms_norm_eps, config.attention_scale) == (10000, 1e-6, 0.5)
    llama = DecoderConfig.from_hub({**hub, "architectures": ["LlamaForCausalLM"]})
    assert not llama.tie_word_embeddings and llama.residual_multiplier == 1
