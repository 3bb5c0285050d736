"""LLaMA-Factory's dataset_info.json: a data set's name -> its file, where its form is one that we read."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minitune.foreign.rules import Refused, Wrong, shown

INFO = "dataset_info.json"
PLACES = ("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")
# What a column is called in the forms that we read.
COLUMNS = {
    "prompt": ("instruction", "query", "prompt"),
    "query": ("input",),
    "response": ("output", "response", "completion"),
    "history": ("history",),
    "system": ("system",),
    "messages": ("messages", "conversations"),
}
TAGS = {
    "role_tag": ("role", "from"),
    "content_tag": ("content", "value"),
    "user_tag": ("user", "human"),
    "assistant_tag": ("assistant", "gpt"),
    "system_tag": ("system",),
}
TOOL_TAGS = ("observation_tag", "function_tag")  # a row with tool calls is refused by its number


def files(names: list[str], folder: str, named: bool, remark: Callable[[str], None]) -> list[str]:
    """The files of the data sets; `named`: names may be those of dataset_info.json in `folder`."""
    return [find(name, folder, remark) if named and not Path(name).is_file() else name for name in names]


def find(name: str, folder: str, remark: Callable[[str], None]) -> str:
    path = Path(folder) / INFO
    try:
        info = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError:
        raise Wrong(f"it is no file, and {path} can't be read: write the file's path, or dataset_dir") from None
    except ValueError as error:
        raise Wrong(f"{path} is not JSON ({error}); mend it, or write the file's path") from None
    if not isinstance(info, dict) or not isinstance(info.get(name), dict):
        near = difflib.get_close_matches(name, info if isinstance(info, dict) else (), n=1)
        raise Wrong(f"{path} has no {name}" + (f"; did you mean {near[0]}?" if near else "; write the file's path"))
    return checked(name, info[name], Path(folder), remark)


def checked(name: str, entry: dict[str, Any], folder: Path, remark: Callable[[str], None]) -> str:
    """The file of one entry; Refused where it is elsewhere or in a form that we don't read."""
    place = next((key for key in PLACES if entry.get(key)), None)
    if place:
        raise Wrong(f"{name} is not on this machine ({place}): download it, and write its file as data")
    file = folder / str(entry.get("file_name", ""))
    if not entry.get("file_name") or not file.is_file():
        raise Wrong(f"{name}: {file} is not a file: write the path of the data as data")
    if entry.get("ranking"):
        raise Refused(f"{name} holds preferences (ranking), of which sft has no use: write another")
    if entry.get("formatting", "alpaca") not in ("alpaca", "sharegpt", "openai"):
        raise Wrong(f"{name}: formatting {shown(entry['formatting'])}: write alpaca, sharegpt or openai")
    for key in ("subset", "split", "folder", "num_samples"):
        if entry.get(key) not in (None, "train"):
            raise Wrong(f"{name}: {key} {shown(entry[key])}: keep just those rows in the file (or --max_samples)")
    columns, tags = entry.get("columns") or {}, entry.get("tags") or {}
    for table, given, section in ((COLUMNS, columns, "columns"), (TAGS, tags, "tags")):
        for key, value in given.items():
            if key in TOOL_TAGS or value is None or value in table.get(key, ()):
                continue
            if key in table:
                raise Wrong(f"{name}: {section}.{key} is {shown(value)}: rename it to {table[key][0]} in {file}")
            if key != "tools":
                raise Refused(f"{name}: {section}.{key}: of text alone; write a data set of conversations")
    if (tags.get("role_tag", "from") == "from") != (tags.get("content_tag", "value") == "value"):
        raise Wrong(f"{name}: turns are written with role and content, or with from and value: rename one in {file}")
    unread = [key for key in ("query", "system", "history") if columns and key not in columns]
    if columns and entry.get("formatting", "alpaca") == "alpaca" and unread:
        keys = ", ".join(COLUMNS[key][0] for key in unread)
        remark(f"{name}: {keys} of a row count here, though its columns leave them out")
    return str(file)
