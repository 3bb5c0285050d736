"""LoRA on the CPU: minitune beside transformers' Trainer + PEFT, the same model, rows, ids and settings, in one run.

    python bench/cpu_lora.py [--rows 256] [--held_out 64] [--threads 2] [--sides trainer-float32,minitune-float32]

Each side runs in a process of its own, so that its peak memory is its own. The Trainer gets the tutorial's batches
(4 rows × 4, padded to the longest of the four); minitune packs the same 16 rows a step. Reported: tokens a second
(all, and learned only) of the training loop, the held-out loss after it, and the process's peak memory.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from pathlib import Path

from sides import give, take

DATA = Path(__file__).parents[2] / "shared" / "data" / "huanhuan.json"
SIDES = ("trainer-float32", "minitune-float32", "trainer-bfloat16", "minitune-bfloat16")


def rows_of(arguments: argparse.Namespace) -> tuple[list, list, Path]:
    """(rows to learn, rows held out, model folder): both sides get the very same ids."""
    from minitune.checkpoint.gguf import embedded_default
    from minitune.checkpoint.tokenizer import load_tokenizer
    from minitune.config import TemplateConfig
    from minitune.data import dataset
    from minitune.data.template import Template

    base = embedded_default()
    template = Template(load_tokenizer(base), TemplateConfig("minicpm"))
    rows = dataset.load(str(arguments.data), template, 512).rows
    return rows[: arguments.rows], rows[arguments.rows : arguments.rows + arguments.held_out], base


def minitune_side(arguments: argparse.Namespace, dtype: str) -> dict:
    from minitune.checkpoint.weights import load_decoder
    from minitune.config import TrainConfig
    from minitune.model.lora import LoraConfig, attach
    from minitune.train.optim import AdamW, learning_rate_at
    from minitune.train.step import TrainStep, held_out_loss
    from minitune.train.steps import make_loader

    learn, held_out, base = rows_of(arguments)
    config = TrainConfig(model="smollm2", data=str(arguments.data), output="-", num_train_epochs=1)
    decoder = load_decoder(base, dtype, "cpu").train()
    optimizer = AdamW(attach(decoder, LoraConfig(), config.seed), config)
    step = TrainStep(decoder, optimizer, dropout=config.lora_dropout, seed=config.seed)
    loader = make_loader(config, learn, decoder.device)
    started, losses = time.perf_counter(), []
    total = len(loader.steps(0))
    for i, batch in enumerate(loader.batches()):
        losses.append(float(step(batch, learning_rate_at(i, total, config)).loss))
    seconds = time.perf_counter() - started
    held = held_out_loss(decoder, list(make_loader(config, held_out, decoder.device, shuffle=False).batches()))
    return {"seconds": seconds, "loss": losses[-1], "held_out": held}


def trainer_side(arguments: argparse.Namespace, dtype: str) -> dict:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    learn, held_out, base = rows_of(arguments)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(42)
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=8,
        lora_alpha=32,
        lora_dropout=0.1,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
    )
    model = get_peft_model(model, lora)

    def collate(batch: list[dict]) -> dict:
        width = max(len(row["input_ids"]) for row in batch)

        def pad(name: str, value: int) -> torch.Tensor:
            return torch.tensor([row[name] + [value] * (width - len(row[name])) for row in batch])

        ids, labels = pad("input_ids", 2), pad("labels", -100)
        lengths = torch.tensor([len(row["input_ids"]) for row in batch])
        return {"input_ids": ids, "labels": labels, "attention_mask": (torch.arange(width) < lengths[:, None]).long()}

    settings = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        num_train_epochs=1,
        learning_rate=1e-4,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=dtype == "bfloat16",
        disable_tqdm=True,
    )
    data = [{"input_ids": row.input_ids, "labels": row.labels} for row in learn]
    trainer = Trainer(model=model, args=settings, train_dataset=data, data_collator=collate)
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    model.eval()
    total = count = 0.0
    with torch.no_grad():
        for row in held_out:
            ids = torch.tensor([row.input_ids])
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
                logits = model(input_ids=ids).logits[0, :-1].float()
            labels = torch.tensor(row.labels[1:])
            total += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
            count += float((labels >= 0).sum())
    last = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-1]
    return {"seconds": seconds, "loss": last, "held_out": total / count}


def one(arguments: argparse.Namespace) -> None:
    """Runs one side and prints its figures as one JSON line."""
    import torch

    torch.set_num_threads(arguments.threads)
    side, dtype = arguments.side.split("-")
    result = (minitune_side if side == "minitune" else trainer_side)(arguments, dtype)
    learn, _, _ = rows_of(arguments)
    result |= {
        "tokens_per_second": sum(len(r.input_ids) for r in learn) / result["seconds"],
        "learned_per_second": sum(r.supervised for r in learn) / result["seconds"],
        "peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }
    give(result)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--held_out", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sides", default=",".join(SIDES[:2]))
    parser.add_argument("--side", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        return one(arguments)
    results: dict[str, dict] = {}
    for side in arguments.sides.split(","):
        results[side] = take(side, arguments.threads) or sys.exit(1)
    first = next(iter(results.values()))
    print("| side | tok/s | learned tok/s | against the first | held-out loss | peak GiB |\n|---|---|---|---|---|---|")
    for side, r in results.items():
        print(
            f"| {side} | {r['tokens_per_second']:.0f} | {r['learned_per_second']:.0f} "
            f"| {r['tokens_per_second'] / first['tokens_per_second']:.2f} | {r['held_out']:.4f} "
            f"| {r['peak_memory_gib']:.2f} |"
        )


if __name__ == "__main__":
    main()
