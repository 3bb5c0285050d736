"""Many clients at once against `minitune serve`, some of which leave: is anything lost, does memory grow?

    .venv/bin/python bench/serve_soak.py                    64 clients, 2 minutes, smollm2, a server of its own
    .venv/bin/python bench/serve_soak.py --url http://127.0.0.1:8000 --model NAME --pid N

Each client asks again and again: streamed or whole, of 4 to 32 tokens, and one time in four it goes away before the
end. Answers are greedy, so what each must be is known: it is asked for alone beforehand. Exit code 1 where an answer is
missing, cut, or not what it is alone; where the server still holds something at the end; or where its memory grows.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

PROMPTS = (
    *("What is tea?", "Name three colours.", "你好", "Who are you?", "Count to ten.", "Write a short poem about rain."),
    *("甄嬛是谁？", "Why is the sky blue?"),
)
LONGEST = 32


@dataclass
class Report:
    """What happened. done: whole answers; left: requests that their client broke off; wrong: what should not be."""

    done: int = 0
    left: int = 0
    tokens: int = 0
    seconds: float = 0.0
    first: list[float] = field(default_factory=list)  # seconds to the first text of a streamed answer
    wrong: Counter[str] = field(default_factory=Counter)
    differs: int = 0  # answers that are not what they are alone
    memory: list[tuple[float, float]] = field(default_factory=list)  # (seconds, MiB of the server)

    def growth(self) -> float:
        """MiB between the second quarter and the last, means; the first is warming up."""
        end = self.memory[-1][0]
        quarter = [
            [m for t, m in self.memory if low * end <= t <= high * end] for low, high in ((0.25, 0.5), (0.75, 1))
        ]
        return statistics.mean(quarter[1]) - statistics.mean(quarter[0])


class Client:
    """One of the many. `alone`: {prompt: its greedy answer of LONGEST tokens}."""

    def __init__(self, http: httpx.AsyncClient, model: str, alone: dict[str, str], report: Report, seed: int):
        self.http, self.model, self.alone, self.report = http, model, alone, report
        self.random = random.Random(seed)

    async def run(self, until: float) -> None:
        while time.monotonic() < until:
            prompt, tokens = self.random.choice(list(self.alone)), self.random.randint(4, LONGEST)
            asked = request(self.model, prompt, tokens)
            leaves, stream = self.random.random() < 0.25, self.random.random() < 0.7
            try:
                if leaves:
                    await self.leave(asked | {"stream": stream})
                elif stream:
                    self.check(prompt, tokens, *await self.streamed(asked))
                else:
                    self.check(prompt, tokens, *await self.whole(asked))
            except (httpx.HTTPError, KeyError, ValueError) as error:
                self.report.wrong[f"{type(error).__name__}: {str(error)[:80]}"] += 1

    async def leave(self, asked: dict[str, Any]) -> None:
        """Goes away after a moment: in the queue, while the prompt is read, or in mid-answer."""

        async def ask() -> None:
            async with self.http.stream("POST", "/v1/chat/completions", json=asked) as response:
                async for _ in response.aiter_bytes():
                    pass

        try:
            await asyncio.wait_for(ask(), self.random.choice((0.02, 0.2, 1.0)))
        except TimeoutError:
            self.report.left += 1

    async def whole(self, asked: dict[str, Any]) -> tuple[str, str, int]:
        body = (await self.http.post("/v1/chat/completions", json=asked)).json()
        choice = body["choices"][0]
        return choice["message"]["content"], choice["finish_reason"], body["usage"]["completion_tokens"]

    async def streamed(self, asked: dict[str, Any]) -> tuple[str, str, int]:
        start, text, reason, tokens, done = time.monotonic(), "", "", 0, False
        asked = asked | {"stream": True, "stream_options": {"include_usage": True}}
        async with self.http.stream("POST", "/v1/chat/completions", json=asked) as response:
            async for line in response.aiter_lines():
                if not line.startswith("data: "):
                    continue
                if done := line == "data: [DONE]":
                    continue
                chunk = json.loads(line[6:])
                for choice in chunk["choices"]:
                    if choice["delta"].get("content") and not text:
                        self.report.first.append(time.monotonic() - start)
                    text += choice["delta"].get("content") or ""
                    reason = choice["finish_reason"] or reason
                tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
        return text, reason if done else "cut off", tokens

    def check(self, prompt: str, tokens: int, text: str, reason: str, used: int) -> None:
        self.report.done += 1
        self.report.tokens += used
        if reason not in ("stop", "length") or used > tokens or (reason == "length" and used != tokens):
            self.report.wrong[f"{reason} after {used} of {tokens}"] += 1
        if not self.alone[prompt].startswith(text.rstrip("\ufffd")):
            self.report.differs += 1


def request(model: str, prompt: str, tokens: int) -> dict[str, Any]:
    turn = {"role": "user", "content": prompt}
    return {"model": model, "messages": [turn], "max_tokens": tokens, "temperature": 0}


async def storm(url: str, model: str, clients: int, seconds: float, pid: int = 0) -> Report:
    """The clients, until the time is over and each has its last answer; then how the server stands."""
    report = Report()
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits, trust_env=False) as http:
        alone = {}
        for prompt in PROMPTS:
            body = (await http.post("/v1/chat/completions", json=request(model, prompt, LONGEST))).json()
            alone[prompt] = body["choices"][0]["message"]["content"]
        start = time.monotonic()
        watch = asyncio.create_task(watch_memory(pid, report, start)) if pid else None
        crowd = [Client(http, model, alone, report, seed) for seed in range(clients)]
        await asyncio.gather(*(client.run(start + seconds) for client in crowd))
        report.seconds = time.monotonic() - start
        if watch:
            watch.cancel()
        await asyncio.sleep(1)  # the last that left are noticed
        held = await gauges(http)
        for name in ("running", "waiting", "cache_tokens_used"):
            if held[name]:
                report.wrong[f"{name} is {held[name]:g} at the end"] += 1
    return report


async def gauges(http: httpx.AsyncClient) -> dict[str, float]:
    text = (await http.get("/metrics")).text
    return {name: float(value) for name, value in re.findall(r"^minitune_(\w+) ([\d.e+-]+)$", text, re.M)}


async def watch_memory(pid: int, report: Report, start: float) -> None:
    while True:
        status = Path(f"/proc/{pid}/status").read_text()
        report.memory.append((time.monotonic() - start, int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024))  # type: ignore[index]
        await asyncio.sleep(0.5)


def own_server(model: str, argv: list[str]) -> tuple[subprocess.Popen[str], str]:
    """`minitune serve` on a free port, once it is ready.

    The cache is small: its memory becomes the process's as it is first used, and what is kept of finished answers
    uses all of it sooner or later. A small one is full before the second quarter.
    """
    command = [sys.executable, "-m", "minitune", "serve", "--model", model, "--port", "0", "--cache_tokens", "4096"]
    command += argv
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:  # type: ignore[union-attr]
        print(line, end="", file=sys.stderr)
        if found := re.search(r"serving .* on (http://\S+?)/ ", line):
            return process, found[1]
    raise SystemExit("the server did not start")


def show(report: Report) -> None:
    first = sorted(report.first)
    print(f"{report.done} answers, {report.tokens} tokens, {report.left} clients left early, {report.seconds:.0f} s")
    print(f"{report.tokens / report.seconds:.1f} tok/s; first text: median {statistics.median(first):.2f} s, ", end="")
    print(f"99 % {first[int(len(first) * 0.99)]:.2f} s")
    print(f"not what they are alone: {report.differs}; wrong: {dict(report.wrong) or 'nothing'}")
    if report.memory:
        quarters = [report.memory[min(len(report.memory) - 1, len(report.memory) * i // 4)] for i in range(5)]
        print("memory, MiB: " + ", ".join(f"{m:.0f} at {t:.0f} s" for t, m in quarters), end="")
        print(f"; growth from the second quarter to the last {report.growth():+.1f}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--url", help="a server that runs already")
    parser.add_argument("--pid", type=int, default=0, help="its process, for its memory")
    asked, rest = parser.parse_known_args()
    process = None
    url, pid = asked.url, asked.pid
    if not url:
        process, url = own_server(asked.model, rest)
        pid = process.pid
    try:
        report = asyncio.run(storm(url, asked.model, asked.clients, asked.seconds, pid))
    finally:
        if process:
            process.send_signal(signal.SIGTERM)
            code = process.wait(30)
    show(report)
    grown = bool(report.memory) and report.growth() > max(16, 0.02 * report.memory[-1][1])
    failed = bool(report.wrong or report.differs or grown or (process and code))
    print("FAILED" if failed else "nothing lost, memory flat")
    return int(failed)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
