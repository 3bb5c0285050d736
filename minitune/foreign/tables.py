"""All names in one table a command, and how a file shows whose it is."""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import TYPE_CHECKING, Any

from minitune.foreign import axolotl, llama_factory, swift, trainer
from minitune.foreign.rules import Refused, Rule, no_effect, only, plain

if TYPE_CHECKING:
    from minitune.foreign.reading import Context, Item

PROGRAMS = (llama_factory, swift, axolotl)
# Sections that a script or a file puts around settings.
SECTIONS: tuple[str, ...] = (
    "LoraConfig",
    "TrainingArguments",
    "SFTConfig",
    "BitsAndBytesConfig",
    "peft_config",
    "lora_config",
)
SECTIONS += ("training_args", "training_arguments", "sft_config", "peft")
FAMILIES = {**axolotl.FAMILIES, **swift.FAMILIES, **llama_factory.FAMILIES}
TRAIN: dict[str, Rule] = {}
for _program in (trainer, axolotl, swift, llama_factory):
    TRAIN |= {**_program.NO_EFFECT, **_program.ONLY, **_program.BECOMES}


def program(names: Container[str]) -> str:
    """Whose file the names show it to be; "" where they are transformers' and ours alone."""
    for one in (llama_factory, swift):
        if any(name in names for name in one.MARKS):
            return one.NAME
    return axolotl.NAME if "base_model" in names and any(name in names for name in axolotl.MARKS) else ""


def fill(context: Context) -> None:
    """The program's own defaults for what its file leaves out, where they differ from ours."""
    one = next((p for p in PROGRAMS if context.program == p.NAME), None)
    for name, value in one.defaults(context).items() if one else ():
        if name not in context.values:
            context.fill(name, value)


def renamed(ours: str) -> Rule:
    def rule(item: Item, context: Context) -> dict[str, Any]:
        return {} if plain(item.value) is None else {ours: item.value}

    return rule


def greedy(item: Item, context: Context) -> dict[str, Any]:
    return {"temperature": 0.0} if plain(item.value) is False else {}


def top_k(item: Item, context: Context) -> dict[str, Any]:
    return {"top_k": 0 if plain(item.value) in (-1, None) else item.value}


def one_adapter(item: Item, context: Context) -> dict[str, Any]:
    names = item.value if isinstance(item.value, list) else str(item.value).split(",")
    if len(names) > 1:
        raise Refused("one adapter at a time: merge the first with `minitune export`")
    return {"adapter": str(names[0]).strip()}


_BOTH = no_effect(
    {
        "a model is served by the template it was trained with": "template",
        "no code of a checkpoint is run": "trust_remote_code",
        "an adapter says itself what it is": "finetuning_type stage",
        "what is computed how is chosen by the hardware": "flash_attn infer_backend use_kv_cache offload_folder",
    }
)
_BOTH |= only(
    ((), "the base is read in 16 bits; leave it out", "quantization_bit"),
    ((True,), "special tokens are not shown; leave it out", "skip_special_tokens"),
    ((1,), "one answer is drawn token by token; leave it out", "num_beams length_penalty"),
    (("main", "master"), "fetch it with `minitune download MODEL --revision R`", "model_revision"),
)
_BOTH |= {"adapter_name_or_path": one_adapter, "adapters": one_adapter}
CHAT: dict[str, Rule] = {
    **_BOTH,
    "default_system": renamed("system"),
    "infer_dtype": trainer.dtype,
    "torch_dtype": trainer.dtype,
    "do_sample": greedy,
    "top_k": top_k,
    **no_effect({"max_new_tokens says it": "max_length", "answers are always shown as they come": "stream"}),
}
EXPORT: dict[str, Rule] = {
    **_BOTH,
    **no_effect({"shards are as large as they need be": "export_size", "one tensor at a time": "export_device"}),
    **only(
        ((False,), "weights are written as safetensors; leave it out", "export_legacy_format"),
        ((), "write --quant, where the format has one; leave it out", "export_quantization_bit"),
        ((), "upload the finished folder with the hub's own client", "export_hub_model_id"),
    ),
    **no_effect({"goes with a switch that is off": "export_quantization_dataset export_quantization_nsamples"}),
    "export_dir": renamed("output"),
}
TABLES = {"train": TRAIN, "chat": CHAT, "export": EXPORT}
FINISH: dict[str, tuple[Callable[[Context], None], ...]] = {"train": (*trainer.FINISH[:1], fill, *trainer.FINISH[1:])}
