"""One million generated conversations: `minitune data check`, and tokenisation to packed steps, each a whole process.

    .venv/bin/python bench/data_million.py --tokenizer ../shared/golden/tokenizer-minicpm
    .venv/bin/python bench/data_million.py                      # smollm2's tokenizer and chat template
    .venv/bin/python bench/data_million.py --near               # near duplicates instead: time, memory, how many found

Wall time and peak memory are the processes' own (wait4), interpreter and imports included, on two cores. The rows are
seeded: Chinese and English mixed, of 10 to some 900 tokens, some with a system text or several turns. The peer is what
the tutorial's recipe and LLaMA-Factory do a row: one call of the `transformers` tokenizer for the prompt, one for the
answer, lists of Python integers; it reads the first rows only and is scaled up. With `--near` one row in a hundred is
an earlier row with a word changed, and these must be found.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

WORDS = (
    "the a this that every some light river stone paper garden winter morning letter window bridge quiet long early "
    "bright small careful open carry keep write read turn follow answer measure begin return between behind under with "
    "without because although while therefore number table result model value error step sample question example",
    "今天 明天 我们 他们 因为 所以 但是 如果 可以 需要 问题 方法 结果 例子 模型 数据 训练 语言 文字 故事 春天 河流 "
    "城市 朋友 老师 学生 早晨 安静 慢慢 仔细 打开 写下 回答 开始 最后 为什么 怎么样 一个 这个 那些 非常 有点 "
    "的 了 在 是 和 也 就 都 很",
)
ENGLISH, CHINESE = (words.split() for words in WORDS)
SYSTEMS = ("You are a careful assistant. Answer briefly.", "你是一位耐心的老师，用简单的话回答。")


def sentence(rng: random.Random, words: int) -> str:
    """Some words, mostly of one language."""
    if rng.random() < 0.5:
        return " ".join(rng.choices(ENGLISH, k=words)).capitalize() + "."
    text = "".join(rng.choices(CHINESE, k=words))
    if rng.random() < 0.2:
        text += " " + rng.choice(ENGLISH)
    return text + "。"


def said(rng: random.Random, middle: float) -> str:
    """Sentences of a skewed total length."""
    words = min(600, max(2, int(rng.lognormvariate(0, 0.8) * middle)))
    parts = []
    while words > 0:
        parts.append(sentence(rng, min(words, rng.randint(5, 25))))
        words -= 15
    return "\n".join(parts) if rng.random() < 0.1 else "".join(parts)


def generate(path: Path, rows: int, seed: int, near: bool = False) -> None:
    """Writes the rows as jsonl. near: every hundredth is one of the 99 before it, a word added to its answer."""
    rng = random.Random(seed)
    before: list[dict[str, object]] = []
    with path.open("w", encoding="utf-8") as file:
        for i in range(rows):
            turns = [said(rng, 14) + f" ({i})", said(rng, 30)]
            row = {"instruction": turns[0], "input": "", "output": turns[1]}
            if rng.random() < 0.1:
                row["history"] = [[said(rng, 8), said(rng, 15)]]
            if rng.random() < 0.1:
                row["system"] = rng.choice(SYSTEMS)
            if near:
                if i % 100 == 99:
                    row = rng.choice(before)
                    row, before = row | {"output": f"{row['output']} {rng.choice(ENGLISH)}"}, []
                elif len(turns[1]) > 60:
                    before.append(row)
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def measured(command: list[str], environment: dict[str, str]) -> tuple[float, float, float, int, str]:
    """(seconds, processor seconds, peak GiB, exit code, what it printed) of a whole process."""
    with tempfile.TemporaryFile() as out:
        begun = time.perf_counter()
        pid = os.posix_spawn(
            command[0], command, environment,
            file_actions=[(os.POSIX_SPAWN_DUP2, out.fileno(), 1), (os.POSIX_SPAWN_DUP2, out.fileno(), 2)],
        )  # fmt: skip
        _, status, usage = os.wait4(pid, 0)
        seconds = time.perf_counter() - begun
        out.seek(0)
        text = out.read().decode("utf-8", "replace")
    busy = usage.ru_utime + usage.ru_stime
    return seconds, busy, usage.ru_maxrss / 2**20, os.waitstatus_to_exitcode(status), text


def to_steps(file: str, model: str) -> None:
    """What `minitune train` does before its first step, and then the packed tensors of every step of an epoch."""
    from minitune.checkpoint import hub
    from minitune.checkpoint.embedded import rows_cache
    from minitune.checkpoint.tokenizer import load_tokenizer
    from minitune.checkpoint.weights import read_json
    from minitune.config import TrainConfig
    from minitune.data import dataset
    from minitune.data.loader import Loader
    from minitune.data.template import Template

    config, base = TrainConfig(), hub.resolve(model)
    template = Template.choose(load_tokenizer(base), config.template, read_json(base / "config.json"))
    begun = time.perf_counter()
    data = dataset.load(file, template, config.max_length, kept=rows_cache())
    read = time.perf_counter() - begun
    loader = Loader(data.rows, rows_per_step=config.rows_per_step, seed=config.seed)
    tokens = sum(batch.tokens for batch in loader.batches(0))
    assert tokens == data.tokens
    print("\n".join(data.summary(config.max_length)))
    print(f"{len(loader.steps(0)):,} steps; rows in {read:.1f} s, packed in {time.perf_counter() - begun - read:.1f} s")


def peer(file: str, model: str, rows: int) -> None:
    """The same ids a row at a time; prints seconds."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    begun, out = time.perf_counter(), []
    with open(file, encoding="utf-8") as lines:
        for line, _ in zip(lines, range(rows), strict=False):
            row = json.loads(line)
            prompt = tokenizer(f"<用户>{row['instruction'] + row['input']}<AI>", add_special_tokens=False)["input_ids"]
            answer = tokenizer(row["output"], add_special_tokens=False)["input_ids"]
            ids = [*prompt, *answer, tokenizer.eos_token_id][:512]
            labels = [*[-100] * len(prompt), *answer, tokenizer.eos_token_id][:512]
            out.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    print(json.dumps({"seconds": time.perf_counter() - begun, "rows": len(out)}))


