"""GGUF files, the reading side: a Llama-shaped model as a hub folder.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitune.checkpoint.embedded import embedded_default as embedded_default
from minitune.config import UserError

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader
    from tokenizers import Tokenizer
    from torch import Tensor

TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
CONTROL, USER_DEFINED = 3, 4  # tokenizer.ggml.token_type


# ---- the model


def read_gguf(path: str | Path) -> tuple[dict[str, Any], Iterator[tuple[str, Tensor]]]:
    """A Llama-shaped GGUF file as (the hub's config.json, its tensors one by one).

    The tensors come dequantised to float32, under the hub's names (`model.layers.0.self_attn.q_proj.weight`),
    shaped [out, in], with q and k in the hub's rotate-half order. `lm_head.weight` is absent where the
    embedding is tied. Raises UserError for another architecture or for tensors that Llama does not have.
    """
    reader = _open(path)
    config = _config(reader, path)
    return config, _tensors(reader, config, path)


def _open(path: str | Path) -> GGUFReader:
    from gguf import GGUFReader
    from numpy import ndarray

    class Reader(GGUFReader):
        # Each of the 100,000 strings is sliced from `data`: plain arrays over the map take half the time.
        @property
        def data(self) -> Any:
            return self.plain

        @data.setter
        def data(self, mapped: Any) -> None:
            self.plain = mapped.view(ndarray)

    try:
        return Reader(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (ValueError, IndexError, KeyError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: not a whole GGUF file ({reason}); download it again") from None


def _value(reader: GGUFReader, key: str, default: Any = None) -> Any:
    field = reader.get_field(key)
    return default if field is None else field.contents()


def _config(reader: GGUFReader, path: str | Path) -> dict[str, Any]:
    import numpy as np

    arch = _value(reader, "general.architecture")
    if arch != "llama":
        raise UserError(f"{path}: a GGUF of architecture {arch!r}; only 'llama' is read (use the hub folder)")

    def need(key: str) -> Any:
        value = _value(reader, f"llama.{key}")
        if value is None:
            raise UserError(f"{path}: llama.{key} is missing from the metadata; convert the file again")
        return value

    hidden, heads = need("embedding_length"), need("attention.head_count")
    kv_heads = _value(reader, "llama.attention.head_count_kv", heads)
    if not isinstance(heads, int) or not isinstance(kv_heads, int):
        raise UserError(f"{path}: head counts that differ by layer are not read; use a plain Llama")
    head_dim = _value(reader, "llama.attention.key_length", hidden // heads)
    scaling = _value(reader, "llama.rope.scaling.type", "none")
    value_dim = _value(reader, "llama.attention.value_length", head_dim)
    plain = {
        "experts": not _value(reader, "llama.expert_count", 0),
        f"rope scaling {scaling!r}": scaling == "none",
        "partial rotary": _value(reader, "llama.rope.dimension_count", head_dim) == head_dim,
        "values of another width than keys": value_dim == head_dim,
    }
    for what, absent in plain.items():
        if not absent:
            raise UserError(f"{path}: {what} in a GGUF is not read; use the model's hub folder")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    _check_names(tensors, need("block_count"), path)
    # The metadata holds float32: 1e-5 reads as 9.9999997e-06. The shortest decimal is what was meant.
    eps = float(str(np.float32(need("attention.layer_norm_rms_epsilon"))))
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),  # GGUF lists the innermost axis first
        "hidden_size": hidden,
        "intermediate_size": need("feed_forward_length"),
        "num_hidden_layers": need("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": eps,
        "rope_theta": float(str(np.float32(_value(reader, "llama.rope.freq_base", 10000.0)))),
        "max_position_embeddings": need("context_length"),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": _value(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": _value(reader, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": _value(reader, "tokenizer.ggml.padding_token_id"),
        "torch_dtype": "float32",
    }


def _hub_names(layers: int) -> dict[str, str]:
    names = dict(TOP_NAMES)
    for i in range(layers):
        names.update({f"blk.{i}.{ours}": f"model.layers.{i}.{hub}" for ours, hub in LAYER_NAMES.items()})
    return names


def _check_names(tensors: dict[str, Any], layers: int, path: str | Path) -> None:
    names = _hub_names(layers)
    for name in tensors:
        if name not in names:
            raise UserError(f"{path}: tensor {name} is not one of a plain Llama; use the model's hub folder")
    for name in names:
        if name not in tensors and name != "output.weight":
            raise UserError(f"{path}: tensor {name} is missing; download or convert the file again")


def _tensors(reader: GGUFReader, config: dict[str, Any], path: str | Path) -> Iterator[tuple[str, Tensor]]:
    import numpy as np
    import torch
    from gguf.quants import dequantize

    names = _hub_names(config["num_hidden_layers"])
    q_heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    heads_of = {"attn_q.weight": q_heads, "attn_k.weight": kv_heads}
    for tensor in reader.tensors:
        try:
            weight = dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            kind = tensor.tensor_type.name
            raise UserError(f"{path}: {tensor.name} is {kind}, which gguf cannot decode; use Q8_0") from None
        heads = heads_of.get(tensor.name.split(".", 2)[-1])
        if heads is not None:
            weight = _unpermute(weight, heads)
        if not weight.flags.writeable:  # float32 as stored: a view of the file
            weight = np.array(weight)
        yield names[tensor.name], torch.from_numpy(np.ascontiguousarray(weight, dtype=np.float32))


def _unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """GGUF rotates neighbours (rows 2i, 2i+1 of a head), the hub rotates halves (rows i, i + D/2)."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


# ---- the tokenizer


def _tokenizer(reader: GGUFReader, path: str | Path) -> Tokenizer:
    """The byte-level BPE of the metadata.

    By hand: `transformers` 5.24 knows no `smollm` pre-tokenizer and leaves digits together, which gives
    other ids than the model was trained on. Digits one by one, then GPT-2's pattern, as the hub's file says.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    model, pre = _value(reader, "tokenizer.ggml.model"), _value(reader, "tokenizer.ggml.pre")
    if model != "gpt2" or pre not in ("smollm", "gpt-2"):
        raise UserError(f"{path}: a {model}/{pre} tokenizer; only gpt2/smollm and gpt2/gpt-2 are read")
    tokens, kinds = _value(reader, "tokenizer.ggml.tokens"), _value(reader, "tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in _value(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    split: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if pre == "smollm" else []
    split.append(pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    tokenizer.decoder = decoders.ByteLevel()
    added = [
        AddedToken(token, normalized=False, special=kind == CONTROL)
        for token, kind in zip(tokens, kinds, strict=True)
        if kind in (CONTROL, USER_DEFINED)
    ]
    tokenizer.add_tokens(added)
    return tokenizer


def _tokenizer_config(reader: GGUFReader) -> dict[str, Any]:
    tokens = _value(reader, "tokenizer.ggml.tokens")
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": _value(reader, "llama.context_length"),
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
        "add_bos_token": bool(_value(reader, "tokenizer.ggml.add_bos_token", False)),
    }
    for name, key in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items():
        token_id = _value(reader, f"tokenizer.ggml.{key}_token_id")
        if token_id is not None:
            config[f"{name}_token"] = tokens[token_id]
    return config


# ---- the folder


def convert(path: str | Path, folder: Path) -> None:
    """Writes the GGUF file `path` into the empty `folder` in the hub's layout, in float32.

    The peak is one copy of the weights: safetensors writes from where they lie. OSError on a full disk.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    reader = _open(path)
    config = _config(reader, path)
    _tokenizer(reader, path).save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(reader))
    template = _value(reader, "tokenizer.chat_template")
    if template:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    _write_json(folder / "config.json", config)
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(folder / "generation_config.json", ids)
    try:
        tensors = dict(_tensors(reader, config, path))
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(str(error)) from None
    (folder / "model.safetensors").chmod(0o644)  # safetensors makes it 0600


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
