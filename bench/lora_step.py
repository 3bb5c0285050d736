"""A LoRA step on one card at MiniCPM-2B's shape: transformers' Trainer + PEFT and minitune, in one run.

    python bench/lora_step.py [--sides trainer,fused,recomputed,qlora] [--steps 60] [--tokens 0,8192,16384] [--profile]

Random weights (the same for every side of ours), random ids in rows of the real data's lengths, the tutorial's
settings: r 8, alpha 32, dropout 0.1 on q, k, v, o; 16 rows a step, or so many `--tokens` a step (several: one after
the other; 0: 16 rows, and the only size of the trainer, which has no other). Each side is a process of its own, and
ours are made by the same calls as a run's. Reported: milliseconds a step (median, and the mean of all, the host's work
included), tokens a second, the line that a run says of its step (with the share of padding), the allocator's reserved
peak, what the driver says the process holds, the seconds before the first step, and the losses, which must agree
between the sides of ours.

trainer     Trainer + PEFT over GraniteForCausalLM of this shape, batch 16, no packing (its best batch)
plain       minitune's plain step
captured    the same, captured: what a card has whose layers can't be done by hand
fused       its layers by hand (model.fused), the step captured
recomputed  the same, one hidden state and two strips a layer kept
qlora       the same over layers rounded to 4 bits, one at a time, as a run loads them; its losses are of other weights
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from sides import give, take

if TYPE_CHECKING:
    from minitune.model.decoder import Decoder

ROOT = Path(__file__).resolve().parents[1]
LENGTHS = ROOT.parent / "shared" / "bench" / "huanhuan_lengths.json"
SIDES = ("trainer", "plain", "captured", "fused", "recomputed", "qlora")


def rows_of(arguments: argparse.Namespace) -> list[tuple[list[int], list[int]]]:
    """(ids, labels) of every row."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for prompt, answer in json.loads(Path(arguments.lengths).read_text(encoding="utf-8")):
        ids = torch.randint(3, arguments.vocab, (prompt + answer,), generator=generator).tolist()
        rows.append((ids, [-100] * prompt + ids[prompt:]))
    return rows


def driver_gib() -> float:
    """What the driver says this process holds; all of the card's where it can't tell processes apart."""
    free, total = torch.cuda.mem_get_info()
    try:
        query = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
        for line in subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines():
            pid, used = line.split(",")
            if int(pid) == os.getpid():
                return int(used) / 1024
    except (OSError, ValueError, subprocess.CalledProcessError):
        pass
    return (total - free) / 2**30


def result(seconds: list[float], tokens: list[int], started: float, losses: list[float], **more: Any) -> dict[str, Any]:
    return {
        "median_ms": 1e3 * statistics.median(seconds),
        "mean_ms": 1e3 * sum(seconds) / len(seconds),
        "tokens_per_second": sum(tokens) / sum(seconds),
        "tokens_a_step": sum(tokens) / len(tokens),
        "reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
        "driver_gib": driver_gib(),
        "seconds_before": started,
        "losses": [round(loss, 4) for loss in (*losses[:3], losses[-1])],
        **more,
    }


def our_decoder(arguments: argparse.Namespace, by_hand: bool, four: bool = False) -> Decoder:
    """MiniCPM-2B's shape with random weights, the same for every side; four: rounded to 4 bits one by one."""
    from minitune.model import four_bits, quantized
    from minitune.model.decoder import Decoder, DecoderConfig
    from minitune.model.lora import LoraConfig
    from minitune.train import fast

    shape = DecoderConfig(
        arguments.vocab, 2304, 5760, arguments.layers, 36, 36, 64,
        embedding_multiplier=12.0, residual_multiplier=1.4 / 40**0.5, logits_scaling=9.0,
    )  # fmt: skip
    with torch.device("meta"):
        decoder = Decoder(shape)
    names = [name for name, _ in decoder.named_parameters()]
    if four:
        four_bits.make_room(decoder)
    strips = fast.strips_of(decoder, LoraConfig()) if by_hand else None
    decoder.allocate(torch.device("cuda"), torch.bfloat16, strips)
    places: dict[str, Any] = dict(decoder.named_parameters())
    for name, module in decoder.named_modules():
        if isinstance(module, quantized.Int4Linear):
            places[f"{name}.weight"] = four_bits.Rounding(module.weight_packed, module.weight_scale)
    torch.cuda.synchronize()
    began = time.perf_counter()
    for i, name in enumerate(names):
        place, generator = places[name], torch.Generator("cuda").manual_seed(i)
        values = torch.randn(place.shape, generator=generator, device="cuda").mul_(0.02)
        with torch.no_grad():
            place.copy_(torch.ones_like(values) if values.ndim == 1 else values.bfloat16())
    torch.cuda.synchronize()
    print(f"weights made in {time.perf_counter() - began:.2f} s", file=sys.stderr)
    del values
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return decoder.train()


