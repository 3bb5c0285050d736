"""Does 8 bits learn as well? smollm2 on the real rows, every parameter, by each optimizer, several seeds.

    MINITUNE_SMOLLM2_GGUF=FILE python bench/learn8.py --output DIR [--seeds 1,2,3] [--data ../shared/data/huanhuan.json]

The runs are `minitune.train`'s, in this process one after the other: bfloat16 on a card, three epochs of 16 rows, the
same held-out rows (a twentieth) for all. A seed decides the order of the rows and what the rounding draws. Printed: the
held-out loss at the end (mean, and lowest to highest), and that of the first steps' log. DIR/learn8.png: the curves;
DIR/learn8.json: every number.

adamw                   moments and masters of 32 bits, computed with bfloat16 weights that are rounded to the nearest
float32                 the same with weights and all else in float32: what bits cost at all
adamw_8bit              moments of 8 bits, weights rounded stochastically
adamw_8bit_in_backward  the same inside backward
nearest                 adamw_8bit with weights rounded to the nearest bfloat16: why the rounding is there
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SIDES = ("adamw", "float32", "adamw_8bit", "adamw_8bit_in_backward", "nearest")


@contextmanager
def rounded_to_nearest() -> Iterator[None]:
    """Inside, weights are stored as a cast rounds them; moments as ever."""
    from minitune.train import adamw8

    kept = adamw8.launch, adamw8.round_stochastically
    inner = adamw8.launch

    def launch(*args: Any, **options: Any) -> None:
        inner(*args, **options | ({"ROUND": False} if "ROUND" in options else {}))

    adamw8.launch, adamw8.round_stochastically = launch, lambda x, draw: x
    try:
        yield
    finally:
        adamw8.launch, adamw8.round_stochastically = kept


def model_folder() -> str:
    """The embedded model, or that of the file in the environment, as a hub folder."""
    if not (file := os.environ.get("MINITUNE_SMOLLM2_GGUF")):
        return "smollm2"
    from minitune.checkpoint.gguf import convert

    folder = Path(tempfile.mkdtemp(prefix="smollm2-"))
    convert(Path(file), folder)
    return str(folder)


def split(data: Path, work: Path) -> tuple[Path, Path]:
    """(rows to learn from, held-out rows): the same for every run."""
    rows = json.loads(data.read_text(encoding="utf-8"))
    random.Random(0).shuffle(rows)
    parts = rows[len(rows) // 20 :], rows[: len(rows) // 20]
    files = work / "learn.json", work / "held_out.json"
    for file, part in zip(files, parts, strict=True):
        file.write_text(json.dumps(part, ensure_ascii=False), encoding="utf-8")
    return files


def one(arguments: argparse.Namespace, side: str, seed: int, model: str, files: tuple[Path, Path]) -> dict[str, Any]:
    from minitune import TrainConfig, train

    output = arguments.output / "runs" / f"{side}-{seed}"
    optim = {"nearest": "adamw_8bit", "float32": "adamw"}.get(side, side)
    config = TrainConfig(
        model=model, data=str(files[0]), eval_data=str(files[1]), output=str(output), method="full", seed=seed,
        optim=optim, learning_rate=arguments.rate, max_steps=arguments.steps, eval_steps=arguments.every,  # type: ignore[arg-type]
        save_steps=10**6, dtype="float32" if side == "float32" else arguments.dtype,
    )  # fmt: skip
    began = time.perf_counter()
    if side == "nearest":
        with rounded_to_nearest():
            summary = train(config, quiet=True)
    else:
        summary = train(config, quiet=True)
    rows = [json.loads(line) for line in (output / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    held = [(r["step"], r["eval_loss"]) for r in rows if r.get("eval_loss") is not None]
    losses = [r["loss"] for r in rows if r.get("loss") is not None]
    result = {
        "side": side, "seed": seed, "eval_loss": summary["eval_loss"], "held_out": held, "first": losses[:3],
        "last": statistics.mean(losses[-20:]), "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip
    print(f"{side} seed {seed}: held-out {summary['eval_loss']:.4f}, {result['seconds']} s", flush=True)
    return result


def draw(results: list[dict[str, Any]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (whole, end) = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    near = [loss for r in results if r["side"] != "nearest" for _, loss in r["held_out"][-4:]]
    for number, side in enumerate(SIDES):
        for i, result in enumerate(r for r in results if r["side"] == side):
            steps, losses = zip(*result["held_out"], strict=True)
            for axes in (whole, end):
                axes.plot(steps, losses, color=f"C{number}", lw=1.2, alpha=0.8, label=side if i == 0 else None)
    end.set_xlim(steps[-4], steps[-1])
    end.set_ylim(min(near) - 0.002, max(near) + 0.002)
    end.set_title("the end, enlarged", fontsize=10)
    for axes in (whole, end):
        axes.set_xlabel("step")
    whole.set_ylabel("held-out loss (nats a token)")
    whole.legend()
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "huanhuan.json")
    parser.add_argument("--sides", default=",".join(SIDES))
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--rate", type=float, default=2e-5)
    parser.add_argument("--steps", type=int, default=0, help="0: three epochs")
    parser.add_argument("--every", type=int, default=50, help="steps between held-out losses")
    parser.add_argument("--dtype", default="bfloat16")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    model, files = model_folder(), split(arguments.data, arguments.output)
    results: list[dict[str, Any]] = []
    for side in arguments.sides.split(","):
        for seed in map(int, arguments.seeds.split(",")):
            results.append(one(arguments, side, seed, model, files))
            (arguments.output / "learn8.json").write_text(json.dumps(results, indent=1))
    print(f"{'':24} mean    lowest  highest")
    for side in dict.fromkeys(r["side"] for r in results):
        losses = [r["eval_loss"] for r in results if r["side"] == side]
        print(f"{side:24} {statistics.mean(losses):.4f}  {min(losses):.4f}  {max(losses):.4f}")
    draw(results, arguments.output / "learn8.png")


if __name__ == "__main__":
    main()
