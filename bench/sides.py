"""The sides of a measurement, each in a process of its own: the script calls itself with `--side NAME`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

MARK = "RESULT "


def give(result: dict[str, Any]) -> None:
    """In a side's process: what it measured, among whatever its libraries print."""
    print(MARK + json.dumps(result))


def take(side: str, threads: int = 0, quiet: bool = True) -> dict[str, Any] | None:
    """Runs a side and prints what it gives; None where it failed. threads: of OpenMP (0: as they are). quiet: its
    stderr is shown only where it failed."""
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    command = [sys.executable, *sys.argv, "--side", side]
    stderr = subprocess.PIPE if quiet else None
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment)
    lines = [line for line in run.stdout.splitlines() if line.startswith(MARK)]
    if not lines:
        print(f"{side} failed ({run.returncode}):\n{(run.stderr or '')[-2000:]}", file=sys.stderr, flush=True)
        return None
    result = json.loads(lines[0].removeprefix(MARK))
    print(side, json.dumps(result), flush=True)
    return result
