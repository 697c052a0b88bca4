"""What DeepSpeed is told of a run."""

from typing import Any

from trainer.settings.config import RunConfig
from trainer.settings.parallel import ParallelPlan


def deepspeed_settings(config: RunConfig, plan: ParallelPlan) -> dict[str, Any]:
    """The settings for DeepSpeed: the section `deepspeed` of the run, and values from our other keys."""
    stage, in_bf16 = config.zero_stage, config.dtype == "bf16"
    settings: dict[str, Any] = {
        # torch's AdamW can update CPU tensors; DeepSpeed's would have to be compiled
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        **config.deepspeed,
        "train_batch_size": plan.global_batch_size,
        "train_micro_batch_size_per_gpu": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.gradient_accumulation_steps,
        # DeepSpeed's norm is wrong for experts without ZeRO, so `Engine` clips at stage 0
        "gradient_clipping": config.optimizer.max_grad_norm if stage > 0 else 0.0,
        "steps_per_print": None,
        # ZeRO-1 frees each bf16 gradient as soon as it is added to the fp32 sum
        "bf16": {"enabled": in_bf16, "immediate_grad_update": in_bf16 and stage == 1},
    }
    if in_bf16 and stage > 0:
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
        settings.setdefault("communication_data_type", "fp32")  # else sums over ranks are rounded to bf16
    return settings
