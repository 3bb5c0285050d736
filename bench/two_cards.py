"""Two cards of one host beside one, at MiniCPM-2B's shape: as much work a card, twice the work a step.

    python bench/two_cards.py [--sides lora,full] [--cards 1,2] [--tokens 8192] [--steps 20] [--profile]

Random weights made on each card, random ids in rows of the real data's lengths, `--tokens` a card a step. torchrun
starts the processes; the model, its optimizer and its step are made by the calls of a run. Every side has its own
engine and optimizer on one card too:

lora  layers by hand, the step captured; on several cards in two graphs with the gradients' sum between them (r 8 on
      q, k, v, o)
full  FSDP2, layers recomputed, AdamW in 32 bits, plain steps; also where there is one card

Reported for each: milliseconds a step and tokens a second of all cards, nothing waited for between steps but what a run
waits for; the share's tokens by card; memory by card; the losses of the first three steps of twice `--tokens`, which
must agree between one card and two. Where there are several cards: the time of what crosses between them, alone, and
bytes a second of each card's link (for an all-reduce twice (n - 1) / n of its size, for the others once).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from lora_step import LENGTHS, driver_gib, our_decoder, profile, rows_of
from sides import MARK, give

SIDES = ("lora", "full")
EPOCHS = 4


def made(arguments: argparse.Namespace, side: str, team: Any) -> tuple[Any, Any, Any]:
    """(the step, its loader, one of steps of twice `--tokens`)."""
    from minitune.config import TrainConfig
    from minitune.data.store import EncodedRows
    from minitune.data.template import Encoded
    from minitune.train import fast
    from minitune.train.optim import AdamW
    from minitune.train.prepare import equip
    from minitune.train.sharded import Sharded
    from minitune.train.step import TrainStep, recompute_layers
    from minitune.train.steps import make_loader

    fast.settle_memory(sparing=side == "full")
    decoder = our_decoder(arguments, by_hand=side == "lora")
    settings: dict[str, Any] = {"tokens_per_pack": arguments.tokens, "seed": 1, "gradient_checkpointing": "false"}
    config = TrainConfig(tokens_per_step=arguments.tokens * team.size, method=side, **settings)
    twice = TrainConfig(tokens_per_step=arguments.tokens * 2, method=side, **settings)
    rows = EncodedRows.of([Encoded(ids, labels) for ids, labels in rows_of(arguments)])
    loader, whole = (make_loader(one, rows, decoder.device, team=team) for one in (config, twice))
    if side == "lora":
        _, plain = equip(config, decoder, rows, team)
        per_epoch = [len(loader.steps(epoch)) for epoch in range(EPOCHS)]
        return fast.quicken(plain, loader, per_epoch, sum(per_epoch))[0], loader, whole
    if team.size == 1:  # what `equip` would not do with one process
        dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    decoder.requires_grad_(True)
    recompute_layers(decoder)
    sharing = Sharded(team, decoder)
    step = TrainStep(decoder, AdamW(sharing.parameters, config), max_grad_norm=1.0, sharing=sharing)  # type: ignore[arg-type]
    return step, loader, whole


def side_of(arguments: argparse.Namespace, side: str) -> None:
    """The body of a process."""
    from minitune.config import TrainConfig
    from minitune.train.parallel import join

    began = time.perf_counter()
    with join(TrainConfig(device="cuda"), lambda: "nothing is kept") as team:
        team.device("cuda")
        step, loader, whole = made(arguments, side, team)
        # full steps alone: an epoch's last one is short
        places = [(epoch, i) for epoch in range(EPOCHS) for i in range(len(loader.steps(epoch)) - 1)]
        batches = [loader.batch(*place) for place in places[: arguments.steps]]
        total = len(batches)
        rate = 1e-4 if side == "lora" else 1e-5
        losses = [step(whole.batch(0, i), rate).loss for i in range(3)]
        losses = [round(float(loss), 4) for loss in losses]
        for batch in batches[:2]:
            step(batch, rate)
        torch.cuda.synchronize()
        before = time.perf_counter() - began
        team.any(False)
        start = time.perf_counter()
        for batch in batches:
            team.any(False)  # as a run asks whether a person wants to stop
            step(batch, rate)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        team.any(False)
        if arguments.profile and team.first:
            profile(step, batches[:3], f"{side} on {team.size}")
        elif arguments.profile:
            for batch in batches[:3]:
                step(batch, rate)
        own = sum(p.tokens for b in batches for p in b.packs)
        cards = {
            "tokens": round(own / total), "packs": max(len(b.packs) for b in batches),
            "plain": getattr(step, "plain_steps", total),
            "reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 1), "driver_gib": round(driver_gib(), 1),
        }  # fmt: skip
        every = team.all_of(cards)
        links = crossing(step) if team.size > 1 else {}
        if team.first:
            give({
                "side": side, "cards": team.size, "ms": round(1e3 * seconds / total, 1),
                "tokens_per_second": round(sum(b.tokens for b in batches) / seconds), "losses": losses,
                "by_card": every, "seconds_before": round(before, 1), "links": links,
                "device": torch.cuda.get_device_name(),
            })  # fmt: skip


def crossing(step: Any) -> dict[str, tuple[float, float]]:
    """{what: (milliseconds, GB/s of a card's link)} of what the processes exchange, alone."""
    decoder, n = getattr(step, "step", step).decoder, dist.get_world_size()
    device, out = decoder.device, {}
    layer = sum(p.numel() for p in decoder.layers[0].parameters() if "DTensor" in type(p).__name__)
    adapters = sum(p.numel() for p in getattr(step, "step", step).optimizer.parameters) if not layer else 0
    layer = layer // n * n

    def clocked(name: str, call: Callable[[], Any], moved: float) -> None:
        for _ in range(3):
            call()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(10):
            call()
        end.record()
        torch.cuda.synchronize()
        ms = start.elapsed_time(end) / 10
        out[name] = round(ms, 3), round(moved / ms / 1e6, 1)

    share = (n - 1) / n
    big = torch.zeros(2**28, device=device)  # 1 GiB
    clocked("all-reduce of 1 GiB", lambda: dist.all_reduce(big), 2 * share * 2**30)
    if adapters:
        small = big[:adapters]
        what = f"all-reduce of the adapters' gradients, {4 * adapters / 1e6:.0f} MB"
        clocked(what, lambda: dist.all_reduce(small), 2 * share * 4 * adapters)
        return out
    full = torch.zeros(layer, dtype=torch.bfloat16, device=device)
    part = full[: layer // n].clone()
    gather = f"all-gather of a layer, {2 * layer / 1e6:.0f} MB"
    clocked(gather, lambda: dist.all_gather_into_tensor(full, part), share * 2 * layer)
    wide, piece = big[:layer], big[2**27 : 2**27 + layer // n]
    reduce = f"reduce-scatter of a layer, {4 * layer / 1e6:.0f} MB"
    clocked(reduce, lambda: dist.reduce_scatter_tensor(piece, wide), share * 4 * layer)
    return out


def launched(side: str, cards: int, seconds: int) -> dict[str, Any] | None:
    """Runs a side on so many cards; None where it failed."""
    environment = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "8"} | os.environ
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(cards), "--standalone"]
    command += ["--local-addr", "127.0.0.1", *sys.argv, "--side", side]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    run = subprocess.Popen(command, env=environment, start_new_session=True, **pipes)
    try:
        said, err = run.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(run.pid, signal.SIGKILL)  # the launcher's processes too
        said, err = run.communicate()
        err += f"\nnot done in {seconds} s"
    lines = [line for line in said.splitlines() if line.startswith(MARK)]
    if not lines:
        print(f"{side} on {cards} failed:\n{err[-3000:]}", flush=True)
        return None
    if "--profile" in sys.argv:
        print(err[-4000:])
    found: dict[str, Any] = json.loads(lines[0].removeprefix(MARK))
    print(json.dumps(found), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", default=",".join(SIDES))
    parser.add_argument("--cards", default="1,2", help="numbers of cards, the first is compared with")
    parser.add_argument("--tokens", type=int, default=8192, help="a card a step")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--vocab", type=int, default=122753)
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--lengths", default=str(LENGTHS))
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--limit", type=int, default=75, help="seconds that a side on some cards may take")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        side_of(arguments, arguments.side)
        return
    print(torch.cuda.device_count(), "x", torch.cuda.get_device_name(), torch.__version__, flush=True)
    for side in arguments.sides.split(","):
        found = [launched(side, int(cards), arguments.limit) for cards in arguments.cards.split(",")]
        first = found[0]
        for other in found[1:]:
            if first and other:
                ratio = other["tokens_per_second"] / first["tokens_per_second"]
                apart = max(abs(a / b - 1) for a, b in zip(first["losses"], other["losses"], strict=True))
                print(
                    f"== {side}: {other['cards']} cards {ratio:.3f} x {first['cards']} "
                    f"({first['ms']} -> {other['ms']} ms a step), losses {100 * apart:.2f} % apart", flush=True,
                )  # fmt: skip


if __name__ == "__main__":
    main()
