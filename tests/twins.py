"""Tiny random models and their `transformers` twins: the independent side of the parity tests."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minitune.checkpoint.weights import hub_parameters, load_decoder
from minitune.data.loader import make_pack
from minitune.data.template import Encoded
from minitune.model.attention import PackedLayout
from minitune.model.decoder import Decoder
from minitune.train.loss import cross_entropy_sum

# None of them 1, and no two alike: a scalar that is forgotten or swapped shows.
SCALARS = {
    "embedding_multiplier": 7.3,
    "residual_multiplier": 0.37,
    "attention_multiplier": 0.21,
    "logits_scaling": 2.9,
}
SHAPE = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}


def rope_settings(kind: str) -> dict[str, Any]:
    """`rope_parameters` of a kind, for 64 positions and heads of 16."""
    own: dict[str, dict[str, Any]] = {
        "default": {},
        "linear": {"factor": 2.5},
        "dynamic": {"factor": 3.0},
        "llama3": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
        "longrope": {
            "short_factor": [1.0 + 0.05 * i for i in range(8)],
            "long_factor": [1.0 + 0.7 * i for i in range(8)],
            "original_max_position_embeddings": 32,
        },
    }
    return {"rope_type": kind, "rope_theta": 5000.0, **own[kind]}


def hub_twin(folder: Path, family: str = "granite", rope: str = "default", seed: int = 0, **changes: Any) -> Any:
    """A random `transformers` model (eager attention, float32), saved in `folder` as the hub lays it out."""
    from transformers import GraniteConfig, GraniteForCausalLM, LlamaConfig, LlamaForCausalLM

    settings = {**SHAPE, "rope_parameters": rope_settings(rope), "attn_implementation": "eager", **changes}
    torch.manual_seed(seed)
    if family == "granite":
        model = GraniteForCausalLM(GraniteConfig(**{**settings, **SCALARS}))
    else:
        model = LlamaForCausalLM(LlamaConfig(**settings))
    # norms start at one, which would hide a forgotten weight
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(folder)
    return model.eval()


def rows(seed: int, lengths: list[int], vocab: int = 97, ignore: int = 2) -> list[Encoded]:
    """Random rows; the first `ignore` labels of each, and some others, are not learned."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for length in lengths:
        ids = torch.randint(3, vocab, (length,), generator=generator).tolist()
        learned = (torch.rand(length, generator=generator) < 0.8).tolist()
        learned[:ignore] = [False] * min(ignore, length)
        labels = [i if keep else -100 for i, keep in zip(ids, learned, strict=True)]
        out.append(Encoded(ids, labels))
    return out


def hub_gradients(decoder: Decoder) -> dict[str, Tensor]:
    """{hub name: the gradient of that tensor}, cut out of the fused ones."""
    twin = copy.deepcopy(decoder)
    for own, other in zip(decoder.parameters(), twin.parameters(), strict=True):
        other.data = torch.zeros_like(own) if own.grad is None else own.grad
    return {name: tensor.detach() for name, tensor in hub_parameters(twin).items()}


def packed_logits(decoder: Decoder, documents: list[list[int]], kernel: str = "documents") -> list[Tensor]:
    """The logits of each document, all of them in one pack."""
    lengths = [len(d) for d in documents]
    plain = PackedLayout.of(lengths, decoder.device, decoder.dtype)
    layout = PackedLayout(plain.cu_seqlens, plain.max_seqlen, plain.lengths, kernel)  # type: ignore[arg-type]
    ids = torch.tensor([i for d in documents for i in d])
    positions = torch.tensor([p for n in lengths for p in range(n)])
    return list(decoder.head(decoder.hidden(ids, positions, layout)).split(lengths))


def mean_loss(decoder: Decoder, encoded: list[Encoded]) -> Tensor:
    """The training path's loss: one pack, the head over supervised positions only."""
    pack = make_pack(encoded, range(len(encoded)))
    layout = PackedLayout.of(list(pack.lengths), decoder.device, decoder.dtype)
    h = decoder.hidden(pack.input_ids, pack.position_ids, layout)
    return cross_entropy_sum(h[pack.predict], decoder.head_weight, pack.targets, chunk=7) / pack.supervised


def hub_loss(model: Any, encoded: list[Encoded]) -> Tensor:
    """The same loss by `transformers` and torch, document by document."""
    total, count = torch.zeros(()), 0
    for row in encoded:
        logits = model(torch.tensor([row.input_ids])).logits[0, :-1]
        labels = torch.tensor(row.labels[1:])
        total = total + F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
        count += int((labels != -100).sum())
    return total / count


def learning(folder: Path, **settings: Any) -> Decoder:
    """The decoder of a folder with every parameter learning."""
    return load_decoder(folder, "float32", "cpu", **settings).requires_grad_(True)


def rewrite_config(folder: Path, **changes: Any) -> None:
    """Sets keys of a folder's config.json; None takes a key away."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}), encoding="utf-8")


def assert_close(ours: Tensor, theirs: Tensor, part: float, what: str = "") -> None:
    """Largest difference at most `part` of the largest expected magnitude."""
    worst = (ours.double() - theirs.double()).abs().max().item()
    bound = part * theirs.double().abs().max().item()
    assert ours.shape == theirs.shape and worst <= bound, f"{what}: {worst:.3g} > {bound:.3g}"
