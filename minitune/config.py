"""Settings, each once, documented beside its default. Flags, YAML and `--help` derive from these dataclasses."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints


class UserError(Exception):
    """A fault in what the user gave. The message is one line: the file, the row, what is wrong, the mend."""


def setting(default: Any, help: str, *, group: str = "", required: bool = False) -> Any:
    """A dataclass field with its one-line reason; `group` is its heading in `--help`."""
    return field(default=default, metadata={"help": help, "group": group, "required": required})


# Other projects' names for the same setting; accepted everywhere a setting is read.
ALIASES = {
    "model_name_or_path": "model",
    "output_dir": "output",
    "dataset": "data",
    "train_file": "data",
    "validation_file": "eval_data",
    "val_size": "eval_fraction",
    "finetuning_type": "method",
    "lora_rank": "lora_r",
    "r": "lora_r",
    "target_modules": "lora_target_modules",
    "lora_target": "lora_target_modules",
    "cutoff_len": "max_length",
    "max_seq_length": "max_length",
    "batch_size": "per_device_train_batch_size",
    "epochs": "num_train_epochs",
    "resume_from_checkpoint": "resume",
}


@dataclass(frozen=True)
class TemplateConfig:
    """How a conversation becomes token ids."""

    name: Literal["auto", "minicpm", "model"] = setting(
        "auto", "minicpm: <用户>…<AI>…; model: the checkpoint's own chat template; auto: what the checkpoint is"
    )
    bos: bool = setting(True, "begin each row with the BOS token, as chat does (minicpm)")
    strip: bool = setting(True, "strip white space around each content, as the official chat does (minicpm)")
    join: str = setting("", "what stands between `instruction` and `input`")


@dataclass(frozen=True)
class TrainConfig:
    """One training run."""

    model: str = setting("", "a folder, a hub name, or smollm2", group="what", required=True)
    data: str = setting("", "conversations: json, jsonl, csv or parquet", group="what", required=True)
    output: str = setting("", "the run's folder", group="what", required=True)
    method: Literal["lora", "full"] = setting("lora", "what is learned", group="what")
    resume: str = setting("", "go on from the newest checkpoint of --output, or from this folder", group="what")
    source: Literal["modelscope", "huggingface"] = setting("modelscope", "the hub asked first", group="what")

    max_length: int = setting(512, "tokens a row at most", group="data")
    overlong: Literal["cut", "drop", "error"] = setting("cut", "what happens to a longer row", group="data")
    eval_data: str = setting("", "held-out conversations", group="data")
    eval_fraction: float = setting(0.0, "hold out this part of --data instead", group="data")
    template: TemplateConfig = field(default_factory=TemplateConfig, metadata={"group": "template"})

    num_train_epochs: float = setting(3.0, "passes over the data", group="optimisation")
    max_steps: int = setting(0, "stop after this many steps (0: by epochs)", group="optimisation")
    per_device_train_batch_size: int = setting(4, "rows a micro-step", group="optimisation")
    gradient_accumulation_steps: int = setting(4, "micro-steps a step", group="optimisation")
    tokens_per_step: int = setting(0, "a step's size in tokens instead of rows (0: rows)", group="optimisation")
    learning_rate: float | None = setting(None, "1e-4 for LoRA, 1e-5 for every parameter", group="optimisation")
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = setting(
        "linear", "decay to zero, or none", group="optimisation"
    )
    warmup_steps: int = setting(0, "steps of linear warm-up", group="optimisation")
    warmup_ratio: float = setting(0.0, "the same as a part of all steps", group="optimisation")
    weight_decay: float = setting(0.0, "AdamW's, on matrices only", group="optimisation")
    adam_beta1: float = setting(0.9, "AdamW's first decay", group="optimisation")
    adam_beta2: float = setting(0.999, "AdamW's second decay", group="optimisation")
    adam_epsilon: float = setting(1e-8, "AdamW's epsilon", group="optimisation")
    max_grad_norm: float = setting(1.0, "clip the global gradient norm (0: never)", group="optimisation")
    seed: int = setting(42, "order of rows, initial adapter, dropout", group="optimisation")

    lora_r: int = setting(8, "rank", group="lora")
    lora_alpha: float = setting(32, "scale: alpha / r", group="lora")
    lora_dropout: float = setting(0.1, "dropout before A", group="lora")
    lora_target_modules: tuple[str, ...] | str = setting(
        ("q_proj", "k_proj", "v_proj", "o_proj"), "a list of names, or a regular expression", group="lora"
    )
    use_rslora: bool = setting(False, "scale by alpha / sqrt(r) instead", group="lora")

    device: str = setting("auto", "cuda where there is a card, else cpu", group="device")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto", "of the computation; auto: bfloat16 where the hardware multiplies it", group="device"
    )
    gradient_checkpointing: Literal["auto", "true", "false"] = setting(
        "auto", "recompute activations in backward to save memory", group="device"
    )
    tokens_per_pack: int = setting(
        8192, "tokens computed at once at most (CPU: 1024); a larger step accumulates", group="device"
    )

    logging_steps: int = setting(10, "steps between log rows on the screen", group="output")
    save_steps: int = setting(0, "steps between checkpoints (0: at the end of each epoch)", group="output")
    save_total_limit: int = setting(2, "checkpoints kept", group="output")
    eval_steps: int = setting(0, "steps between held-out losses (0: at the end of each epoch)", group="output")

    @property
    def resolved_learning_rate(self) -> float:
        if self.learning_rate is not None:
            return self.learning_rate
        return 1e-5 if self.method == "full" else 1e-4

    @property
    def rows_per_step(self) -> int:
        return self.per_device_train_batch_size * self.gradient_accumulation_steps


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
    """The settings of a YAML file as dotted names."""
    import yaml

    try:
        loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8-sig"))
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
    return flatten(loaded)


def to_yaml(config: Any) -> str:
    """Every setting, resolved, as YAML that `read_yaml` reads back."""
    import yaml

    plain = dataclasses.asdict(config)
    for key, value in plain.items():
        if isinstance(value, tuple):
            plain[key] = list(value)
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
