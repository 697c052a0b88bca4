"""The alternatives of a user, each as a function that returns its training step."""

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from work import BETAS, CLIP, DECAY, EPS, LEARNING_RATE, Work, device


def hf_model(work: Work, implementation: str) -> Any:
    """transformers' model in fp32, with its own initial values."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(**work.model_keys(), attn_implementation="sdpa", output_router_logits=True)
    config._experts_implementation = implementation
    config.use_cache = False
    return Qwen3MoeForCausalLM(config)


def transformers(work: Work, implementation: str = "grouped_mm") -> tuple[Callable[[], float], Any]:
    """transformers' model with its own losses, torch's clipping and fused AdamW."""
    model = hf_model(work, implementation).to(device(), work.torch_dtype)
    optimizer = torch.optim.AdamW(
        model.parameters(), LEARNING_RATE, BETAS, EPS, weight_decay=DECAY, fused=True
    )
    tokens = work.tokens(0, 1)
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step() -> float:
        output = model(input_ids=inputs, labels=labels, shift_labels=labels)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return float(output.loss.detach())

    return step, None


def autoep(work: Work) -> tuple[Callable[[], float], Any]:
    """transformers' model under DeepSpeed AutoEP, ep_size = world size."""
    import deepspeed

    join_deepspeed()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    model = hf_model(work, "grouped_mm")
    settings = {
        "train_micro_batch_size_per_gpu": work.rows // world_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": CLIP,
        "zero_optimization": {"stage": work.zero_stage},
        "bf16": {"enabled": work.dtype == "bf16"},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": LEARNING_RATE, "betas": list(BETAS), "weight_decay": DECAY, "torch_adam": True},
        },
        "expert_parallel": {"enabled": True, "autoep_size": world_size, "preset_model": "qwen3_moe"},
    }
    engine, *_ = deepspeed.initialize(model=model, config=settings, dist_init_required=False)
    tokens = work.tokens(rank, world_size)
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step() -> float:
        logits = engine(input_ids=inputs, output_router_logits=False).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
        engine.backward(loss)
        engine.step()
        return float(loss.detach())

    return step, engine


def deepspeed_moe(work: Work) -> tuple[Callable[[], float], Any]:
    """transformers' model with every MoE block replaced by deepspeed.moe.layer.MoE, capacity factor 1."""
    from deepspeed.moe.layer import MoE
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeMLP

    join_deepspeed()
    model = hf_model(work, "eager")

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            expert = Qwen3MoeMLP(model.config, work.width)
            self.moe = MoE(work.hidden, expert, work.experts, k=work.top_k, capacity_factor=1.0)

        def forward(self, hidden: Tensor) -> Tensor:
            hidden, self.balance_loss, _ = self.moe(hidden)
            return hidden

    for layer in model.model.layers:
        layer.mlp = Block()
        layer.mlp.moe.set_deepspeed_parallelism()
    model.to(device(), work.torch_dtype)
    optimizer = torch.optim.AdamW(
        model.parameters(), LEARNING_RATE, BETAS, EPS, weight_decay=DECAY, fused=True
    )
    tokens = work.tokens(0, 1)
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step() -> float:
        logits = model(input_ids=inputs, output_router_logits=False).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
        total = loss + 0.001 * sum(layer.mlp.balance_loss for layer in model.model.layers)
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step, None


def join_deepspeed() -> None:
    """Start a gloo process group for DeepSpeed, without the operator that DeepSpeed would compile."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    dist.init_process_group("gloo")
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