def our_side(arguments: argparse.Namespace, side: str) -> dict[str, Any]:
    from minitune.config import TrainConfig
    from minitune.data.store import EncodedRows
    from minitune.data.template import Encoded
    from minitune.train import fast
    from minitune.train.prepare import equip
    from minitune.train.steps import make_loader

    began = time.perf_counter()
    four, recompute = side == "qlora", side in ("recomputed", "qlora")
    fast.settle_memory(sparing=recompute)
    by_hand = recompute or side == "fused"
    decoder = our_decoder(arguments, by_hand, four)
    config = TrainConfig(
        tokens_per_step=arguments.tokens, tokens_per_pack=max(8192, arguments.tokens), seed=1,
        gradient_checkpointing="true" if recompute else "false", method="qlora" if four else "lora",
    )  # fmt: skip
    rows = EncodedRows.of([Encoded(ids, labels) for ids, labels in rows_of(arguments)])
    if not by_hand:
        fast.why_plain = lambda decoder: "asked for"
    _, plain = equip(config, decoder, rows)
    loader = make_loader(config, rows, decoder.device)
    per_epoch = [len(loader.steps(0))]
    count = min(arguments.steps, per_epoch[0])
    step: Any = plain
    said = "plain step"
    if side != "plain":
        step, said = fast.quicken(plain, loader, per_epoch, count)
    batches = [loader.batch(0, i) for i in range(count)]
    if side == "plain":
        for batch in batches[:3]:
            step(batch, 0.0)
    torch.cuda.synchronize()
    return timed(step, batches, 1e-4, time.perf_counter() - began, said, side if arguments.profile else "")


def timed(step: Any, batches: list[Any], rate: float, before: float, said: str, profiled: str) -> dict[str, Any]:
    """What a side reports: each step by itself, then all in a row. profiled: the name that a profile is printed by."""
    losses, seconds = [], []
    for batch in batches:
        start = time.perf_counter()
        losses.append(step(batch, rate).loss)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    together = time.perf_counter()
    for batch in batches:  # as in a run: nothing waits
        step(batch, rate)
    torch.cuda.synchronize()
    unwaited = (time.perf_counter() - together) / len(batches)
    if profiled:
        profile(step, batches[:5], profiled)
    stats = torch.cuda.memory_stats()
    peaks = {f"{k}_gib": round(stats[f"{k}_bytes.all.peak"] / 2**30, 3) for k in ("allocated", "active", "reserved")}
    more = {"said": said, "peaks": peaks, "unwaited_ms": 1e3 * unwaited, "device": torch.cuda.get_device_name()}
    return result(seconds, [b.tokens for b in batches], before, [float(loss) for loss in losses], **more)


def profile(step: Any, batches: list[Any], side: str) -> None:
    """Time by kernel, to stderr."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    with record(activities=[ProfilerActivity.CUDA]) as found:
        for batch in batches:
            step(batch, 1e-4)
        torch.cuda.synchronize()
    events = sorted(found.key_averages(), key=lambda e: -e.self_device_time_total)
    busy, launches = sum(e.self_device_time_total for e in events), sum(e.count for e in events)
    print(f"{side}: {busy / len(batches) / 1e3:.2f} ms busy, {launches / len(batches):.0f} launches", file=sys.stderr)
    for e in events[:25]:
        per = e.self_device_time_total / len(batches)
        print(f"  {per:9.0f} us {e.count / len(batches):6.0f} x  {e.key[:90]}", file=sys.stderr)


def trainer_side(arguments: argparse.Namespace) -> dict[str, Any]:
    import peft
    from transformers import GraniteConfig, GraniteForCausalLM, Trainer, TrainerCallback, TrainingArguments

    began = time.perf_counter()
    config = GraniteConfig(
        vocab_size=arguments.vocab, hidden_size=2304, intermediate_size=5760, num_hidden_layers=arguments.layers,
        num_attention_heads=36, num_key_value_heads=36, max_position_embeddings=4096, tie_word_embeddings=True,
        embedding_multiplier=12.0, residual_multiplier=1.4 / 40**0.5, logits_scaling=9.0, attention_multiplier=0.125,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = GraniteForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    lora = peft.LoraConfig(r=8, lora_alpha=32, lora_dropout=0.1, target_modules=targets, task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, lora)
    rows = [{"input_ids": ids, "labels": labels} for ids, labels in rows_of(arguments)]
    seconds: list[float] = []
    tokens: list[int] = []

    def collate(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in batch)
        tokens.append(sum(len(row["input_ids"]) for row in batch))
        pad = {"input_ids": 2, "labels": -100}
        out = {k: torch.tensor([row[k] + [v] * (longest - len(row[k])) for row in batch]) for k, v in pad.items()}
        ones = [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in batch]
        return out | {"attention_mask": torch.tensor(ones)}

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            torch.cuda.synchronize()
            self.start = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - self.start)

    settings = TrainingArguments(
        "/tmp/minitune-bench", per_device_train_batch_size=16, max_steps=arguments.steps, learning_rate=1e-4, bf16=True,
        logging_steps=1, save_strategy="no", report_to=[], lr_scheduler_type="constant", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, settings, train_dataset=rows, data_collator=collate, callbacks=[Clock()])
    before = time.perf_counter() - began
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    skip = min(5, len(seconds) - 1)
    return result(seconds[skip:], tokens[skip : len(seconds)], before, losses, device=torch.cuda.get_device_name())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", default=",".join(SIDES))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--tokens", default="0", help="tokens a step instead of 16 rows (0), commas between several")
    parser.add_argument("--vocab", type=int, default=122753)
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--lengths", default=str(LENGTHS))
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        side, _, tokens = arguments.side.partition(":")
        arguments.tokens = int(tokens or 0)
        give(trainer_side(arguments) if side == "trainer" else our_side(arguments, side))
        return
    for size in map(int, arguments.tokens.split(",")):
        for side in arguments.sides.split(","):
            if side != "trainer" or not size:
                take(f"{side}:{size}" if size else side, quiet=False)


if __name__ == "__main__":
    main()
