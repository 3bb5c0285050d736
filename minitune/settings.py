"""The mechanics of settings: dataclasses <-> flags' texts and YAML. Which settings there are is `config`'s business."""

from __future__ import annotations

import dataclasses
import difflib
import re
import sys
from dataclasses import field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints


class UserError(Exception):
    """A fault in what the user gave. The message is one line: the file, the row, what is wrong, the mend."""


def setting(default: Any, help: str, *, group: str = "", required: bool = False, unset: str = "none") -> Any:
    """A dataclass field with its one-line reason; `group` is its heading in `--help`, `unset` what None stands for."""
    return field(default=default, metadata={"help": help, "group": group, "required": required, "unset": unset})


# Other names for a setting, of equal meaning: accepted wherever settings are read. What has another meaning, or none
# here, is in `foreign/`.
OTHER_NAMES = {
    "model": "model_name_or_path model_path base_model base_model_name_or_path",
    "data": "dataset dataset_name train_file train_data_path",
    "output": "output_dir",
    "eval_data": "validation_file eval_data_path",
    "method": "finetuning_type tuner_type train_type sft_type",
    "resume": "resume_from_checkpoint",
    "max_length": "cutoff_len max_seq_length model_max_length sequence_len",
    "max_samples": "max_train_samples",
    "template.name": "template",
    "num_train_epochs": "num_epochs epochs",
    "per_device_train_batch_size": "batch_size micro_batch_size",
    "learning_rate": "lr",
    "lr_scheduler_type": "lr_scheduler",
    "lora_r": "lora_rank r",
    "lora_target_modules": "lora_target target_modules target_regex",
    "use_rslora": "peft_use_rslora",
    "dtype": "torch_dtype",
    "load_best_model_at_end": "keep_best",
}
ALIASES = {other: name for name, others in OTHER_NAMES.items() for other in others.split()}


def flat_fields(cls: type, prefix: str = "") -> dict[str, tuple[dataclasses.Field, Any]]:
    """{dotted name: (field, resolved type)} of a settings class, nested classes spelled with a dot."""
    hints = get_type_hints(cls)
    out: dict[str, tuple[dataclasses.Field, Any]] = {}
    for f in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[f.name]):
            out.update(flat_fields(hints[f.name], f"{prefix}{f.name}."))
        else:
            out[prefix + f.name] = (f, hints[f.name])
    return out


def canonical(name: str, known: dict[str, Any], where: str) -> str:
    """The setting's own name for a spelling with hyphens, an alias or a different case; UserError otherwise."""
    plain = name.strip().lstrip("-").replace("-", "_")
    plain = ALIASES.get(plain, plain)
    if plain in known:
        return plain
    near = difflib.get_close_matches(plain, [*known, *ALIASES], n=1, cutoff=0.6)
    hint = f"; did you mean {ALIASES.get(near[0], near[0])}?" if near else "; --help lists them all"
    raise UserError(f"{where}: unknown setting {name!r}{hint}")


def parse_value(name: str, value: Any, kind: Any, where: str) -> Any:
    """`value` (a flag's text or a YAML scalar) as `kind`; UserError when it can't be."""
    options = get_args(kind)
    if get_origin(kind) is Literal:
        text = str(value).lower() if isinstance(value, bool) else str(value)
        if text in options:
            return text
        raise UserError(f"{where}: {name} is {value!r}; it takes {', '.join(map(str, options))}")
    if get_origin(kind) is tuple or (options and any(get_origin(o) is tuple for o in options)):
        if isinstance(value, list | tuple):
            return tuple(str(v) for v in value)
        parts = tuple(str(value).replace(",", " ").split())
        return parts if all(p.isidentifier() for p in parts) else str(value)
    if options and type(None) in options:
        if value is None or str(value).lower() in ("none", "null", "auto", ""):
            return None
        kind = next(o for o in options if o is not type(None))
    if kind is bool:
        text = str(value).lower()
        if text in ("true", "1", "yes", "on"):
            return True
        if text in ("false", "0", "no", "off"):
            return False
        raise UserError(f"{where}: {name} is {value!r}; it takes true or false")
    if kind is str:  # YAML's own words for nothing, yes and no
        return "" if value is None or value is False else "true" if value is True else str(value)
    try:
        if isinstance(value, bool):
            raise ValueError
        if kind is int and not isinstance(value, int):
            number = float(value)
            if number != int(number):
                raise ValueError
            return int(number)
        return kind(value)
    except (TypeError, ValueError, OverflowError):
        noun = {int: "a whole number", float: "a number"}.get(kind, "text")
        raise UserError(f"{where}: {name} is {value!r}; it takes {noun}") from None


