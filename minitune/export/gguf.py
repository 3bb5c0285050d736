"""A GGUF file for llama.cpp, Ollama and phones: weights, scalings, tokenizer, chat template and end tokens.

A Llama is `llama`; a Granite is `granite` and a MiniCPM `minicpm`, which in llama.cpp are one graph with the same
four scalars. q and k are stored with the rows of a rotated pair side by side. Norms stay float32. A weight is formed
in float32, the adapter's part added, and rounded once, some rows at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minitune.checkpoint.gguf import ROPE_FACTORS, RUN, hub_names
from minitune.checkpoint.weights import EMBED, HEAD
from minitune.config import UserError
from minitune.export import vocabulary
from minitune.export.hf import Beside, stop_ids
from minitune.export.report import Report
from minitune.export.source import Source

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

    from minitune.model.decoder import DecoderConfig

ARCHITECTURES = {"LlamaForCausalLM": "llama", "GraniteForCausalLM": "granite", "MiniCPMForCausalLM": "minicpm"}
K_QUANTS = ("q4_k_m", "q5_k_m", "q6_k")
QUANTS = ("f16", "q8_0", "q4_0", *K_QUANTS)
# By which bounds of `verify.LIMITS` each is judged.
LIMITS = {"f16": "float16", "q8_0": "q8_0", "q4_0": "4 bits", "q4_k_m": "4 bits", "q5_k_m": "6 bits", "q6_k": "6 bits"}
PIECE = 1 << 24  # weights in float32 at a time
BLOCK = 32  # weights that share a scale in Q8_0 and Q4_0


def write(file: Path, source: Source, beside: Beside, hub: dict[str, Any], report: Report, *, quant: str) -> None:
    """Writes `file`. hub: the base's config.json. UserError for what GGUF or llama.cpp can't hold."""
    if quant in K_QUANTS:
        from minitune.export import kquant

        plain = file.with_name("f16.gguf")
        write(plain, source, beside, hub, report, quant="f16")
        kquant.quantize(plain, file, quant, report)
        plain.unlink()
        report.dtype, report.bytes = quant, file.stat().st_size
        return
    writer = _writer(file, source.decoder.config)
    _shape(writer, source.decoder.config)
    _tokenizer(writer, source, beside, hub, report)
    _general(writer, report, quant)
    report.architecture, report.dtype = f"GGUF {writer.arch}", quant
    tensors = _layout(source, quant, report)
    extra = list(_rope_factors(source.decoder.config))
    if source.decoder.config.rope().kind == "longrope":
        original = source.decoder.config.rope().original_max
        report.notes.append(
            f"LongRoPE: llama.cpp takes the long factors for any text once its context is set above {original} tokens"
        )
    for name, shape, kind, bytes_ in tensors:
        writer.add_tensor_info(name, shape, _numpy_float32(), bytes_, raw_dtype=kind)
    for name, factors in extra:
        writer.add_tensor_info(name, factors.shape, factors.dtype, factors.nbytes)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None
        out = writer.fout[0]
        hub_of = hub_names(source.decoder.config.num_hidden_layers)
        for name, _, kind, bytes_ in tensors:
            writer.write_padding(out, out.tell())
            start = out.tell()
            for piece in _pieces(source, hub_of[name]):
                out.write(memoryview(_encode(piece, kind)).cast("B"))  # numpy's tofile hides a full disk's number
            assert out.tell() - start == bytes_, name
            report.merged += source.is_merged(hub_of[name])
        for _, factors in extra:
            writer.write_padding(out, out.tell())
            out.write(factors.tobytes())
        writer.write_padding(out, out.tell())
    finally:
        writer.close()
    report.tensors, report.bytes = len(tensors) + len(extra), file.stat().st_size


def _writer(file: Path, config: DecoderConfig) -> GGUFWriter:
    try:
        from gguf import GGUFWriter
    except ImportError:
        raise UserError("--format gguf needs a package: pip install 'minitune[gguf]'") from None
    scalars = (config.embedding_multiplier, config.residual_multiplier, config.logits_scaling)
    arch = ARCHITECTURES[config.family]
    if arch == "minicpm" and scalars == (1.0, 1.0, 1.0):
        arch = "llama"
    return GGUFWriter(file, arch)


def _numpy_float32() -> Any:
    import numpy as np

    return np.dtype(np.float32)


# The metadata


def _shape(writer: GGUFWriter, config: DecoderConfig) -> None:
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    if writer.arch != "llama":
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    if writer.arch == "granite":
        writer.add_attention_scale(config.attention_scale)
    _rope(writer, config)


def _rope(writer: GGUFWriter, config: DecoderConfig) -> None:
    from gguf import RopeScalingType

    rope = config.rope()
    if rope.kind == "dynamic":
        raise UserError("rope_scaling is dynamic, which llama.cpp does not compute; use --format hf")
    if rope.kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope.scaling["factor"]))
    if rope.kind == "longrope":
        writer.add_rope_scaling_type(RopeScalingType.LONGROPE)
        writer.add_rope_scaling_orig_ctx_len(rope.original_max)
        writer.add_rope_scaling_attn_factors(rope.amplitude)


def _rope_factors(config: DecoderConfig) -> Iterator[tuple[str, Any]]:
    """(GGUF name, float32): what the frequencies are divided by; Llama 3's, or LongRoPE's two."""
    import numpy as np

    rope = config.rope()
    if rope.kind == "llama3":
        plain = rope.theta ** (-torch.arange(0, rope.head_dim, 2, dtype=torch.float64) / rope.head_dim)
        yield ROPE_FACTORS[0], (plain / _llama3(plain, rope.scaling)).float().numpy()
    if rope.kind == "longrope":
        for name, key in ((ROPE_FACTORS[1], "short_factor"), (ROPE_FACTORS[2], "long_factor")):
            yield name, np.array(rope.scaling[key], np.float32)


def _llama3(inv: Tensor, scaling: dict[str, Any]) -> Tensor:
    """Llama 3.1's frequencies: long wavelengths divided by `factor`, short ones kept, a ramp between."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * inv / (2 * math.pi)
    ramp = ((turns - low) / (high - low)).clamp(0, 1)
    return inv / scaling["factor"] * (1 - ramp) + inv * ramp


