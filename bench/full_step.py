"""A step in which every parameter learns, on one card at MiniCPM-2B's shape (tied), in each of the three optimizers.

    python bench/full_step.py [--sides adamw_8bit_in_backward] [--tokens 0,8192] [--whole 40] [--steps 60] [--profile]

Random weights and random ids in rows of the real data's lengths, 16 rows a step or so many `--tokens` a step (several:
one after the other; 0: 16 rows). Each side is a process of its own, made by the same calls as a run's: `--optim NAME`.
`--whole`: layers that keep their activations (several: one after the other); the others are computed again. Reported:
as in lora_step.py. The rate is 1e-5; losses of the first step agree between the sides, later ones nearly.

adamw                   float32 masters and moments, by torch
adamw_8bit              moments of 8 bits, a gradient buffer in bf16, the exact global norm
adamw_8bit_in_backward  the same inside backward: no gradient buffer, each clipped by itself
plain                   minitune's plain layers and step with adamw, captured
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from lora_step import LENGTHS, our_decoder, rows_of, timed
from sides import give, take

SIDES = ("adamw", "adamw_8bit", "adamw_8bit_in_backward")


def side_of(arguments: argparse.Namespace, optim: str) -> dict[str, Any]:
    from minitune.config import TrainConfig
    from minitune.data.store import EncodedRows
    from minitune.data.template import Encoded
    from minitune.train import fast
    from minitune.train.full import equip
    from minitune.train.steps import make_loader

    began = time.perf_counter()
    fast.settle_memory(sparing=arguments.whole < arguments.layers)
    decoder = our_decoder(arguments, by_hand=False)
    config = TrainConfig(
        method="full", optim="adamw" if optim == "plain" else optim, tokens_per_step=arguments.tokens,
        tokens_per_pack=max(8192, arguments.tokens), seed=1, gradient_checkpointing="false",
    )  # fmt: skip
    rows = EncodedRows.of([Encoded(ids, labels) for ids, labels in rows_of(arguments)])
    _, plain = equip(config, decoder, arguments.whole, by_hand=optim != "plain")
    if arguments.alone and plain.stack is not None:
        plain.stack.beside.stream = None
    loader = make_loader(config, rows, decoder.device)
    per_epoch = [len(loader.steps(0))]
    count = min(arguments.steps, per_epoch[0])
    step, said = fast.quicken(plain, loader, per_epoch, count)
    batches = [loader.batch(0, i) for i in range(count)]
    torch.cuda.synchronize()
    return timed(step, batches, 1e-5, time.perf_counter() - began, said, optim if arguments.profile else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", default=",".join(SIDES))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--tokens", default="0", help="tokens a step instead of 16 rows (0), commas between several")
    parser.add_argument("--whole", default="40", help="layers that keep their activations, commas between several")
    parser.add_argument("--alone", action="store_true", help="weights' gradients and updates on the one stream")
    parser.add_argument("--vocab", type=int, default=122753)
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--lengths", default=str(LENGTHS))
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        side, tokens, whole = arguments.side.split(":")
        arguments.tokens, arguments.whole = int(tokens), int(whole)
        give(side_of(arguments, side))
        return
    for tokens in arguments.tokens.split(","):
        for side in arguments.sides.split(","):
            for whole in arguments.whole.split(","):
                take(f"{side}:{tokens}:{whole}", quiet=False)


if __name__ == "__main__":
    main()
