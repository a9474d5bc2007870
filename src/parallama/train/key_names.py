"""What others call the keys of a training run, to answer an unknown one with ours. Pure."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_OTHERS: dict[str, str] = {
    "model": "model_name_or_path model_name base_model model_id model_path checkpoint_dir "
    "pretrained_model pretrained_model_name_or_path",
    "data": "dataset datasets train_data train_file train_files dataset_name dataset_path "
    "data_path data_dir train_dataset training_data",
    "out": "output_dir output out_dir save_dir output_path adapter_path run_dir save_path",
    "steps": "max_steps iters iterations num_steps train_steps total_steps max_iters "
    "num_train_steps train_iters",
    "epochs": "num_train_epochs num_epochs n_epochs max_epochs train_epochs",
    "mesh": "tp tensor_parallel_size tensor_parallel tp_size dp data_parallel world_size "
    "num_devices num_gpus nproc_per_node parallelism",
    "backend": "device accelerator devices platform",
    "batch_size": "per_device_train_batch_size train_batch_size micro_batch_size mbs bs "
    "train_micro_batch_size_per_gpu global_batch_size batch",
    "grad_accum": "gradient_accumulation_steps gradient_accumulation accumulate_grad_batches "
    "grad_accumulation_steps accumulation_steps accum_steps grad_acc",
    "seq_len": "max_seq_length max_seq_len max_length sequence_len cutoff_len block_size "
    "context_length seq_length sequence_length model_max_length max_len",
    "packing": "sample_packing pack neat_packing",
    "split_answers": "mask_history train_on_last_turn split_turns split_conversations",
    "bad_rows": "skip_bad_rows on_bad_row skip_errors ignore_errors",
    "remat": "gradient_checkpointing grad_checkpoint activation_checkpointing "
    "activation_checkpoint recompute",
    "fsdp": "zero fully_sharded deepspeed zero_stage data_parallel_shard_degree",
    "sequence_parallel": "sp context_parallel",
    "dtype": "bf16 fp16 precision mixed_precision torch_dtype compute_dtype amp",
    "lora": "peft adapter use_lora use_peft peft_config qlora train_type fine_tune_type",
    "lora.rank": "lora_rank lora_r peft_r lora_dim lora.r",
    "lora.alpha": "lora_alpha lora.lora_alpha lora.scale",
    "lora.targets": "lora_target_modules lora_target target_modules lora_targets lora_modules "
    "lora.target_modules lora.target lora.keys lora.modules lora_keys",
    "lora.dropout": "lora_dropout lora.lora_dropout",
    "optimizer": "optim opt optimizer_type optimizer_name",
    "lr": "learning_rate max_lr peak_lr base_lr learningrate",
    "schedule": "lr_scheduler_type lr_scheduler scheduler lr_schedule lr_decay_style",
    "warmup_steps": "warmup warmup_ratio num_warmup_steps warmup_iters lr_warmup_steps",
    "min_lr_ratio": "min_lr cosine_min_lr_ratio final_lr end_lr lr_min min_lr_rate",
    "beta1": "adam_beta1 betas b1",
    "beta2": "adam_beta2 b2",
    "eps": "adam_epsilon epsilon adam_eps",
    "weight_decay": "wd decay adam_weight_decay",
    "max_grad_norm": "grad_clip gradient_clipping gradient_clip_val clip_grad max_norm "
    "clip_grad_norm gradient_clip",
    "on_nonfinite": "skip_nan nan_policy skip_nan_steps logging_nan_inf_filter",
    "save_every": "save_steps save_interval checkpoint_interval save_freq checkpoint_every "
    "save_strategy steps_per_save",
    "keep_last": "save_total_limit keep_checkpoints max_checkpoints total_limit keep_latest_k",
    "resume": "resume_from_checkpoint auto_resume_from_checkpoints resume_adapter_file "
    "load_checkpoint checkpoint restore continue_from",
    "resume_with_changes": "override reset_optimizer ignore_changes force",
    "eval_data": "validation_data val_data eval_dataset validation_file val_file test_datasets "
    "eval_file validation_dataset",
    "eval_every": "eval_steps eval_interval val_interval steps_per_eval evaluation_strategy "
    "eval_strategy val_check_interval",
    "eval_batches": "max_eval_batches val_batches eval_iters max_eval_samples limit_val_batches",
    "sample_every": "generate_every sample_steps",
    "sample_prompts": "prompts generation_prompts",
    "report_to": "logger log_to tracker loggers wandb tensorboard use_wandb wandb_project",
    "export": "merge merge_adapter save_model merge_lora fuse",
    "cache": "cache_dir dataset_prepared_path tokenized_path preprocessing_cache",
    "seed": "random_seed data_seed",
}
_OURS = {name: ours for ours, names in _OTHERS.items() for name in names.split()}


def nearest(key: str, known: Iterable[str]) -> str | None:
    """The key of ours that another one means, or is a slip of; None if there is none near.

    Args:
        key: with the key that it stands below, as `lora.r`.
        known: our keys, those within others as `lora.rank`.
    """
    spelled = key.lower().replace("-", "_").replace("__", "_")
    if spelled in _OURS:
        return _OURS[spelled]
    near = difflib.get_close_matches(spelled, [*known], 1, 0.7)
    if near:
        return near[0]
    near = difflib.get_close_matches(spelled, _OURS, 1, 0.85)
    return _OURS[near[0]] if near else None
