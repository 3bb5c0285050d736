"""`minitune export`."""

from __future__ import annotations

import argparse
from typing import Any

from minitune.cli.parser import MODEL, accept, declare_config, texts_named, translated
from minitune.config import UserError

QUANT = "hf: int4 (vLLM, transformers); gguf: f16, q8_0, q4_0, or through llama.cpp q4_k_m, q5_k_m, q6_k [gguf: f16]"
FORMAT = "hf: what stock transformers and vLLM open; minicpm: MiniCPM's own layout; gguf: llama.cpp, Ollama [hf]"
SETTINGS = ("model", "adapter", "format", "quant", "output", "dtype", "verify", "verify_data")


def declare_export(parser: argparse.ArgumentParser) -> None:
    from minitune.foreign import tables

    base = f"{MODEL}; with --adapter, its base by default"
    unset: dict[str, Any] = {"default": argparse.SUPPRESS}  # so that a file's values count under the flags'
    parser.add_argument("--model", "--model_name_or_path", help=base, **unset)
    parser.add_argument("--adapter", "--adapter_name_or_path", help="merged into the weights", **unset)
    parser.add_argument("--format", choices=("hf", "minicpm", "gguf"), help=FORMAT, **unset)
    parser.add_argument("--quant", metavar="KIND", help=QUANT, **unset)
    parser.add_argument("--output", "--output_dir", help="a new folder; gguf: a folder or a file.gguf", **unset)
    parser.add_argument("--dtype", help="auto (as the base is), float32, bfloat16, float16", **unset)
    parser.add_argument(
        "--verify",
        nargs="?",
        const="true",
        metavar="true|false",
        help="read it again and compare with the model that was trained; an error where it is another [true]",
        **unset,
    )
    parser.add_argument("--verify_data", metavar="FILE", help="compare on these rows, not on built-in prompts", **unset)
    declare_config(parser)
    accept(parser, [*tables.EXPORT])


def call_export(values: dict[str, Any]) -> int:
    values = translated(values, texts_named(*SETTINGS), "export")
    if not values.get("output"):
        raise UserError("export: --output is missing")
    verify = str(values.pop("verify", "true")).lower()
    if verify not in ("true", "false"):
        raise UserError(f"--verify is {verify!r}; it takes true, false")
    from minitune.export import export
    from minitune.infer.chat import which

    values["model"], values["adapter"] = which(values.get("model"), values.get("adapter"))
    settings: dict[str, Any] = {"format": "hf", "verify": verify == "true"} | values
    export(**settings)
    return 0
