"""What each exported form weighs, and what it forgets: the loss on held-out rows of the real data set.

    python bench/export_table.py [--adapter RUN] [--rows 256] [--llama]

Trains LoRA on the first 256 rows with the embedded model (unless RUN is given), exports every form, and measures each
on the next rows, row by row in float32 over what is on disk, read by minitune. `--llama` runs the GGUF files through
llama.cpp as well (the package cyllama). Prints the table of RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import minitune
from minitune.checkpoint.embedded import embedded_default
from minitune.checkpoint.tokenizer import load_tokenizer
from minitune.checkpoint.weights import read_json
from minitune.data.forms import Message
from minitune.data.template import Encoded, Template
from minitune.export import export
from minitune.model.decoder import Decoder

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data" / "huanhuan.json"
CHUNK = 16  # rows whose logits llama.cpp hands over at once
FORMS = (
    ("hf", "", "float32"),
    ("hf", "", "bfloat16"),
    ("hf", "int4", "auto"),
    ("gguf", "f16", "auto"),
    ("gguf", "q8_0", "auto"),
    ("gguf", "q6_k", "auto"),
    ("gguf", "q5_k_m", "auto"),
    ("gguf", "q4_k_m", "auto"),
    ("gguf", "q4_0", "auto"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--llama", action="store_true")
    arguments = parser.parse_args()
    everything = json.loads(DATA.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        for file, rows in (("learn", everything[:256]), ("held", everything[256 : 256 + arguments.rows])):
            (work / f"{file}.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
        run = arguments.adapter or train(work)
        base = embedded_default()
        template = Template.recorded(load_tokenizer(base), read_json(base / "config.json"), run)
        held = [encoded(template, row) for row in everything[256 : 256 + arguments.rows]]
        learned = sum(row.supervised for row in held)
        trained = loss(minitune.load_model(base, run, device="cpu"), held)
        untrained = loss(minitune.load_model(base, device="cpu"), held)
        print(f"held out: {len(held)} rows, {learned:,} learned tokens; base {untrained:.4f}, adapter {trained:.4f}\n")
        print("| form | MiB | held-out loss | more than trained | KL, nats | same token | llama.cpp's loss |")
        print("|---|---|---|---|---|---|---|", flush=True)
        for form in FORMS:
            print(measured(work, run, held, trained, *form, llama=arguments.llama), flush=True)


def train(work: Path) -> Path:
    """One epoch over 256 rows, as tests/test_real.py has it."""
    start = time.perf_counter()
    config = minitune.TrainConfig(
        model="smollm2", data=str(work / "learn.json"), output=str(work / "run"), num_train_epochs=1,
        learning_rate=1e-3, dtype="float32", device="cpu",
    )  # fmt: skip
    minitune.train(config, quiet=True)
    print(f"trained in {time.perf_counter() - start:.0f} s", file=sys.stderr)
    return work / "run"


def encoded(template: Template, row: dict[str, str]) -> Encoded:
    question, answer = (
        Message("user", row["instruction"] + row["input"]),
        Message("assistant", row["output"], learn=True),
    )
    return template.encode([question, answer])


@torch.no_grad()
def loss(model: Decoder, rows: list[Encoded]) -> float:
    """Cross-entropy per learned token, in nats."""
    total = count = 0.0
    for row in rows:
        labels = torch.tensor(row.labels[1:])
        logits = model.logits(torch.tensor([row.input_ids]))[0, :-1][labels >= 0]
        total += F.cross_entropy(logits, labels[labels >= 0], reduction="sum").item()
        count += row.supervised
    return total / count


def measured(
    work: Path, run: Path, held: list[Encoded], trained: float, format: str, quant: str, dtype: str, *, llama: bool
) -> str:
    """A row of the table; the files are gone afterwards."""
    with tempfile.TemporaryDirectory(dir=work) as name:
        out = Path(name) / ("x.gguf" if format == "gguf" else "folder")
        report = export(
            "smollm2", run, format, out, dtype=dtype, quant=quant, verify_data=work / "held.json", quiet=True  # type: ignore[arg-type]
        )  # fmt: skip
        assert report.comparison is not None
        own = loss(minitune.load_model(out, dtype="float32", device="cpu"), held)
        theirs = f"{llama_loss(out, held):.4f}" if llama and format == "gguf" else "–"
        label = f"{format} {quant or dtype}"
        kl, same = report.comparison.kl, report.comparison.agreement
        size = report.bytes / 2**20
        return f"| {label} | {size:.0f} | {own:.4f} | {own - trained:+.4f} | {kl:.2g} | {same:.1%} | {theirs} |"


def llama_loss(file: Path, rows: list[Encoded]) -> float:
    """The same loss by llama.cpp's own arithmetic, which rounds activations too."""
    sys.path.insert(0, str(ROOT / "tests" / "export"))
    import real

    total = count = 0.0
    for at in range(0, len(rows), CHUNK):
        some = rows[at : at + CHUNK]
        theirs = real.logits(file, [row.input_ids for row in some], file.with_suffix(".npy"), 1024)
        labels = torch.tensor([label for row in some for label in [*row.labels[1:], -100]])
        total += F.cross_entropy(theirs[labels >= 0], labels[labels >= 0], reduction="sum").item()
        count += (labels >= 0).sum().item()
    file.with_suffix(".npy").unlink()
    return total / count


if __name__ == "__main__":
    main()
