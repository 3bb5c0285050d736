"""Small models with a tokenizer, whose logits are far from flat and whose scalings are none of them neutral."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minitune.checkpoint.adapter import save_adapter
from minitune.checkpoint.weights import hub_tensors, load_decoder
from minitune.checkpoint.writing import write_safetensors
from minitune.model.decoder import Decoder, DecoderConfig
from minitune.model.lora import LoraConfig, attach

# None of them what another model has, none of them 1: llama.cpp's own defaults (12, 1.4, 256) would show too.
SCALINGS = {"scale_emb": 7, "scale_depth": 1.1, "dim_model_base": 24}
TEXT = [
    "你好，世界。今天天气怎么样？",
    "Hello, how are you? I'm fine -- thank you...",
    "<用户>你是谁<AI>我是一位老师，什么都可以问。",
    "Write a haiku about rain; 1 + 1 = 2, 3.14!",
    "def f(x):\n    return x + 1\n",
] * 8


def minicpm(folder: Path, tokenizer: Path | None = None, *, sharp: float = 1.0, seed: int = 0, **shape: Any) -> Path:
    """A random MiniCPM in the hub's layout, float32; its vocabulary is `tokenizer`'s, or sentencepiece's of TEXT.

    sharp: multiplies the head's weights, so that the distributions are as decided as a trained model's.
    """
    folder.mkdir(parents=True)
    if tokenizer is None:
        sentencepiece_tokenizer(folder)
    else:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(tokenizer / name, folder / name)
    config = {
        "architectures": ["MiniCPMForCausalLM"],
        "model_type": "minicpm",
        "vocab_size": 384 if tokenizer is None else 122753,
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        **SCALINGS,
        **shape,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    torch.manual_seed(seed)
    decoder = Decoder(DecoderConfig.from_hub(config))
    for parameter in decoder.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=1 / math.sqrt(parameter.shape[1]))
        else:
            nn.init.uniform_(parameter, 0.5, 1.5)
    with torch.no_grad():
        decoder.head_weight.mul_(sharp * decoder.config.logits_scaling)
        decoder.embed.weight.div_(decoder.config.embedding_multiplier if decoder.lm_head is not None else 1)
    write_safetensors(folder, hub_tensors(decoder))
    return folder


def sentencepiece_tokenizer(folder: Path) -> None:
    """A tokenizer.model of some 370 pieces: a BPE with byte fallback and pieces that stay whole."""
    import sentencepiece

    (folder / "text").mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT),
        model_prefix=str(folder / "text" / "tokenizer"),
        vocab_size=370,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["...", "--"],
        character_coverage=0.98,
        minloglevel=2,
    )
    shutil.move(folder / "text" / "tokenizer.model", folder / "tokenizer.model")
    shutil.rmtree(folder / "text")


def adapter(folder: Path, base: Path, targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")) -> Path:
    """An adapter whose B is not zero, with the template that was trained recorded beside it."""
    decoder = load_decoder(base, "float32", "cpu")
    attach(decoder, LoraConfig(r=4, lora_alpha=12, lora_dropout=0.0, target_modules=targets))
    torch.manual_seed(5)
    for linear in decoder.linears():
        if linear.lora is not None:
            nn.init.normal_(linear.lora.A, std=1 / math.sqrt(linear.lora.A.shape[1]))
            nn.init.normal_(linear.lora.B, std=0.1 / math.sqrt(linear.lora.A.shape[1]))
    save_adapter(decoder, folder, str(base))
    name = "minicpm" if (base / "tokenizer.model").is_file() or decoder.config.family.startswith("Mini") else "model"
    (folder / "run.yaml").write_text(f"model: base\ntemplate:\n  name: {name}\n", encoding="utf-8")
    return folder
