"""The result as the lines of a table: what is shown in the terminal and on the page, with the same words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from minitune.evaluate.subject import BASE, TUNED

Line = tuple[str, list[str]]


def names(result: dict[str, Any]) -> list[str]:
    return [name for name in (BASE, TUNED) if name in result["sides"]]


def table(result: dict[str, Any]) -> list[Line]:
    """(what, a value for each side) of everything that was measured, in reading order."""
    sides = names(result)
    out: list[Line] = []

    def add(what: str, part: dict[str, Any], show: Callable[[dict[str, Any]], str]) -> None:
        out.append((what, [show(part[side]) for side in sides]))

    for key, what in (("held_out", "held-out"), ("general", "general text")):
        if key in result:
            add(f"{what} loss, nats a token", result[key], lambda of: f"{of['loss']:.4f}")
            add(f"{what} perplexity", result[key], lambda of: number(of["perplexity"]))
    said = result.get("answers", {})
    if all(side in said for side in sides):
        first = said[sides[0]]
        add("answers that stop", said, lambda of: percent(of["stops"]))
        add("tokens an answer", said, lambda of: f"{of['tokens']:.0f}")
        add("4-grams that repeat", said, lambda of: percent(of["repetition"]))
        add("answers that end in a loop", said, lambda of: percent(of["loops"]))
        add("answers that repeat the question", said, lambda of: percent(of["echoes"]))
        if any(said[side]["empty"] for side in sides):
            add("empty answers", said, lambda of: percent(of["empty"]))
        if "recited" in first:
            add("recited from the training data", said, lambda of: percent(of["recited"]))
            add("the same, whole, word for word", said, lambda of: percent(of["recited_whole"]))
        if "scores" in first:
            add(f"BLEU ({first['scores']['tokenizer']})", said, lambda of: f"{of['scores']['bleu']:.1f}")
            add("ROUGE-1 F1", said, lambda of: f"{of['scores']['rouge1']:.1f}")
            add("ROUGE-2 F1", said, lambda of: f"{of['scores']['rouge2']:.1f}")
            add("ROUGE-L F1", said, lambda of: f"{of['scores']['rougeL']:.1f}")
    return out + tasks(result, sides)


def tasks(result: dict[str, Any], sides: list[str]) -> list[Line]:
    """A line a task and metric, with lm-eval's standard error."""
    found = [result.get("tasks", {}).get(side, {}) for side in sides]
    return [
        (f"{task}: {metric}", [with_error(of.get(task, {}), metric) for of in found])
        for task, metrics in found[0].items()
        for metric in metrics
        if "_stderr" not in metric and metric != "sample_len"
    ]


def percent(share: float) -> str:
    return f"{share:.0%}" if share in (0, 1) else f"{share:.1%}"


def number(value: float) -> str:
    return f"{value:,.2f}" if value < 1e6 else f"{value:.2e}"


def with_error(metrics: dict[str, float], metric: str) -> str:
    """A task's value and its standard error, where lm-eval gives one."""
    if metric not in metrics:
        return ""
    head, _, tail = metric.partition(" ")
    error = metrics.get(f"{head}_stderr{f' {tail}' if tail else ''}")
    return f"{metrics[metric]:.4f}" + (f" ± {error:.4f}" if isinstance(error, float) else "")


def remarks(result: dict[str, Any]) -> list[str]:
    """What the numbers say in words, and what a person should know of them."""
    out = []
    held = result.get("held_out")
    if held:
        rows, tokens = len(held[BASE]["rows"]), held[BASE]["tokens"]
        out.append(f"held out: {rows:,} rows of {', '.join(held['files'])}, {tokens:,} supervised tokens")
        if TUNED in held:
            before, after = held[BASE]["loss"], held[TUNED]["loss"]
            better = sum(a["loss"] < b["loss"] for a, b in zip(held[TUNED]["rows"], held[BASE]["rows"], strict=True))
            out.append(f"held-out loss {before:.4f} -> {after:.4f}; {better:,} of {rows:,} rows are better")
        last = names(result)[-1]
        several = len(held["files"]) > 1
        worst = sorted(held[last]["rows"], key=lambda row: -row["loss"])[:5]
        out.append(
            f"highest loss of {last}: " + ", ".join(f"{row_name(row, several)} ({row['loss']:.2f})" for row in worst)
        )
    if "verdict" in result.get("general", {}):
        out.append(result["general"]["verdict"])
    leaked = result.get("answers", {}).get("also_learned")
    if leaked:
        shown = ", ".join(row_name(row, several_files(result)) for row in leaked[:8]) + ", …" * (len(leaked) > 8)
        stand = "stands" if len(leaked) == 1 else "stand"
        out.append(f"{len(leaked)} of the questions {stand} in the training data with the same answer: {shown}")
    return out + result["notes"]


def row_name(row: dict[str, Any], several: bool) -> str:
    """A row by its number, and its file where there are several."""
    return f"row {row['row']} of {row['file']}" if several else f"row {row['row']}"


def several_files(result: dict[str, Any]) -> bool:
    return len(result["held_out"]["files"]) > 1


def marks(said: dict[str, Any]) -> list[str]:
    """What is to be noticed of an answer."""
    out = [] if said["finish"] == "stop" else [f"did not stop ({said['finish']})"]
    if said.get("shared", {}).get("recited"):
        out.append(f"recites row {said['shared']['row']} of {Path(said['shared']['file']).name}")
    return out
