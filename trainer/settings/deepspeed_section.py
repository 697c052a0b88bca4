"""Checks of the section `deepspeed`, which is given to DeepSpeed as it is. Torch-free."""

from typing import Any

from trainer.settings.typed import similar

# Keys of DeepSpeed that our own keys set: the same number in two places could differ.
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
# The known top-level keys: DeepSpeed silently ignores others, so that a typo would have no effect.
_DEEPSPEED = {
    *("zero_optimization", "zero_force_ds_cpu_optimizer", "communication_data_type", "prescale_gradients"),
    *("gradient_predivide_factor", "sparse_gradients", "wall_clock_breakdown", "memory_breakdown"),
    *("comms_logger", "flops_profiler", "activation_checkpointing"),
}


_ZERO = "deepspeed.zero_optimization"
# Keys of zero_optimization that cannot work here, and why.
_REFUSED = {
    "offload_param": "weights stay on the device; use offload_optimizer, or deepspeed=zero3",
    "zero_hpz_partition_size": "DeepSpeed cannot partition experts twice",
    "zero_quantized_weights": "weights would differ from the checkpoints",
    "zero_quantized_nontrainable_weights": "weights would differ from the checkpoints",
    "zero_quantized_gradients": "DeepSpeed cannot quantise gradients of experts",
    "mics_shard_size": "DeepSpeed cannot partition experts twice",
    "zenflow": "checkpoints hold the states of AdamW only",
    "cpu_offload": "deprecated in DeepSpeed; use offload_optimizer.device=cpu",
}


def deepspeed_problems(section: dict[str, Any], dtype: str) -> list[str]:
    """Keys that are unknown, set by our own keys, not supported, or contradictory, one line each."""
    found = []
    for key in section:
        if key in _OURS:
            found.append(f"deepspeed.{key} is set by {_OURS[key]}; remove it")
        elif key not in _DEEPSPEED:
            near = similar(key, _DEEPSPEED)
            found.append(f"deepspeed.{key} is unknown{near}; use one of {sorted(_DEEPSPEED)}")
    zero = section.get("zero_optimization", {})
    zero = zero if isinstance(zero, dict) else {"stage": None}
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2, 3):
        found.append(f"{_ZERO}.stage={stage} is unknown; use 0, 1, 2 or 3")
    found += [f"{_ZERO}.{key} is not supported: {why}" for key, why in _REFUSED.items() if zero.get(key)]
    if zero.get("compute_grad_norm") is False:
        found.append(f"{_ZERO}.compute_grad_norm=false is not supported: every step needs the norm")
    reduced_in = section.get("communication_data_type")
    if reduced_in is not None and (dtype != "bf16" or stage not in (2, 3)):
        found.append(
            f"deepspeed.communication_data_type={reduced_in} has an effect only with dtype=bf16 and ZeRO "
            "2 or 3; remove it: gradients are summed in fp32"
        )
    return found + _offload_problems(zero.get("offload_optimizer"), stage, section)


def _offload_problems(offload: Any, stage: Any, section: dict[str, Any]) -> list[str]:
    """What is wrong with the keys that move optimizer states to host memory."""
    key = f"{_ZERO}.offload_optimizer"
    if offload is None:
        return []
    if not isinstance(offload, dict):
        return [f"{key}={offload} is not a group of keys; use {key}.device=cpu"]
    device, found = str(offload.get("device", "none")), []
    if device not in ("none", "cpu") or offload.get("ratio", 1) != 1 or offload.get("super_offload"):
        found.append(
            f"{key}: checkpoints need optimizer states in memory; use device=cpu with ratio=1 and without "
            "super_offload, or device=none"
        )
    if device == "none":
        return found
    if stage == 0:
        found.append(f"{key}.device={device} needs ZeRO 1, 2 or 3, but {_ZERO}.stage=0; use deepspeed=zero1")
    if offload.get("nvme_path"):
        found.append(f"{key}.nvme_path={offload['nvme_path']} contradicts device={device}; remove it")
    if section.get("zero_force_ds_cpu_optimizer"):
        found.append(
            "deepspeed.zero_force_ds_cpu_optimizer=true contradicts offload_optimizer: torch's AdamW "
            "updates the states, also those in host memory; remove it"
        )
    return found