def _general(writer: GGUFWriter, report: Report, quant: str) -> None:
    from gguf import GGML_QUANT_VERSION, GGUFType, LlamaFileType

    kind = {"f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0", "q4_0": "MOSTLY_Q4_0"}[quant]
    writer.add_type(GGUFType.MODEL)
    writer.add_name(report.output.stem)
    writer.add_file_type(LlamaFileType[kind])
    writer.add_quantization_version(GGML_QUANT_VERSION)


def _tokenizer(writer: GGUFWriter, source: Source, beside: Beside, hub: dict[str, Any], report: Report) -> None:
    """The vocabulary, the special tokens, what is added in front, the chat template and what was trained."""
    import yaml

    tokenizer, template = beside.tokenizer, beside.template
    if beside.home is None:
        folder = source.shards.folder
        raise UserError(
            f"{folder}: has no tokenizer, which a GGUF file holds; put the model's own tokenizer.json there"
        )
    vocab = vocabulary.read(beside.home, tokenizer)
    vocab.fit(source.decoder.config.vocab_size, beside.home)
    if vocab.note:
        report.notes.append(vocab.note)
    writer.add_tokenizer_model(vocab.model)
    writer.add_tokenizer_pre(vocab.pre)
    writer.add_token_list(vocab.tokens)
    writer.add_token_types(vocab.kinds)
    if vocab.scores is not None:
        writer.add_token_scores(vocab.scores)
    if vocab.merges is not None:
        writer.add_token_merges(vocab.merges)
    if vocab.space_prefix is not None:
        writer.add_add_space_prefix(vocab.space_prefix)
    _specials(writer, tokenizer, stop_ids(hub, template), report)
    writer.add_add_bos_token(_adds_bos(tokenizer, template))
    writer.add_add_eos_token(False)
    if template is not None:
        writer.add_chat_template(template.chat_template())
        if template.tuned:
            settings = {k: getattr(template.config, k) for k in ("name", "bos", "strip", "join")}
            writer.add_string(RUN, yaml.safe_dump({"template": settings}, allow_unicode=True))


