"""Hub layout <-> our parameters, both ways, strict. A few tensors at a time; no checkpoint code is run.

4-bit weights of compressed-tensors (`model.quantized`) are read through the same names.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from minitune.checkpoint import filling
from minitune.checkpoint.shards import Shards, read_json
from minitune.config import UserError
from minitune.model import four_bits, kernels
from minitune.model.decoder import Decoder, DecoderConfig, Layer
from minitune.model.quantized import Int4Linear, group_of, packed_linears, quantize_linears

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def read_config(folder: str | Path) -> DecoderConfig:
    """The decoder's shape from `config.json`; UserError for an architecture that is not supported."""
    path = Path(folder) / "config.json"
    try:
        return DecoderConfig.from_hub(read_json(path))
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def choose_device(device: str = "auto") -> torch.device:
    """`auto`: the card where there is one, else the CPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise UserError(f"device {device!r}: give cuda, cuda:1 or cpu") from None
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device {device!r}: this machine has no usable card; give --device cpu")
    return chosen


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """`auto`: bfloat16 on cards that multiply it (float16 on older ones), float32 on the CPU."""
    if dtype == "auto":
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if kernels.ampere(device) else torch.float16
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r}: give auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def hub_places(decoder: Decoder) -> dict[str, tuple[Tensor, slice | None]]:
    """{hub name: (our tensor, the rows of it that hold it; None: all)}: the one mapping, used both ways."""
    out: dict[str, tuple[Tensor, slice | None]] = {EMBED: (decoder.embed.weight, None)}
    out["model.norm.weight"] = decoder.norm.weight, None
    if decoder.lm_head is not None:
        out[HEAD] = decoder.lm_head.weight, None
    for i, layer in enumerate(decoder.layers):
        assert isinstance(layer, Layer)
        out[f"model.layers.{i}.input_layernorm.weight"] = layer.attn_norm.weight, None
        out[f"model.layers.{i}.post_attention_layernorm.weight"] = layer.mlp_norm.weight, None
    for linear in decoder.linears():
        for name, start, end in linear.parts:
            hub, rows = f"{linear.hub_name(name)}.weight", slice(start, end)
            if isinstance(linear, Int4Linear):
                out[f"{hub}_packed"], out[f"{hub}_scale"] = (linear.weight_packed, rows), (linear.weight_scale, rows)
            else:
                out[hub] = linear.weight, rows
    return out


def hub_parameters(decoder: Decoder) -> dict[str, Tensor]:
    """{hub name: our tensor, or the rows of the fused one that hold it}."""
    return {name: t if rows is None else t[rows] for name, (t, rows) in hub_places(decoder).items()}


def _resolve_tie(config: DecoderConfig, shards: Shards) -> DecoderConfig:
    """A head in the file that differs from the embedding wins over `tie_word_embeddings`, and is said."""
    if not config.tie_word_embeddings or HEAD not in shards.where or EMBED not in shards.where:
        return config
    head, embed = shards.get(HEAD), shards.get(EMBED)
    step = 8192
    if head.shape == embed.shape and all(
        torch.equal(head[i : i + step], embed[i : i + step]) for i in range(0, head.shape[0], step)
    ):
        return config
    print(f"{shards.folder}: lm_head.weight differs from the embedding: loaded untied", file=sys.stderr)
    return config.untied()


def _check_names(shards: Shards, wanted: dict[str, Tensor], tied: bool) -> None:
    have = {n for n in shards.where if not n.endswith(("rotary_emb.inv_freq", ".weight_shape"))}
    if tied:
        have.discard(HEAD)
    for kind, names in (
        ("is missing", wanted.keys() - have),
        ("is not part of this architecture", have - wanted.keys()),
    ):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise UserError(f"{shards.folder}: tensor {min(names)} {kind}{more}")


def int4_group(folder: Path) -> int:
    """The group size of a folder's 4-bit weights, 0 where they have more bits; UserError for another form."""
    path = folder / "config.json"
    try:
        return group_of(read_json(path)) or 0
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def skeleton(shards: Shards) -> Decoder:
    """The decoder of the folder of `shards` on `meta`: its shapes and checked names, no memory, no values."""
    config = read_config(shards.folder)
    with torch.device("meta"):
        decoder = Decoder(_resolve_tie(config, shards))
    if group := int4_group(shards.folder):
        quantize_linears(decoder, group)
    wanted = hub_parameters(decoder)
    _check_names(shards, wanted, decoder.config.tie_word_embeddings)
    for name in wanted:
        shards.entry(name, wanted[name].shape)
    return decoder