def build(cls: type, values: dict[str, Any], where: str = "settings") -> Any:
    """An instance of `cls` from dotted, possibly aliased names; unknown names and bad values are UserErrors."""
    known = flat_fields(cls)
    nested: dict[str, dict[str, Any]] = {}
    flat: dict[str, Any] = {}
    for name, value in values.items():
        key = canonical(name, known, where)
        parsed = parse_value(key, value, known[key][1], where)
        head, _, tail = key.partition(".")
        if tail:
            nested.setdefault(head, {})[tail] = parsed
        else:
            flat[key] = parsed
    hints = get_type_hints(cls)
    for head, inner in nested.items():
        flat[head] = hints[head](**inner)
    return cls(**flat)


def files_of(paths: str) -> list[str]:
    """The files that a setting names: one, or several with commas between."""
    if not paths or Path(paths).exists():
        return [paths] if paths else []
    return [path.strip() for path in paths.split(",") if path.strip()]


def flatten(mapping: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping (YAML) as dotted names."""
    out: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, dict):
            out.update(flatten(value, f"{prefix}{key}."))
        else:
            out[f"{prefix}{key}"] = value
    return out


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The settings of a YAML file as dotted names. A name that is written twice is a UserError."""
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        twice = _repeated(yaml.compose(text, Loader=yaml.SafeLoader))
        loaded = yaml.safe_load(text)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8; save the file as UTF-8") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" line {mark.line + 1}, column {mark.column + 1}:" if mark else ""
        raise UserError(f"{path}:{place} not YAML: {getattr(error, 'problem', error)}") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise UserError(f"{path}: settings are written `name: value`, one a line")
    if twice:
        raise UserError(f"{path}: line {twice[1]}: {twice[0]} is set a second time; keep one")
    return flatten(loaded)


def _repeated(node: Any) -> tuple[str, int] | None:
    """(name, line) of the first name that a YAML mapping holds twice: the later one would silently win."""
    if not hasattr(node, "value") or isinstance(node.value, str):
        return None
    pairs = [pair for pair in node.value if isinstance(pair, tuple)]
    seen: set[str] = set()
    for key, _ in pairs:
        if key.value in seen:
            return key.value, key.start_mark.line + 1
        seen.add(str(key.value))
    inner = [value for _, value in pairs] or [item for item in node.value if not isinstance(item, tuple)]
    return next((found for item in inner if (found := _repeated(item))), None)


def to_yaml(config: Any) -> str:
    """Every setting, resolved, as YAML that `read_yaml` reads back; the first line says which minitune wrote it."""
    import yaml

    plain = dataclasses.asdict(config)
    for key, value in plain.items():
        if isinstance(value, tuple):
            plain[key] = list(value)
    return f"# minitune {version()}\n" + yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


def version() -> str:
    """This package's version; it lies in the package itself, which no room may import."""
    return sys.modules[__name__.partition(".")[0]].__version__


def written_by(path: str | Path) -> str:
    """The version of minitune that wrote a run.yaml; "" where another hand did."""
    try:
        with Path(path).open(encoding="utf-8-sig") as file:
            found = re.match(r"# minitune (\d[\w.+-]*)\s*$", file.readline())
    except (OSError, UnicodeDecodeError):
        return ""
    return found[1] if found else ""


def bytes_of(text: str) -> int:
    """8GiB, 8GB, 6.5 GiB or a number of bytes; 0 for nothing. UserError for anything else."""
    if not text:
        return 0
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(?:([kmgt]?)(i?)b?)?\s*", text, re.IGNORECASE)
    size = 0.0
    if found:
        power = " kmgt".index(found[2].lower() or " ") if found[2] is not None else 0
        size = float(found[1]) * (1024 if found[3] else 1000) ** power
    if size < 2**28:
        raise UserError(f"memory is {text!r}; it takes a size such as 8GiB, 24GB or 6.5GiB")
    return int(size)
