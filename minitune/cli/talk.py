"""`minitune chat` and `minitune serve`: talking to a model, and letting others."""

from __future__ import annotations

import argparse
from typing import Any

from minitune.cli.parser import MODEL, accept, declare_config, declare_settings, texts_named, translated
from minitune.config import build, flat_fields


def declare_chat(parser: argparse.ArgumentParser) -> None:
    from minitune.foreign import tables

    unset: dict[str, Any] = {"default": argparse.SUPPRESS}
    parser.add_argument("--model", help=f"{MODEL}; with --adapter, its base by default", **unset)
    parser.add_argument("--adapter", "--adapter_name_or_path", help="a folder that `minitune train` wrote", **unset)
    parser.add_argument("--prompt", metavar="TEXT", help="answer this and leave, for scripts", **unset)
    parser.add_argument("--system", metavar="TEXT", help="a system text", **unset)
    parser.add_argument("--dtype", help="auto, float32, bfloat16, float16 [auto]", **unset)
    parser.add_argument("--device", help="auto, cuda, cpu [auto]", **unset)
    declare_config(parser)
    declare_sampling(parser)
    accept(parser, ["model_name_or_path", *tables.CHAT])


def declare_sampling(parser: argparse.ArgumentParser) -> None:
    from minitune.infer.sampling import Sampling

    declare_settings(parser, Sampling, "sampling")


def sampling_of(values: dict[str, Any]) -> Any:
    """Takes the sampling's settings out of `values`."""
    from minitune.infer.sampling import Sampling

    return build(Sampling, {name: values.pop(name) for name in flat_fields(Sampling) if name in values}, "sampling")


def call_chat(values: dict[str, Any]) -> int:
    from minitune.infer import chat
    from minitune.infer.sampling import Sampling

    texts = texts_named("model", "adapter", "prompt", "system", "dtype", "device")
    values = translated(values, texts | flat_fields(Sampling), "chat")
    return chat.main(sampling=sampling_of(values), **values)


def declare_serve(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", "--model_name_or_path", help=f"{MODEL}; with --adapter, its base by default")
    parser.add_argument(
        "--adapter",
        "--adapter_name_or_path",
        action="append",
        default=[],
        metavar="[NAME=]DIR",
        help="a folder that `minitune train` wrote, under its own name or NAME; may be given several times",
    )
    parser.add_argument("--served_model_name", metavar="NAME", help="what the base is called [its name or folder]")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0: every address of this machine [127.0.0.1]")
    parser.add_argument("--port", type=int, default=8000, help="0: any free one [8000]")
    parser.add_argument("--api_key", metavar="KEY", help="asked of every client; other users of this machine see it")
    parser.add_argument("--api_key_file", metavar="FILE", help="a key a line; or set MINITUNE_API_KEY")
    parser.add_argument(
        "--cors", action="append", default=[], metavar="ORIGIN", help="another site whose pages may ask; *: every site"
    )
    parser.add_argument("--slots", type=int, default=0, help="answers at once [as many as memory allows]")
    parser.add_argument("--cache_tokens", type=int, default=0, help="keys and values kept [as memory allows]")
    parser.add_argument("--max_queue", type=int, default=256, help="answers that may wait; more get 429 [256]")
    declare_sampling(parser)
    parser.add_argument("--log_requests", action="store_true", help="a line on stderr for each request")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16, float16")
    parser.add_argument("--device", default="auto", help="auto, cuda, cpu")


def call_serve(values: dict[str, Any]) -> int:
    from minitune.infer import serve

    return serve.main(sampling=sampling_of(values), **values)
