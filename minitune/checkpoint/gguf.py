"""GGUF files, the reading side: a Llama, Granite or MiniCPM as a hub folder, or read in place a tensor at a time.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitune.checkpoint.embedded import embedded_default as embedded_default
from minitune.config import UserError

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader
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
# Not weights: what a rotary embedding's frequencies are divided by.
ROPE_FACTORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")
ARCHITECTURES = ("llama", "granite", "minicpm")
# llama.cpp's own for a MiniCPM file of before these keys existed (minicpm.cpp): MiniCPM-2B's.
OLD_MINICPM = (12.0, 1.4, 256)
RUN = "minitune.run"  # the template that was trained, as YAML


class GgufFile:
    """A GGUF file: its config in the hub's words, and its tensors under the hub's names, one at a time.

    Tensors are read, not mapped, and dequantised to float32, [out, in], q and k in the hub's rotate-half order.
    Raises UserError for another architecture, for tensors that Llama does not have, or a file that is not whole.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.reader = open_reader(path)
        self.config = _config(self.reader, path)
        names = hub_names(self.config["num_hidden_layers"])
        self._at = {names[t.name]: t for t in self.reader.tensors if t.name in names}
        heads, kv_heads = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        self._paired = {"q_proj.weight": heads, "k_proj.weight": kv_heads}

    def names(self) -> list[str]:
        """Hub names in the file's order."""
        return list(self._at)

    def kind(self, name: str) -> str:
        """The stored type: F16, Q8_0, Q4_K, …"""
        return self._at[name].tensor_type.name

    def get(self, name: str) -> Tensor:
        return self.rows(name, 0, None)

    def rows(self, name: str, start: int, end: int | None) -> Tensor:
        """float32 rows [start, end) of a tensor; of q and k only all of them."""
        import numpy as np
        import torch

        heads = self._paired.get(name.rpartition("self_attn.")[2])
        assert heads is None or (start == 0 and end is None), name
        weight = self._read(name, start, end)
        if heads is not None:
            weight = _unpermute(weight, heads)
        return torch.from_numpy(np.ascontiguousarray(weight, dtype=np.float32))

    def _read(self, name: str, start: int, end: int | None) -> np.ndarray:
        import numpy as np
        from gguf.quants import dequantize

        tensor = self._at[name]
        shape = tensor.data.shape  # of stored elements or, where blocks are packed, of bytes
        width = int(np.prod(shape[1:])) * tensor.data.itemsize
        end = shape[0] if end is None else min(end, shape[0])
        with open(self.path, "rb") as file:
            file.seek(tensor.data_offset + start * width)
            stored = np.fromfile(file, tensor.data.dtype, (end - start) * width // tensor.data.itemsize)
        try:
            return dequantize(stored.reshape(end - start, *shape[1:]), tensor.tensor_type)
        except NotImplementedError:
            kind = tensor.tensor_type.name
            raise UserError(f"{self.path}: {tensor.name} is {kind}, which gguf cannot decode; use Q8_0") from None


def read_gguf(path: str | Path) -> tuple[dict[str, Any], Iterator[tuple[str, Tensor]]]:
    """A GGUF file as (the hub's config.json, its tensors one by one, float32), see `GgufFile`.

    `lm_head.weight` is absent where the embedding is tied.
    """
    file = GgufFile(path)
    return file.config, ((name, file.get(name)) for name in file.names())


def open_reader(path: str | Path) -> GGUFReader:
    """The library's reader, which maps the file; UserError for a file that is not whole."""
    from numpy import ndarray

    try:
        from gguf import GGUFReader
    except ImportError:
        raise UserError(f"{path}: reading a GGUF needs a package: pip install 'minitune[gguf]'") from None

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


def value(reader: GGUFReader, key: str, default: Any = None) -> Any:
    """A metadata value; `default` where the key is absent."""
    field = reader.get_field(key)
    return default if field is None else field.contents()


def _plain(number: float) -> float:
    """The metadata holds float32: 1e-5 reads as 9.9999997e-06. The shortest decimal is what was meant."""
    import numpy as np

    return float(str(np.float32(number)))


def _config(reader: GGUFReader, path: str | Path) -> dict[str, Any]:
    arch = value(reader, "general.architecture")
    if arch not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UserError(f"{path}: a GGUF of architecture {arch!r}; read are {known} (use the hub folder)")

    def need(key: str) -> Any:
        found = value(reader, f"{arch}.{key}")
        if found is None:
            raise UserError(f"{path}: {arch}.{key} is missing from the metadata; convert the file again")
        return found

    hidden, heads = need("embedding_length"), need("attention.head_count")
    kv_heads = value(reader, f"{arch}.attention.head_count_kv", heads)
    if not isinstance(heads, int) or not isinstance(kv_heads, int):
        raise UserError(f"{path}: head counts that differ by layer are not read; use a plain Llama")
    head_dim = value(reader, f"{arch}.attention.key_length", hidden // heads)
    plain = {
        "experts": not value(reader, f"{arch}.expert_count", 0),
        "partial rotary": value(reader, f"{arch}.rope.dimension_count", head_dim) == head_dim,
        "values of another width than keys": value(reader, f"{arch}.attention.value_length", head_dim) == head_dim,
    }
    for what, absent in plain.items():
        if not absent:
            raise UserError(f"{path}: {what} in a GGUF is not read; use the model's hub folder")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    _check_names(tensors, need("block_count"), path)
    config = {
        "architectures": ["LlamaForCausalLM" if arch == "llama" else "GraniteForCausalLM"],
        "model_type": "llama" if arch == "llama" else "granite",
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),  # GGUF lists the innermost axis first
        "hidden_size": hidden,
        "intermediate_size": need("feed_forward_length"),
        "num_hidden_layers": need("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": _plain(need("attention.layer_norm_rms_epsilon")),
        "rope_theta": _plain(value(reader, f"{arch}.rope.freq_base", 10000.0)),
        "max_position_embeddings": need("context_length"),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": value(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": value(reader, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": value(reader, "tokenizer.ggml.padding_token_id"),
        "torch_dtype": "float32",
    }
    if scaling := _rope_scaling(reader, arch, tensors, config, path):
        config["rope_scaling"] = scaling
    return config if arch == "llama" else config | _scalars(reader, arch, config)


def _scalars(reader: GGUFReader, arch: str, config: dict[str, Any]) -> dict[str, float]:
    """Granite's four, which MiniCPM's files name alike."""
    embed, depth, base = OLD_MINICPM
    layers, hidden = config["num_hidden_layers"], config["hidden_size"]
    old = (embed, depth / layers**0.5, hidden / base) if arch == "minicpm" else (1.0, 1.0, 1.0)
    names = ("embedding_multiplier", "residual_multiplier", "logits_scaling")
    keys = ("embedding_scale", "residual_scale", "logit_scale")
    out = {n: _plain(value(reader, f"{arch}.{k}", o)) for n, k, o in zip(names, keys, old, strict=True)}
    attention = value(reader, f"{arch}.attention.scale", 0.0)
    return out | {"attention_multiplier": _plain(attention) if attention else config["head_dim"] ** -0.5}


def _rope_scaling(
    reader: GGUFReader, arch: str, tensors: dict[str, Any], config: dict[str, Any], path: str | Path
) -> dict[str, Any] | None:
    """The hub's `rope_scaling`. Llama 3's comes as what its frequencies are divided by: a LongRoPE of one length."""
    kind = value(reader, f"{arch}.rope.scaling.type", "none")
    short, long = (tensors.get(ROPE_FACTORS[i]) for i in (1, 2))
    if short is not None and long is not None:
        original = value(reader, f"{arch}.rope.scaling.original_context_length", config["max_position_embeddings"])
        factor = value(reader, f"{arch}.rope.scaling.attn_factor", 1.0)
        return _longrope(short.data, long.data, original, _plain(factor))
    if kind == "linear":
        return {"rope_type": "linear", "factor": _plain(value(reader, f"{arch}.rope.scaling.factor", 1.0))}
    if kind != "none":
        raise UserError(f"{path}: rope scaling {kind!r} in a GGUF is not read; use the model's hub folder")
    if (freqs := tensors.get(ROPE_FACTORS[0])) is not None:
        return _longrope(freqs.data, freqs.data, config["max_position_embeddings"], 1.0)
    return None


def _longrope(short: Any, long: Any, original: int, attention_factor: float) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "short_factor": [_plain(x) for x in short.ravel()],
        "long_factor": [_plain(x) for x in long.ravel()],
        "original_max_position_embeddings": original,
        "attention_factor": attention_factor,
    }


def hub_names(layers: int) -> dict[str, str]:
    """{GGUF name: hub name} of a model of so many layers."""
    names = dict(TOP_NAMES)
    for i in range(layers):
        names.update({f"blk.{i}.{ours}": f"model.layers.{i}.{hub}" for ours, hub in LAYER_NAMES.items()})
    return names


def _check_names(tensors: dict[str, Any], layers: int, path: str | Path) -> None:
    names = hub_names(layers)
    for name in tensors:
        if name not in names and name not in ROPE_FACTORS:
            raise UserError(f"{path}: tensor {name} is not one of a plain Llama; use the model's hub folder")
    for name in names:
        if name not in tensors and name != "output.weight":
            raise UserError(f"{path}: tensor {name} is missing; download or convert the file again")


def _unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """GGUF rotates neighbours (rows 2i, 2i+1 of a head), the hub rotates halves (rows i, i + D/2)."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


# ---- the folder


def convert(path: str | Path, folder: Path) -> None:
    """Writes the GGUF file `path` into the empty `folder` in the hub's layout, in float32.

    The peak is one copy of the weights: safetensors writes from where they lie. OSError on a full disk.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from minitune.checkpoint.gguf_folder import describe

    file = describe(path, folder)
    try:
        save_file({n: file.get(n) for n in file.names()}, folder / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(str(error)) from None
    (folder / "model.safetensors").chmod(0o644)  # safetensors makes it 0600