def _specials(writer: GGUFWriter, tokenizer: Any, stops: list[int], report: Report) -> None:
    """BOS, unknown and padding; up to three tokens that end an answer."""
    for name, add in (
        ("bos", writer.add_bos_token_id),
        ("unk", writer.add_unk_token_id),
        ("pad", writer.add_pad_token_id),
    ):
        if getattr(tokenizer, f"{name}_token_id", None) is not None:
            add(getattr(tokenizer, f"{name}_token_id"))
    places = (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id)
    for add, i in zip(places, stops, strict=False):
        add(i)
    if left := stops[len(places) :]:
        report.notes.append(f"a GGUF names three tokens that end an answer; also given were {left}")


def _adds_bos(tokenizer: Any, template: Any) -> bool:
    """Whether llama.cpp should put BOS in front: as the tokenizer does, if a prompt was trained so; and as MiniCPM's
    template was set. (llama.cpp drops the BOS that a chat template writes where it adds one itself.)"""
    from minitune.data.forms import Message

    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is None:
        return False
    if template is not None and template.config.name == "minicpm":
        return template.config.bos
    habit = tokenizer("a")["input_ids"][:1] == [bos]
    return habit and (template is None or template.prompt_ids([Message("user", "a")])[:1] == [bos])


# The tensors


def _layout(source: Source, quant: str, report: Report) -> list[tuple[str, tuple[int, ...], GGMLQuantizationType, int]]:
    """(GGUF name, shape, type, bytes) of each tensor, embedding first, then by layer."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    wanted = {"f16": GGMLQuantizationType.F16, "q8_0": GGMLQuantizationType.Q8_0, "q4_0": GGMLQuantizationType.Q4_0}
    out, left = [], 0
    for name, hub in hub_names(source.decoder.config.num_hidden_layers).items():
        if hub not in source.shapes:  # a tied head
            continue
        shape = tuple(source.shapes[hub])
        kind = wanted[quant] if len(shape) > 1 else GGMLQuantizationType.F32
        if kind == GGMLQuantizationType.Q4_0 and hub in (EMBED, HEAD):
            kind = GGMLQuantizationType.Q8_0  # the vocabulary's rows lose most; llama.cpp keeps them finer too
        if len(shape) > 1 and quant != "f16" and shape[1] % BLOCK:
            kind, left = GGMLQuantizationType.F16, left + 1
        per_block, block_bytes = GGML_QUANT_SIZES[kind]
        out.append((name, shape, kind, math.prod(shape) // per_block * block_bytes))
    if left:
        report.notes.append(f"{left} tensors have rows that are no multiple of {BLOCK} weights: f16 there")
    if quant == "q4_0":
        report.notes.append("q4_0: the embedding and the head are q8_0")
    return out


def _pieces(source: Source, name: str) -> Iterator[Tensor]:
    """The tensor in float32, some rows at a time, q and k in llama.cpp's order."""
    config, shape = source.decoder.config, source.shapes[name]
    heads = {"q_proj.weight": config.num_attention_heads, "k_proj.weight": config.num_key_value_heads}
    own = heads.get(name.rpartition("self_attn.")[2])
    if source.is_merged(name) or own is not None or len(shape) == 1:
        tensor = source.merged(name).float()
        yield tensor if own is None else paired(tensor, own)
        return
    step = max(1, PIECE // shape[1])
    for start in range(0, shape[0], step):
        yield source.rows(name, start, start + step).float()


def paired(weight_OI: Tensor, heads: int) -> Tensor:
    """Rows i and i + D/2 of a head, which rotate together, as rows 2i and 2i + 1."""
    rows, columns = weight_OI.shape
    return weight_OI.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def _encode(piece: Tensor, kind: GGMLQuantizationType) -> Any:
    from gguf.quants import quantize

    return quantize(piece.contiguous().numpy(), kind)
