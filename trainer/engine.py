"""The one file that knows DeepSpeed: ZeRO, expert groups, gradient scaling, its checkpoints.

`mark_experts` makes our MoE blocks DeepSpeed's: each block's class becomes one that also inherits
AutoEPMoELayer (as torch's `fully_shard` does with its class), and the expert weights carry the attributes by
which DeepSpeed reduces, partitions, clips and saves them over the expert-data-parallel group.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data_pipeline.loader import Batch
from moe.block import MoEBlock
from moe.model import ModelOutput
from trainer.config import RunConfig
from trainer.parallel import ParallelPlan
from trainer.runtime import Ranks

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import deepspeed.comm
import deepspeed.ops
from deepspeed.checkpoint.autoep_affine import (
    autoep_experts_for_rank,
    autoep_placement_to_affine_map,
    legacy_uniform_autoep_placement_descriptor,
)
from deepspeed.checkpoint.constants import (
    AFFINE_MAP,
    AUTOEP_EXPERT_PLACEMENT,
    AUTOEP_PARAM_EP_RANK,
    AUTOEP_PARAM_LOCAL_EXPERTS,
    AUTOEP_PARAM_LOGICAL_SHAPE,
    DS_AUTOEP_UC_META,
)
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.utils import groups

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def init_deepspeed(device: torch.device) -> None:
    """Hand the existing process group to DeepSpeed."""
    warnings.filterwarnings(
        "ignore", r"`torch\.distributed\..*` is deprecated", FutureWarning
    )  # at every collective
    # It would compile a shared-memory operator for inference, for a minute, on every rank.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo", verbose=False)


def expert_parallel_group(ep_size: int) -> dist.ProcessGroup:
    """The expert-parallel group of this rank: `ep_size` consecutive ranks. Every rank must call it."""
    name = f"ep_size_{ep_size}"
    if name not in groups._get_expert_parallel_group_dict():
        groups._create_expert_and_data_parallel(ep_size)
    return groups._get_expert_parallel_group(name)


@cache
def _as_autoep(block_class: type[MoEBlock]) -> type:
    """`block_class` with DeepSpeed's marker class as a second parent; the arithmetic stays the block's."""

    def set_deepspeed_parallelism(self: Any, *args: Any, **kwargs: Any) -> None:
        """DeepSpeed asks every layer for its group; ours exists already."""
        self.ep_group = expert_parallel_group(self.ep_size)

    members = {"forward": block_class.forward, "set_deepspeed_parallelism": set_deepspeed_parallelism}
    return type(f"AutoEP{block_class.__name__}", (block_class, AutoEPMoELayer), members)


def mark_experts(model: nn.Module, num_experts: int, ep_size: int, ep_rank: int) -> None:
    """Make every MoE block of `model`, which holds this rank's experts, an AutoEP layer for DeepSpeed."""
    if not num_experts:
        return
    group_name = f"ep_size_{ep_size}"
    placement = legacy_uniform_autoep_placement_descriptor(num_experts, num_experts // ep_size, ep_size)
    for block in model.modules():
        if not isinstance(block, MoEBlock):
            continue
        block.__class__ = _as_autoep(type(block))  # type: ignore[arg-type]
        for key, value in {
            "num_experts": num_experts,
            "num_local_experts": num_experts // ep_size,
            "ep_size": ep_size,
            "ep_rank": ep_rank,
            "ep_group_name": group_name,
            "ep_group": expert_parallel_group(ep_size),
            "expert_placement_descriptor": placement,
        }.items():
            setattr(block, key, value)
        for parameter in block.experts.parameters():
            logical_shape = [num_experts, *parameter.shape[1:]]
            metadata = {
                AUTOEP_EXPERT_PLACEMENT: placement,
                AFFINE_MAP: autoep_placement_to_affine_map(placement, logical_shape).to_dict(),
                AUTOEP_PARAM_LOGICAL_SHAPE: logical_shape,
                AUTOEP_PARAM_EP_RANK: ep_rank,
                AUTOEP_PARAM_LOCAL_EXPERTS: list(autoep_experts_for_rank(placement, ep_rank)),
            }
            for key, value in {
                "allreduce": False,
                "group_name": group_name,
                "is_expert_group": True,
                "ds_zero_placement_family": "autoep_expert",
                "ds_zero_partition_group_name": group_name,
                DS_AUTOEP_UC_META: metadata,
            }.items():
                setattr(parameter, key, value)


class Engine:
    """A model under DeepSpeed: forward, backward of shares, step, save, load."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: RunConfig,
        plan: ParallelPlan,
        ranks: Ranks,
    ) -> None:
        self._world_size = plan.world_size
        self._zero_stage = config.zero_stage
        self._max_grad_norm = config.optimizer.max_grad_norm
        self._ep_group = expert_parallel_group(plan.ep_size)
        self._edp_group = groups._get_expert_data_parallel_group(f"ep_size_{plan.ep_size}")
        # DeepSpeed's own norm is wrong for experts without ZeRO, so stage 0 clips here.
        self._clips_here = self._zero_stage == 0
        settings: dict[str, Any] = {
            **config.deepspeed,
            "train_batch_size": plan.global_batch_size,
            "train_micro_batch_size_per_gpu": plan.micro_batch_size,
            "gradient_accumulation_steps": plan.gradient_accumulation_steps,
            "gradient_clipping": 0.0 if self._clips_here else self._max_grad_norm,
            "steps_per_print": None,
        }
        if config.dtype == "bf16":
            settings["bf16"] = {"enabled": True}
            if self._zero_stage > 0:
                settings["data_types"] = {"grad_accum_dtype": "fp32"}
        self._engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=settings, dist_init_required=False
        )
        self.module: nn.Module = self._engine.module
        if self._zero_stage == 0:
            optimizer.state.clear()  # bf16 without ZeRO would start Adam's bias correction at its second step

    def forward(
        self, batch: Batch, selection_bias: Tensor | None = None, routing_only: bool = False
    ) -> ModelOutput:
        """One micro-batch: the sum of cross entropy (unless `routing_only`) and the router statistics."""
        return self._engine(
            batch.input_ids,
            batch.position_ids,
            batch.cu_seqlens,
            token_mask=batch.token_mask,
            labels=batch.labels,
            selection_bias=selection_bias,
            routing_only=routing_only,
        )

    def backward(self, loss_share: Tensor) -> None:
        """Accumulate the gradient of this rank's share; shares add up over ranks and micro-batches.

        DeepSpeed would divide by the accumulation steps and averages over ranks; both are undone here, and no
        other line of the project scales a loss by a number of ranks.
        """
        self._engine.backward(loss_share * self._world_size, scale_wrt_gas=False)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()

    def step(self, learning_rate: float) -> float:
        """Clip and update after the last micro-batch; returns the global gradient norm before clipping."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        norm = self._clip_without_zero() if self._clips_here else None
        self._engine.step()
        return float(self._engine.get_global_grad_norm()) if norm is None else norm

    def _clip_without_zero(self) -> float:
        """Global norm over shared gradients and all ranks' experts, and the clipping by it."""
        shared: list[Tensor] = []
        experts: list[Tensor] = []
        for parameter in self.module.parameters():
            if parameter.grad is not None:
                (shared if getattr(parameter, "allreduce", True) else experts).append(parameter.grad)
        squares = torch.stack([_square_sum(shared), _square_sum(experts)])
        dist.all_reduce(squares[1], group=self._ep_group)
        norm = float(squares.sum().sqrt())
        if self._max_grad_norm > 0 and norm > self._max_grad_norm:
            torch._foreach_mul_(shared + experts, self._max_grad_norm / (norm + 1e-6))
        return norm

    def gathered(self, parameters: list[nn.Parameter]) -> AbstractContextManager:
        """A context in which ZeRO-3's partitioned parameters are whole (experts: this rank's slice is)."""
        if self._zero_stage < 3:
            return nullcontext()
        return deepspeed.zero.GatheredParameters(parameters)

    def owned_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """(name, whole tensor) of what this rank writes to disk, one at a time; all ranks must iterate.

        Rank 0 owns the shared ones; the first rank of each expert slice owns that slice.
        """
        first_of_slice = dist.get_rank(self._edp_group) == 0
        for name, parameter in self.module.named_parameters():
            expert = not getattr(parameter, "allreduce", True)
            with self.gathered([parameter]):
                if first_of_slice if expert else dist.get_rank() == 0:
                    yield name, parameter.detach()

    def save(self, folder: Path) -> None:
        """Write DeepSpeed's checkpoint (weights, optimizer) into `folder`; all ranks must call it."""
        self._engine.save_checkpoint(str(folder), tag="state", save_latest=False)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote on the same layout of ranks; all ranks must call it."""
        path, _ = self._engine.load_checkpoint(str(folder), tag="state")
        if path is None:
            raise FileNotFoundError(f"DeepSpeed found no checkpoint in {folder}")

    def close(self) -> None:
        """Release what DeepSpeed holds; all ranks must call it."""
        self._engine.destroy()


def _square_sum(tensors: list[Tensor]) -> Tensor:
    if not tensors:
        return torch.zeros(())
    return torch.stack([tensor.float().square().sum() for tensor in tensors]).sum()
