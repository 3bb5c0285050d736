"""What a plan says beside what its run takes, on one card: `minitune train` under several bounds of memory.

    python bench/plan_card.py [--data ../shared/data/huanhuan.json] [--only lora-6.5,full-13] [--steps N]

A hub folder of MiniCPM-2B's shape is written with random weights first (`train_command.py`). Each run is the whole
command over three epochs of the real rows (`long`: rows of 2,048 tokens, made by joining real ones), or --steps of
them, and must end by itself under its bound. A line each: what was chosen, the card's memory as the driver reports it
(polled by nvidia-smi, less what was taken before), the allocator's reserved peak, both as planned and the ratio;
milliseconds a step as planned, as foretold after the first steps, and as measured.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from train_command import SHARED

# By importance: name -> settings.
RUNS = {
    "qlora-4": ["--method", "qlora", "--memory", "4GiB"],
    "full-13": ["--method", "full", "--memory", "13GiB"],
    "lora-6.5": ["--method", "lora", "--memory", "6.5GiB"],
    "full-24-long": ["--method", "full", "--memory", "24GB", "--max_length", "2048"],
    "full-16": ["--method", "full", "--memory", "16GiB"],
    "lora-24-long": ["--method", "lora", "--memory", "24GB", "--max_length", "2048"],
    "lora-8": ["--method", "lora", "--memory", "8GiB"],
    "lora": ["--method", "lora"],
    "full": ["--method", "full"],
    "lora-8192": ["--method", "lora", "--tokens_per_step", "8192"],
    "full-8192": ["--method", "full", "--tokens_per_step", "8192", "--optim", "adamw_8bit_in_backward"],
}
FIRST = ",".join(list(RUNS)[:7])


class Polled:
    """The card's used MiB over a time, by nvidia-smi, five times a second."""

    def __init__(self) -> None:
        self.file = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the object)
        command = ["nvidia-smi", "-i", "0", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        self.process: subprocess.Popen[str] | None = None
        with contextlib.suppress(OSError):
            self.process = subprocess.Popen([*command, "-lms", "200"], stdout=self.file, text=True)

    def end(self) -> list[int]:
        if self.process is None:
            return []
        self.process.kill()
        self.process.wait()
        self.file.seek(0)
        return [int(line) for line in self.file.read().split("\n")[:-1] if line.strip().isdigit()]


def long_rows(data: Path, out: Path) -> None:
    """Rows of 45 real ones each, which have some 2,200 tokens."""
    rows = json.loads(data.read_text(encoding="utf-8"))
    groups = [rows[at : at + 45] for at in range(0, len(rows) - 44, 45)]
    text = ["\n".join(f"{row['instruction']}\n{row['output']}" for row in group) for group in groups]
    made = [{"instruction": g[0]["instruction"], "input": "", "output": t} for g, t in zip(groups, text, strict=True)]
    out.write_text(json.dumps(made, ensure_ascii=False), encoding="utf-8")


def one(name: str, work: Path, data: Path, steps: int, seconds: float) -> None:
    output = work / f"out-{name}"
    command = [sys.executable, "-m", "minitune", "train", "--model", str(work / "model"), "--output", str(output)]
    command += ["--data", str(work / "long.json" if name.endswith("long") else data), "--save_steps", "1000000"]
    command += ["--logging_steps", "1" if "long" in name else "5" if "8192" in name else "10", *RUNS[name]]
    command += ["--max_steps", str(steps)] if steps else []
    environment = os.environ | {"MINITUNE_ROWS_CACHE": str(work / "rows")}
    environment.setdefault("TRITON_CACHE_DIR", str(work / "triton"))
    polled, began = Polled(), time.perf_counter()
    time.sleep(0.5)  # what others hold
    try:
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        print(f"{name}: not over after {seconds:.0f} s", flush=True)
        return
    finally:
        used = polled.end()
    wall = time.perf_counter() - began
    said = (run.stdout + run.stderr).splitlines()
    if run.returncode:
        print(f"{name}: exit status {run.returncode}: " + " | ".join(said[-3:]), flush=True)
    else:
        found = json.loads((output / "summary.json").read_text(encoding="utf-8"))
        print(line(name, found, used, wall), flush=True)
    for text in said:
        if text.startswith(("plan:", "captured:", "plain step")) or "a step (predicted" in text:
            print(f"    {text}", flush=True)
    shutil.rmtree(output, ignore_errors=True)


def line(name: str, found: dict, used: list[int], wall: float) -> str:
    plan = found["planned"]
    driver = (max(used) - used[0]) / 1024 if used else float("nan")
    reserved = found["peak_memory_gib"]
    times = [plan["step_seconds"], found["probed_step_seconds"], found["step_seconds"]]
    said = " / ".join("-" if t is None else f"{1e3 * t:.1f}" for t in times)
    ratio = f"{times[0] / times[2]:.3f}" if times[0] and times[2] else "-"
    return (
        f"{name}: {plan['optim']}, {plan['whole_layers']} layers kept, packs of {plan['tokens_per_pack']}; driver "
        f"{driver:.2f} planned {plan['memory_gib']:.2f} ({plan['memory_gib'] / driver:.3f}); reserved {reserved:.2f} "
        f"planned {plan['reserved_gib']:.2f} ({plan['reserved_gib'] / reserved:.3f}); ms a step planned / foretold / "
        f"measured {said} ({ratio}); {found['steps']} steps, loss {found['loss']:.3f}, {wall:.0f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=SHARED / "data" / "huanhuan.json")
    parser.add_argument("--tokenizer", type=Path, default=SHARED / "golden" / "tokenizer-minicpm")
    parser.add_argument(
        "--work", type=Path, default=Path("/dev/shm/minitune-plan"), help="kept: a second call finds it"
    )
    parser.add_argument("--only", default=FIRST, help=f"of {','.join(RUNS)}")
    parser.add_argument("--steps", type=int, default=0, help="steps of each run (0: three epochs)")
    parser.add_argument("--seconds", type=float, default=75, help="of each run at most")
    parser.add_argument(
        "--total", type=float, default=210, help="seconds in all: what would begin too late is left out"
    )
    arguments = parser.parse_args()
    began = time.perf_counter()
    print(torch.cuda.get_device_name(), torch.__version__, flush=True)
    if not (arguments.work / "model").exists():
        shutil.rmtree(arguments.work, ignore_errors=True)
        program = "import sys, pathlib, train_command as t; t.write_hub_folder(*map(pathlib.Path, sys.argv[1:]))"
        maker = [sys.executable, "-c", program, str(arguments.work / "model"), str(arguments.tokenizer.resolve())]
        subprocess.run(maker, cwd=Path(__file__).parent, check=True)  # a process of its own: its memory is the card's
    long_rows(arguments.data, arguments.work / "long.json")
    for name in arguments.only.split(","):
        left = arguments.total - (time.perf_counter() - began)
        if left < 15:
            print(f"{name}: left out, {arguments.total:.0f} s are over")
            continue
        one(name, arguments.work, arguments.data, arguments.steps, min(left, arguments.seconds))


if __name__ == "__main__":
    main()
