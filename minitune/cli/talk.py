"""`minitune chat`: talking to a model."""

from __future__ import annotations

import argparse
from typing import Any

from minitune.cli.parser import MODEL


def declare_chat(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", "--model_name_or_path", help=f"{MODEL}; with --adapter, its base by default")
    parser.add_argument("--adapter", "--adapter_name_or_path", help="a folder that `minitune train` wrote")
    parser.add_argument("--prompt", help="answer this and leave, for scripts")
    parser.add_argument("--system", help="a system text")
    for name, text in (
        ("temperature", "0: always the likeliest token"),
        ("top_p", "nucleus"),
        ("top_k", "the k likeliest"),
        ("min_p", "relative to the likeliest"),
        ("repetition_penalty", "1: none"),
    ):
        parser.add_argument(f"--{name}", type=float, default=argparse.SUPPRESS, help=text)
    parser.add_argument("--max_new_tokens", type=int, default=argparse.SUPPRESS, help="tokens an answer at most")
    parser.add_argument("--seed", type=int, default=argparse.SUPPRESS, help="the same seed gives the same answer")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16, float16")
    parser.add_argument("--device", default="auto", help="auto, cuda, cpu")


def call_chat(values: dict[str, Any]) -> int:
    from minitune.infer import chat
    from minitune.infer.sampling import Sampling

    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens", "seed")
    given = {n: values.pop(n) for n in names if n in values}
    if "top_k" in given:
        given["top_k"] = int(given["top_k"])
    return chat.main(sampling=Sampling(**given), **values)