def load_decoder(
    folder: str | Path,
    dtype: str = "auto",
    device: str = "auto",
    strips: Callable[[Decoder], dict[str, int]] | None = None,
    group: int = 0,
) -> Decoder:
    """The decoder of a hub folder, its parameters frozen. strips: what to widen (`Decoder.allocate`), told from the
    empty decoder. group: rounds the layers' linears to 4 bits in groups of so many (`four_bits`); 0 does not.

    Tensors are cast and copied piece by piece into their fused places, so that neither a second copy of the model nor a
    float32 copy of a float32 checkpoint exists.
    """
    with Shards(folder) as shards:
        empty = skeleton(shards)
        return filled(shards, four_bits.make_room(empty, group) if group else empty, dtype, device, strips)


@torch.no_grad()
def filled(
    shards: Shards,
    decoder: Decoder,
    dtype: str,
    device: str,
    strips: Callable[[Decoder], dict[str, int]] | None,
    stopped: Callable[[], bool] = lambda: False,
) -> Decoder:
    """The `skeleton` of `shards` with memory and values; see `load_decoder`. stopped: see `filling.fill`."""
    place = choose_device(device)
    decoder.allocate(place, choose_dtype(dtype, place), strips(decoder) if strips else None)
    wanted: dict[str, filling.Place] = {**hub_parameters(decoder), **rounding(decoder)}
    at_once: list[tuple[filling.Entry, filling.Place]] = []
    for name in shards.names():
        if name in wanted:
            if stopped():
                raise filling.Abandoned
            if entry := shards.entry(name, wanted[name].shape):
                at_once.append((entry, wanted[name]))
            else:
                wanted[name].copy_(shards.get(name, wanted[name].shape))
    filling.fill(at_once, stopped)
    return decoder.eval()


def rounding(decoder: Decoder) -> dict[str, four_bits.Rounding]:
    """{hub name of a linear's weight: what keeps it in 4 bits}, where weights of 16 bits are to be rounded."""
    out = {}
    for linear in packed_linears(decoder) if decoder.rounded else ():
        for name, start, end in linear.parts:
            packed, scale = linear.weight_packed[start:end], linear.weight_scale[start:end]
            out[f"{linear.hub_name(name)}.weight"] = four_bits.Rounding(packed, scale)
    return out


def load_model(
    folder: str | Path, adapter: str | Path | None = None, dtype: str = "auto", device: str = "auto"
) -> Decoder:
    """The decoder of `folder` (a folder, a hub name, or smollm2), with a PEFT adapter attached where one is given.

    dtype, device: `auto` takes the card and bfloat16 where there is one, else the CPU and float32. A base that had 4
    bits while the adapter was trained has the same 4 bits here.
    Raises UserError, one line, for anything that is missing, misshapen or not supported.
    """
    from minitune.checkpoint import adapter as adapters
    from minitune.checkpoint import hub

    group = adapters.base_group(adapter) if adapter is not None else 0
    decoder = load_decoder(hub.resolve(str(folder)), dtype, device, group=group)
    if adapter is not None:
        adapters.load_adapter(decoder, adapter)
    return decoder


def hub_tensors(decoder: Decoder, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """(hub name, tensor) of every parameter, in `dtype` where one is given; a tied head is left out."""
    for name, tensor in hub_parameters(decoder).items():
        yield name, tensor.detach().to(dtype or decoder.dtype)
