"""All use of DeepSpeed, with gradients.py: ZeRO, expert groups, gradient scaling, access to optimizer states.

`mark_experts` makes DeepSpeed accept our MoE blocks: it replaces the class of each block by one that also
inherits AutoEPMoELayer (torch's `fully_shard` replaces classes likewise), and gives the expert weights the
attributes by which DeepSpeed reduces, partitions and clips them over the expert-data-parallel group.
"""

import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from data_pipeline.loader import Batch
from moe.block import MoEBlock
from moe.model import ModelOutput
from moe.router import TrainingRouting
from trainer.engine.clock import StepClock
from trainer.engine.deepspeed_settings import deepspeed_settings
from trainer.engine.optimizer import states_of
from trainer.ranks.runtime import Ranks
from trainer.settings.config import RunConfig
from trainer.settings.parallel import ParallelPlan

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
import deepspeed.comm  # sets variables of its own, which the block below must not take back
import deepspeed.ops
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.utils import groups

with patch.dict(os.environ, TORCHDYNAMO_DISABLE="1"):  # else ZeRO's Muon prepares to be compiled: a second
    import deepspeed.runtime.zero.muon.original_muon

from trainer.engine.gradients import Fp32Sums, ReduceScatter, reduce_and_clip
from trainer.engine.zero3 import all_gathered, in_one_order

