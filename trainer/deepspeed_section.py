"""What the section `deepspeed` may say: DeepSpeed's own keys, but those that other keys of ours set."""

from typing import Any

from trainer.typed import similar

# Keys of DeepSpeed that other keys of ours set; a second place for the same number would be a contradiction.
_OURS = {
    "train_batch_size": "stage.global_batch_size",
    "train_micro_batch_size_per_gpu": "micro_batch_size",
    "gradient_accumulation_steps": "micro_batch_size (accumulation follows)",
    "gradient_clipping": "optimizer.max_grad_norm",
    "scheduler": "schedule",
    "wandb": "tracker",
    "expert_parallel": "parallel.ep_size",
    **dict.fromkeys(("bf16", "fp16", "data_types"), "dtype"),
    **dict.fromkeys(("sequence_parallel_size", "data_parallel_size"), "parallel"),
    **{key: key for key in ("optimizer", "checkpoint")},
}
# DeepSpeed ignores an unknown top-level key in silence: a typo would do nothing.
_DEEPSPEED = {
    *("zero_optimization", "zero_force_ds_cpu_optimizer", "communication_data_type", "prescale_gradients"),
    *("gradient_predivide_factor", "sparse_gradients", "wall_clock_breakdown", "memory_breakdown"),
    *("comms_logger", "flops_profiler", "activation_checkpointing"),
}


def deepspeed_problems(section: dict[str, Any]) -> list[str]:
    """Every broken law, one line each: key, law, remedy."""
    found = []
    for key in section:
        if key in _OURS:
            found.append(f"deepspeed.{key} is set by {_OURS[key]}; remove it")
        elif key not in _DEEPSPEED:
            near = similar(key, _DEEPSPEED)
            found.append(f"deepspeed.{key} is unknown{near}; use one of {sorted(_DEEPSPEED)}")
    zero = section.get("zero_optimization", {})
    zero = zero if isinstance(zero, dict) else {"stage": None}
    stage, offload = zero.get("stage", 0), zero.get("offload_optimizer")
    if stage not in (0, 1, 2, 3):
        found.append(f"deepspeed.zero_optimization.stage={stage} is unknown; use 0, 1, 2 or 3")
    if isinstance(offload, dict) and (offload.get("device") == "nvme" or offload.get("ratio", 1) != 1):
        found.append(
            "deepspeed.zero_optimization.offload_optimizer: checkpoints need optimizer states in memory; "
            "use device=cpu with ratio=1, or none"
        )
    return found
