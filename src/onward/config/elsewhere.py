"""What keys of other tools' configs are called here: transformers' Trainer, TRL, Axolotl, LLaMA-Factory, Unsloth."""

from __future__ import annotations

from collections.abc import Mapping

KEYS_ELSEWHERE = (
    (("model_name_or_path", "base_model", "model_name"), "`model`"),
    (("finetuning_type",), "`method`"),
    (("load_in_4bit", "load_in_8bit", "quantization_bit"), "`method: qlora`, a base in 4 bits"),
    (("lora_r", "lora_rank", "lora.r", "r"), "`lora.rank`"),
    (("lora_alpha",), "`lora.alpha`"),
    (("lora_dropout",), "`lora.dropout`"),
    (("lora_target", "lora_target_modules", "lora_target_linear", "target_modules"), "`lora.targets`"),
    (("additional_target", "lora_modules_to_save"), "`lora.modules_to_save`"),
    (("cutoff_len", "sequence_len", "max_seq_length", "max_seq_len", "model_max_length"), "`max_length`"),
    (("per_device_train_batch_size", "micro_batch_size"),
     "`batch_size`, all rows of an optimizer step: rows per device x accumulated batches x devices"),
    (("gradient_accumulation_steps",),
     "no key: `batch_size` is all rows of a step; `gradient_accumulation` only divides them to save memory"),
    (("num_train_epochs", "num_epochs"), "`epochs`, passes over each file"),
    (("max_steps",), "no key: every file is trained to its end; `cosine` and `linear` have `total_steps`"),
    (("lr",), "`learning_rate`"),
    (("lr_scheduler_type", "lr_scheduler"), "`schedule`"),
    (("warmup_ratio",), "`warmup_steps`: a stream has no length of which it could be a share"),
    (("cosine_min_lr_ratio",), "`min_learning_rate`"),
    (("optim",), "`optimizer`"),
    (("adam_beta1", "adam_beta2"), "`betas`"),
    (("adam_epsilon",), "`eps`"),
    (("bf16", "fp16", "torch_dtype", "precision"), "`dtype`"),
    (("gradient_checkpointing", "use_gradient_checkpointing"), "`activation_checkpointing`"),
    (("packing", "sample_packing", "padding_free", "group_by_length"),
     "no key: rows are laid end to end without padding wherever that is proven for the model"),
    (("flash_attention", "flash_attn", "attn_implementation", "liger_kernel", "torch_compile"),
     "no key: what the device and the model allow is used"),
    (("train_on_inputs", "train_on_prompt", "assistant_only_loss", "completion_only_loss"),
     "no key: the loss covers answers, and texts whole"),
    (("template",), "`chat_template`, if the tokenizer's own is not to be used"),
    (("dataset", "datasets", "dataset_dir", "train_file"),
     "no key: files are given to `onward train` or put into the inbox"),
    (("max_samples", "dataloader_num_workers", "preprocessing_num_workers", "dataset_num_proc"),
     "no key: a file is trained whole, and its tokens are made once"),
    (("stage", "do_train"), "no key: chats, completions and texts are trained; preferences are refused"),
    (("special_tokens",), "no key: the tokenizer's are used, and `tokens` adds new ones"),
    (("output_dir",), "the run's directory: `onward init DIR`"),
    (("resume_from_checkpoint", "auto_resume_from_checkpoints", "overwrite_output_dir"),
     "no key: every start goes on from the last commit; `onward adopt` takes a Trainer's checkpoint"),
    (("val_set_size", "eval_dataset", "test_size"), "`holdout`, or `evaluation.files` for files of your own"),
    (("eval_steps", "eval_strategy", "evaluation_strategy", "evals_per_epoch", "do_eval"),
     "no key: the model is measured after each file; `evaluation.share` bounds the cost"),
    (("load_best_model_at_end", "early_stopping_patience"),
     "no key: `guard.action: reject` takes back a file that harms the model"),
    (("logging_steps",), "`log_steps`"),
    (("save_strategy", "saves_per_epoch"), "`save_steps`, and always at the end of a file"),
    (("save_total_limit",), "`keep_boundaries` and `keep_days`"),
    (("report_to", "use_wandb", "wandb_project"), "`track`"),
    (("plot_loss",), "the command `onward plot`"),
    (("push_to_hub", "hub_model_id"), "the command `onward push`"),
    (("deepspeed", "fsdp", "fsdp_config"),
     "`sharding: full`, for models that do not fit one device; `onward train --devices N` alone where they do"),
    (("data_seed",), "`seed`"),
    (("neftune_noise_alpha", "label_smoothing_factor", "loraplus_lr_ratio", "trust_remote_code"), "not offered"),
)  # fmt: skip
"""Names that a key has elsewhere, and what it is here, as docs/config.md prints it."""


def _by_name() -> Mapping[str, str]:
    return {name: here.replace("`", "'") for names, here in KEYS_ELSEWHERE for name in names}


HERE = _by_name()
"""What is here in place of another tool's key, in words for a message."""