def model_folder(tokenizer: Path, folder: Path) -> str:
    """A hub folder with this tokenizer and no weights: enough for check and tokenisation."""
    from safetensors.numpy import save_file

    folder.mkdir()
    for file in tokenizer.iterdir():
        shutil.copyfile(file, folder / file.name)
    (folder / "config.json").write_text(json.dumps({"architectures": ["MiniCPMForCausalLM"]}), encoding="utf-8")
    save_file({}, folder / "model.safetensors")
    return str(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer", type=Path, help="a folder with a MiniCPM tokenizer; without it smollm2")
    parser.add_argument("--near", action="store_true", help="measure the check with near duplicates looked for")
    parser.add_argument("--json", action="store_true", help="write the rows as one big .json array")
    parser.add_argument("--keep", type=Path, help="a folder for the generated file, used again where it is there")
    parser.add_argument("--peer_rows", type=int, default=20_000)
    arguments = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    with tempfile.TemporaryDirectory() as temporary:
        room = arguments.keep or Path(temporary)
        file = room / f"rows-{arguments.rows}-{arguments.seed}.{'json' if arguments.json else 'jsonl'}"
        file = file.with_stem(f"{file.stem}{'-near' * arguments.near}")
        if not file.exists():
            part = file.with_suffix(".part")
            generate(part, arguments.rows, arguments.seed, arguments.near)
            if arguments.json:
                with part.open(encoding="utf-8") as lines, file.open("w", encoding="utf-8") as whole:
                    whole.writelines(("[\n" if i == 0 else ",\n") + line.rstrip() for i, line in enumerate(lines))
                    whole.write("\n]\n")
                part.unlink()
            else:
                part.rename(file)
        if arguments.near:
            return near(file, arguments.rows // 100)
        model = model_folder(arguments.tokenizer, Path(temporary) / "model") if arguments.tokenizer else "smollm2"
        report(file, model, arguments, {**os.environ, "MINITUNE_ROWS_CACHE": f"{temporary}/cache"})


def near(file: Path, planted: int) -> None:
    """The check with near duplicates looked for in every row; `planted` of them are there."""
    command = [sys.executable, "-m", "minitune", "data", "check", str(file), "--near", "true", "--json"]
    around = {"PYTHONPATH": str(Path(__file__).parents[1]), **os.environ}
    print(f"{file.name}: {file.stat().st_size / 2**20:,.0f} MiB   load {os.getloadavg()[0]:.1f}", flush=True)
    seconds, busy, memory, code, text = measured(command, around)
    if code not in (0, 1):
        sys.exit(text)
    found = {f["kind"]: f["rows"] for f in json.loads(text)["findings"]}.get("near", [])
    right = sum(row % 100 == 0 for row in found)
    print(f"check --near true: {seconds:.1f} s, {busy:.1f} s of processors, {memory:.2f} GiB peak")
    print(f"near duplicates: {right:,} of {planted:,} planted, {len(found) - right:,} others")


def report(file: Path, model: str, arguments: argparse.Namespace, environment: dict[str, str]) -> None:
    environment = {"TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(Path(__file__).parents[1]), **environment}
    python, here = sys.executable, str(Path(__file__).resolve())
    print(f"{file.name}: {file.stat().st_size / 2**20:,.0f} MiB; {model}; {platform.processor() or platform.machine()}")
    check = [python, "-m", "minitune", "data", "check", str(file), "--near", "false"]
    steps = [python, "-c", f"import runpy; runpy.run_path({here!r})['to_steps']({str(file)!r}, {model!r})"]
    cold = environment | {"MINITUNE_ROWS_CACHE": environment["MINITUNE_ROWS_CACHE"] + "-2"}
    sides = {
        "check": (check, environment),
        "tokenised to packed steps": (steps, environment),
        "the same again, rows cached": (steps, environment),
        "check with the model's tokens": ([*check, "--model", model], cold),
        "packed steps after that": (steps, cold),
    }
    print(f"{'':32}{'seconds':>9}{'processor':>11}{'peak GiB':>10}   load {os.getloadavg()[0]:.1f}")
    total = total_busy = peak = 0.0
    for name, (command, around) in sides.items():
        seconds, busy, memory, code, text = measured(command, around)
        print(f"{name:32}{seconds:9.1f}{busy:11.1f}{memory:10.2f}   load {os.getloadavg()[0]:.1f}", flush=True)
        if code not in (0, 1):
            sys.exit(f"{' '.join(command)}\n{text}")
        if name in ("check", "tokenised to packed steps"):
            total, total_busy, peak = total + seconds, total_busy + busy, max(peak, memory)
        if command is steps:
            print("    " + text.strip().replace("\n", "\n    "))
    print(f"{'check + packed steps':32}{total:9.1f}{total_busy:11.1f}{peak:10.2f}   wanted: at most 300 s, 2 GiB")
    if arguments.tokenizer and arguments.peer_rows:
        call = f"import runpy; runpy.run_path({here!r})['peer']({str(file)!r}, {model!r}, {arguments.peer_rows})"
        _, _, _, code, text = measured([python, "-c", call], environment)
        done = json.loads(text.splitlines()[-1]) if code == 0 else sys.exit(text)
        print(f"a row at a time, scaled up      {done['seconds'] / done['rows'] * arguments.rows:9.1f}")


if __name__ == "__main__":
    main()
