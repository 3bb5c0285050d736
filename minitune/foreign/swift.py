"""ms-swift's names: the flags of `swift sft`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from minitune.foreign.rules import Refused, Rule, no_effect, only, plain

if TYPE_CHECKING:
    from minitune.foreign.reading import Context, Item

NO = (False,)
NAME = "ms-swift"
MARKS = ("tuner_type", "train_type", "sft_type")
NO_EFFECT = no_effect(
    {
        "rows are tokenised once and held ready": "load_from_cache_file lazy_tokenize dataset_shuffle "
        "val_dataset_shuffle packing_num_proc packing_length train_dataloader_shuffle download_mode "
        "shuffle_buffer_size",
        "what is computed how is chosen by the hardware": "attn_impl use_logits_to_keep lora_dtype tuner_backend "
        "sequence_parallel_size experts_impl",
        "read from the checkpoint": "model_type max_model_len",
        "of ms-swift's own data": "model_author model_name",
        "log.jsonl and loss.png hold every step": "acc_strategy",
        "a faulty row stops the run, by name": "strict",
        "a run's folder is --output itself, in safetensors": "add_version create_checkpoint_symlink safe_serialization "
        "max_shard_size",
        "the download is checked": "check_model",
        "goes with a switch that is off": "router_aux_loss_coef merge_lora ignore_args_error load_args load_data_args",
    }
)
FAMILIES = dict.fromkeys(("lora_ga_", "lisa_", "adalora_", "boft_", "vera_", "reft_", "fourier_"), "another tuner's")
FAMILIES |= dict.fromkeys(("llamapro_", "lmdeploy_", "freeze_", "vit_", "aligner_"), "not of LoRA on text")
ONLY = only(
    (("default",), "only answers are learned: write loss_scale: default", "loss_scale"),
    ((), "A and B learn at one rate; leave it out", "lorap_lr_ratio"),
    ((True,), "A is drawn from the seed and B is zero; leave it out", "init_weights"),
    ((), "write it into the rows as `system`", "system"),
    ((), "an adapter is not trained further: merge it with `minitune export`, and train on the result", "adapters"),
    ((), "--method full trains every parameter, lora none of the base; leave it out", "trainable_parameters"),
    (NO, "not one of minitune's methods (lora, full); leave it out", "enable_dft_loss enable_channel_loss"),
    (NO, "--resume brings the whole state back; leave it out", "resume_only_model"),
    ((), "no code of others is run; leave it out", "external_plugins callbacks"),
    ((), "rename the keys in the file: instruction, input, output", "columns"),
    ((), "leave it out", "model_kwargs new_special_tokens custom_dataset_info max_epochs"),
)


def truncation(item: Item, context: Context) -> dict[str, Any]:
    became = {"delete": "drop", "right": "cut"}.get(str(item.value))
    if became is None:
        raise Refused("write truncation_strategy: delete or right")
    return {"overlong": became}


def use_hf(item: Item, context: Context) -> dict[str, Any]:
    return {"source": "huggingface" if plain(item.value) else "modelscope"}


def ratio(item: Item, context: Context) -> dict[str, Any]:
    return {"eval_fraction": plain(item.value) or 0.0}


BECOMES: dict[str, Rule] = {
    "truncation_strategy": truncation,
    "use_hf": use_hf,
    "split_dataset_ratio": ratio,
}


def defaults(context: Context) -> dict[str, Any]:
    """What `swift sft` takes where nothing is said, as far as it changes what is computed."""
    batch = context.values.get("per_device_train_batch_size", 1)
    return {
        "method": "lora",
        "lora_r": 8,
        "lora_alpha": 32.0,
        "lora_dropout": 0.05,
        "lora_target_modules": "all-linear",
        "max_length": 4096,  # there: the model's own
        "overlong": "drop",
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": math.ceil(16 / batch),
        "lr_scheduler_type": "cosine",
        "weight_decay": 0.1,
        "adam_beta2": 0.95,
        "template.join": "\n",
    }