all_to_all = deepspeed.comm.all_to_all_single  # for dispatchers; DeepSpeed's communication log counts it
_COLLECTIVES = ["all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "reduce"]
_COLLECTIVES += ["all_to_all_single"]  # of DeepSpeed's backend, which the clock times


def init_deepspeed(device: torch.device) -> None:
    """Hand the existing process group to DeepSpeed."""
    # Without this filter, the warning appears at every collective.
    warnings.filterwarnings("ignore", r"`torch\.distributed\..*` is deprecated", FutureWarning)
    # Every rank would spend a minute compiling a shared-memory operator for inference.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo", verbose=False)


def communication_log(run: Callable[[], Any]) -> str:
    """DeepSpeed's log of the collectives in `run`, one line per operation, the slowest first.

    While logging, DeepSpeed waits for each collective. It logs only calls through deepspeed.comm.
    """
    log = deepspeed.comm.comm.comms_logger
    deepspeed.comm.configure(enabled=True, prof_all=True, verbose=False)
    run()
    deepspeed.comm.configure(enabled=False)
    rows = []
    for name, sizes in log.get_raw_data().items():
        mebibytes = sum(size * count for size, (count, *_) in sizes.items()) / 2**20
        calls = sum(count for count, *_ in sizes.values())
        # latencies of an operation are cumulative, as its timer is never reset: the largest is the sum
        milliseconds = max(max(latencies) for _, latencies, *_ in sizes.values())
        rows.append((milliseconds, f"{name:<28}{calls:>8}{mebibytes:>12.2f}{milliseconds:>12.2f}"))
    head = f"{'collective':<28}{'calls':>8}{'MiB':>12}{'ms':>12}"
    return "\n".join([head, *(line for _, line in sorted(rows, reverse=True))])


def expert_parallel_group(ep_size: int) -> dist.ProcessGroup:
    """The expert-parallel group of this rank: `ep_size` consecutive ranks. Every rank must call it."""
    name = f"ep_size_{ep_size}"
    if name not in groups._get_expert_parallel_group_dict():
        if ep_size > 1:
            groups._create_expert_and_data_parallel(ep_size)
        else:  # DeepSpeed would make one group per rank, one after another, and all ranks wait for each
            alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
            groups._EXPERT_PARALLEL_GROUP[name] = alone
            groups._EXPERT_PARALLEL_GROUP_RANKS[name] = [dist.get_rank()]
            groups._EXPERT_DATA_PARALLEL_GROUP[name] = dist.group.WORLD
            groups._EXPERT_DATA_PARALLEL_GROUP_RANKS[name] = list(range(dist.get_world_size()))
    return groups._get_expert_parallel_group(name)


class _AutoEPBlock(MoEBlock, AutoEPMoELayer):
    """An MoE block with DeepSpeed's class as a second parent; the computation is still MoEBlock's."""

    ep_size: int

    def set_deepspeed_parallelism(self, *args: Any, **kwargs: Any) -> None:
        """Called by DeepSpeed on every layer to create its group; ours exists already."""
        self.ep_group = expert_parallel_group(self.ep_size)


def mark_experts(model: nn.Module, num_experts: int, ep_size: int, ep_rank: int) -> None:
    """Turn every MoE block of `model` (with this rank's experts only) into an AutoEP layer of DeepSpeed."""
    group_name = f"ep_size_{ep_size}"
    for block in model.modules():
        if not isinstance(block, MoEBlock):
            continue
        block.__class__ = _AutoEPBlock
        vars(block).update(num_experts=num_experts, num_local_experts=num_experts // ep_size)
        vars(block).update(ep_size=ep_size, ep_rank=ep_rank)
        vars(block).update(ep_group_name=group_name, ep_group=expert_parallel_group(ep_size))
        for parameter in block.experts.parameters():
            vars(parameter).update(allreduce=False, is_expert_group=True, group_name=group_name)
            vars(parameter).update(ds_zero_partition_group_name=group_name)
            vars(parameter).update(ds_zero_placement_family="autoep_expert")


@dataclass(frozen=True)
class Fragment:
    """Consecutive elements of one parameter, with their optimizer state, that this rank holds."""

    parameter: str
    start: int  # index of its first element in the flattened whole parameter (experts: [E, ...])
    state: dict[str, Tensor]  # master (fp32 weights), exp_avg, ...: 1-D fp32 views, to read or to fill
    owned: bool  # whether this rank writes it to disk (without ZeRO several ranks hold the same elements)


class Engine:
    """A model under DeepSpeed: forward, backward of shares, step, and the states that a checkpoint keeps."""

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, config: RunConfig, plan: ParallelPlan, ranks: Ranks
    ) -> None:
        self.config = config
        self._zero_stage = config.zero_stage
        self._ep_rank = plan.ep_rank(ranks.rank)
        self._ep_group = expert_parallel_group(plan.ep_size)
        self._edp_group = groups._get_expert_data_parallel_group(f"ep_size_{plan.ep_size}")
        given = {"model": model, "optimizer": optimizer, "config": deepspeed_settings(config, plan)}
        self._engine, *_ = deepspeed.initialize(**given, dist_init_required=False)
        self.module: nn.Module = self._engine.module
        self._masters: dict[nn.Parameter, Tensor] = {}  # bf16 without ZeRO: fp32 masters by parameter
        self._averaged_over = plan.world_size  # DeepSpeed divides sums over ranks by this number
        self.clock = StepClock(ranks.device)
        backend: Any = deepspeed.comm.comm.cdb
        for name in _COLLECTIVES:  # from the class: a later engine must not wrap this wrapper
            collective = getattr(type(backend), name).__get__(backend)
            setattr(backend, name, self.clock.timed("communication", collective))
        sums = self._engine.optimizer
        if self._zero_stage == 0:
            # DeepSpeed would copy all gradients into a buffer and back, even those no other rank shares.
            self._engine.enable_backward_allreduce, self._averaged_over = False, 1
            optimizer.state.clear()  # in bf16, DeepSpeed's set-up has counted one step of Adam
            if config.dtype == "bf16":
                sums.__class__ = Fp32Sums
                self._masters = sums.take_over()
        elif isinstance(sums, BF16_Optimizer):
            sums.__class__, self._averaged_over = ReduceScatter, 1
        elif self._zero_stage == 3:
            in_one_order(self.module)

    def forward(
        self, batch: Batch, selection_bias: Tensor | None = None, routing_only: bool = False
    ) -> ModelOutput:
        """One micro-batch: router statistics and, unless `routing_only`, the sum of cross entropy.

        Other kinds of batches, by their options, get what their loss needs in its place.
        """
        experts = self.config.experts
        keys = [f"{self.config.seed}:{row}" for row in batch.rows]
        routing = TrainingRouting(experts.router_jitter_noise, experts.capacity_factor, keys)
        with self.clock.part("forward"):
            return self._engine(
                batch.input_ids,
                batch.position_ids,
                batch.cu_seqlens,
                token_mask=batch.token_mask,
                labels=batch.labels,
                selection_bias=selection_bias,
                routing_only=routing_only,
                routing=routing if self.module.training else None,
                lengths=batch.lengths,
                **batch.options(),
            )

    @torch.no_grad()
    def apply(self, *args: Any, **kwargs: Any) -> ModelOutput:
        """CausalLM.forward without gradients, for sampling."""
        return self._engine(*args, **kwargs)

    def gathered(self, wanted: bool) -> AbstractContextManager[None]:
        """Under ZeRO-3, if `wanted`: inside, this rank holds all that it computes with, for many forwards."""
        return all_gathered(self._engine) if wanted and self._zero_stage == 3 else nullcontext()

    def backward(self, loss_share: Tensor) -> None:
        """Accumulate the gradient of this rank's share; shares add up over ranks and micro-batches.

        DeepSpeed would divide by the accumulation steps, and it averages over ranks. Both are undone here;
        no other line of the project scales a loss by a number of ranks.
        """
        with self.clock.part("backward"):
            self._engine.backward(loss_share * self._averaged_over, scale_wrt_gas=False)
            if not self._engine.is_gradient_accumulation_boundary():
                self._engine.step()

    def step(self, learning_rate: float) -> float:
        """Clip and update after the last micro-batch; returns the global gradient norm before clipping.

        If the norm is not finite, the weights do not change.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        with self.clock.part("optimizer"):
            norm = self._reduce_and_clip() if self._zero_stage == 0 else None
            if norm is not None and not math.isfinite(norm):
                self._engine.optimizer.zero_grad()  # then nothing is updated; the next step starts anew
            self._engine.step()
            return float(self._engine.get_global_grad_norm()) if norm is None else norm

    def _reduce_and_clip(self) -> float:
        """Without ZeRO: sum the gradients over ranks in place, and clip by their norm, which it returns."""
        shared: list[Tensor] = []
        experts: list[Tensor] = []
        for parameter in self.module.parameters():
            master = self._masters.get(parameter, parameter)
            if master.grad is None:  # other ranks may have one
                master.grad = torch.zeros_like(master)
            (experts if _is_expert(parameter) else shared).append(master.grad)
        optimizer, max_norm = self._engine.basic_optimizer, self.config.optimizer.max_grad_norm
        return reduce_and_clip(shared, experts, self._edp_group, self._ep_group, optimizer, max_norm)

    @property
    def fields(self) -> int:
        """Number of tensors of a fragment: the fp32 weights and the optimizer's states."""
        return 1 + len(states_of(self._engine.basic_optimizer))

    def owned_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, whole tensor) of each parameter that this rank writes to disk; all ranks must iterate.

        The parameters are divided among the ranks that hold them (experts: that hold the same slice).
        """
        for name, parameter, owned in self._parameters():
            # ZeRO-3 partitions each parameter (experts: the slice of this rank)
            with deepspeed.zero.GatheredParameters([parameter], enabled=self._zero_stage == 3):
                if owned:
                    yield name, parameter.detach()

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter, bool]]:
        """Name, parameter, and whether this rank owns it."""
        for position, (name, parameter) in enumerate(self.module.named_parameters()):
            group = self._edp_group if _is_expert(parameter) else None
            turn = position % dist.get_world_size(group)
            yield name, parameter, turn == dist.get_rank(group)

    def fragments(self) -> Iterator[Fragment]:
        """Yield the optimizer state that this rank holds, wherever DeepSpeed keeps it; no collectives.

        To restore a state, saved on any layout, fill the views and then call `end_restore`.
        """
        for name, parameter, owned in self._parameters():
            if (place := self._locate(parameter)) is None:
                continue
            flat, offset, start, numel = place
            views = {"master": flat.detach(), **self._optimizer_states(flat)}
            if _is_expert(parameter):  # skip the slices of lower expert-parallel ranks
                start += self._ep_rank * getattr(parameter, "ds_numel", parameter.numel())
            cut = {key: view.view(-1)[offset : offset + numel] for key, view in views.items()}
            yield Fragment(name, start, cut, owned or self._zero_stage > 0)

    def _locate(self, parameter: Any) -> tuple[Tensor, int, int, int] | None:
        """Where this rank holds fp32 elements of a parameter; None if it holds none.

        (tensor that the optimizer updates, first index in it, first index in the parameter, element count)
        """
        optimizer = self._engine.optimizer
        if self._zero_stage == 3:
            group, offset, padded = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = padded * dist.get_rank(parameter.ds_process_group)
            numel = min(padded, parameter.ds_numel - start)
            flat = optimizer.fp32_partitioned_groups_flat[group]
            return (flat, offset, start, numel) if numel > 0 else None
        if self._zero_stage > 0:
            if (mapping := parameter._hp_mapping) is None:
                return None
            flat = self._engine.basic_optimizer.param_groups[mapping.param_group_index]["params"][0]
            here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
            return flat, here.start, there.start, here.numel
        return self._masters.get(parameter, parameter), 0, 0, parameter.numel()

    def _optimizer_states(self, flat: Tensor) -> dict[str, Tensor]:
        """The states of a tensor that the optimizer updates; created with zeros if there are none yet."""
        optimizer = self._engine.basic_optimizer
        state, names = optimizer.state[flat], states_of(optimizer)
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
            state.update({name: torch.zeros_like(flat) for name in names})
        return {name: state[name] for name in names}

    @torch.no_grad()
    def end_restore(self, step: int) -> None:
        """Call on all ranks once all fragments are filled: sets the step, and weights from their masters."""
        for state in self._engine.basic_optimizer.state.values():
            if "step" in state:  # AdamW counts its steps, SGD does not
                state["step"].fill_(step)
        optimizer = self._engine.optimizer
        if self._zero_stage == 3:
            optimizer.checkpoint_event_prologue()
            for group in range(len(optimizer.fp32_partitioned_groups_flat)):
                optimizer._reassign_or_swap_out_partitioned_parameters(group)
                optimizer._unflatten_partitioned_parameters(group)
            optimizer.checkpoint_event_epilogue()
        elif self._zero_stage > 0:
            optimizer.update_lp_params()
        for parameter, master in self._masters.items():
            parameter.copy_(master)

    def close(self) -> None:
        """Release what DeepSpeed holds; all ranks must call it."""
        self._engine.destroy()


def _is_expert(parameter: nn.Parameter) -> bool:
    return not getattr(parameter, "allreduce", True)
