"""Settings, each once, documented beside its default. Flags, YAML and `--help` derive from these dataclasses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from minitune.settings import (
    ALIASES,
    UserError,
    build,
    bytes_of,
    canonical,
    files_of,
    flat_fields,
    flatten,
    parse_value,
    read_yaml,
    setting,
    to_yaml,
    version,
    written_by,
)

__all__ = [
    "ALIASES",
    "TemplateConfig",
    "TrainConfig",
    "UserError",
    "build",
    "bytes_of",
    "canonical",
    "files_of",
    "flat_fields",
    "flatten",
    "parse_value",
    "read_yaml",
    "setting",
    "to_yaml",
    "version",
    "written_by",
]


@dataclass(frozen=True)
class TemplateConfig:
    """How a conversation becomes token ids."""

    name: Literal["auto", "minicpm", "model"] = setting(
        "auto", "minicpm: <用户>…<AI>…; model: the checkpoint's own chat template; auto: what the checkpoint is"
    )
    bos: bool = setting(True, "begin each row with BOS, since chat does (minicpm)")
    strip: bool = setting(True, "strip white space around each content, since the official chat does (minicpm)")
    join: str = setting("", "what stands between `instruction` and `input`; nothing, as in the tutorial")


@dataclass(frozen=True)
class TrainConfig:
    """One training run."""

    model: str = setting("", "a folder, a hub name, or smollm2", group="start here", required=True)
    data: str = setting(
        "",
        "conversations: json, jsonl, csv or parquet; several files: commas between",
        group="start here",
        required=True,
    )
    output: str = setting(
        "", "the run's folder; one that holds a run is never overwritten", group="start here", required=True
    )
    method: Literal["lora", "qlora", "full"] = setting(
        "lora",
        "what learns; lora: a small adapter, fits small cards; qlora: the same over a base in 4 bits; "
        "full: every parameter",
        group="start here",
    )
    num_train_epochs: float = setting(
        3.0, "passes over the data; more on few rows is recited, not learned", group="start here"
    )
    learning_rate: float | None = setting(
        None,
        "the highest rate; an adapter starts at nothing and wants more than a trained model stands",
        group="start here",
        unset="1e-4; full: 1e-5",
    )
    eval_fraction: float = setting(0.0, "hold out this part of --data: its loss says when to stop", group="start here")
    resume: str = setting("", "go on from the newest checkpoint of --output, or from this folder", group="start here")

    eval_data: str = setting("", "held-out conversations, in a file of their own", group="data")
    eval_rows: int = setting(0, "hold out this many rows of --data instead of a part", group="data")
    max_samples: int = setting(0, "read this many rows of each file at most, for a trial (0: all)", group="data")
    max_length: int = setting(
        512, "tokens a row at most; short rows cost nothing, since nothing is padded", group="data"
    )
    overlong: Literal["cut", "drop", "error"] = setting(
        "cut", "a longer row loses its tail (and learns no end), is left out, or stops the run", group="data"
    )
    source: Literal["modelscope", "huggingface"] = setting(
        "modelscope", "the hub asked first for --model", group="data"
    )
    template: TemplateConfig = field(default_factory=TemplateConfig, metadata={"group": "template"})

    per_device_train_batch_size: int = setting(4, "rows a micro-step", group="optimisation")
    gradient_accumulation_steps: int = setting(
        4, "micro-steps a step; only the product, a step's rows, matters", group="optimisation"
    )
    tokens_per_step: int = setting(
        0, "a step's size in tokens, for rows of very unequal length (0: in rows)", group="optimisation"
    )
    max_steps: int = setting(0, "stop after this many steps (0: by epochs)", group="optimisation")
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = setting(
        "linear", "how the rate falls: to zero in a line, in a half wave, or not", group="optimisation"
    )
    warmup_steps: int = setting(0, "steps in which the rate rises from zero", group="optimisation")
    warmup_ratio: float = setting(0.0, "the same as a part of all steps", group="optimisation")
    weight_decay: float = setting(0.0, "AdamW's, on matrices only", group="optimisation")
    adam_beta1: float = setting(0.9, "how long AdamW remembers the gradient", group="optimisation")
    adam_beta2: float = setting(0.999, "how long AdamW remembers its square", group="optimisation")
    adam_epsilon: float = setting(1e-8, "keeps AdamW from dividing by zero", group="optimisation")
    max_grad_norm: float = setting(
        1.0, "a step's gradient is shortened to this length (0: never)", group="optimisation"
    )
    optim: Literal["auto", "adamw", "adamw_8bit", "adamw_8bit_in_backward"] = setting(
        "auto",
        "--method full: bits of AdamW's moments, 32 or 8; in_backward: no gradient is kept, each is clipped by itself, "
        "to its share; auto: the first that fits",
        group="optimisation",
    )
    seed: int = setting(
        42, "order of rows, initial adapter, dropout: the same seed, the same run", group="optimisation"
    )

    lora_r: int = setting(8, "rank: how much an adapter can hold; style needs little, knowledge more", group="LoRA")
    lora_alpha: float = setting(32.0, "the adapter counts alpha / r times; change it with r", group="LoRA")
    lora_dropout: float = setting(0.1, "part of its input an adapter does not see while it learns", group="LoRA")
    lora_target_modules: tuple[str, ...] | str = setting(
        ("q_proj", "k_proj", "v_proj", "o_proj"),
        "linears that get an adapter: names, a regular expression, or all-linear",
        group="LoRA",
    )
    use_rslora: bool = setting(False, "count alpha / sqrt(r) times, for high ranks", group="LoRA")

    device: str = setting("auto", "cuda where there is a card, else cpu", group="hardware")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto", "of the computation; auto: bfloat16 where the hardware multiplies it", group="hardware"
    )
    memory: str = setting(
        "", "a bound for the whole process on the card, such as 8GiB; what fits is chosen, and held", group="hardware"
    )
    gradient_checkpointing: Literal["auto", "true", "false"] = setting(
        "auto", "recompute activations in backward: a third more time for much less memory", group="hardware"
    )
    tokens_per_pack: int = setting(
        8192, "tokens computed at once at most (CPU: 1024): memory, never the result", group="hardware"
    )
    deepspeed: str = setting(
        "", "DeepSpeed's JSON file (ZeRO 1, 2 or 3, offload): its engine holds what learns", group="hardware"
    )
    join_timeout: float = setting(
        300.0, "seconds in which all processes of a run must meet, where a launcher starts several", group="hardware"
    )

    logging_steps: int = setting(
        10, "steps between lines on the screen; log.jsonl has every step", group="log and checkpoints"
    )
    profile: bool = setting(False, "say at the end where each second went", group="log and checkpoints")
    save_steps: int = setting(0, "steps between checkpoints (0: at the end of each epoch)", group="log and checkpoints")
    save_total_limit: int = setting(2, "checkpoints kept", group="log and checkpoints")
    eval_steps: int = setting(0, "steps between held-out losses (0: at the end of each epoch)", group="held-out loss")
    early_stopping_patience: int = setting(
        0, "stop after this many held-out losses without a better one (0: never)", group="held-out loss"
    )
    early_stopping_threshold: float = setting(
        0.0, "what counts as better: lower by more than this", group="held-out loss"
    )
    load_best_model_at_end: bool = setting(
        False, "end with the weights of the lowest held-out loss; their checkpoint is kept", group="held-out loss"
    )
    track: tuple[str, ...] = setting(
        (), "tensorboard, wandb, swanlab, or several: offline, in the run's folder", group="watching"
    )
    watch: str = setting("", "prompts, one a line (or .jsonl messages), answered while it learns", group="watching")
    watch_steps: int = setting(
        0, "steps between such answers (0: at the end of each epoch); also before the first step",
        group="watching",
    )  # fmt: skip
    watch_max_new_tokens: int = setting(64, "tokens of such an answer at most", group="watching")
    watch_temperature: float = setting(
        0.0, "0: always the likeliest token, so that only the weights differ", group="watching"
    )

    @property
    def resolved_learning_rate(self) -> float:
        if self.learning_rate is not None:
            return self.learning_rate
        return 1e-5 if self.method == "full" else 1e-4

    @property
    def rows_per_step(self) -> int:
        return self.per_device_train_batch_size * self.gradient_accumulation_steps
