"""Expert parallelism, applied to a model after it is built."""

from torch import nn

from moe.block import MoEBlock
from moe.dispatch import Dispatcher


def apply_expert_parallel(model: nn.Module, *, ep_rank: int, ep_size: int, dispatcher: Dispatcher) -> None:
    """In every block, keep this rank's contiguous 1/ep_size of the experts and set `dispatcher`.

    Works on the meta device too, where weights have only shapes. `ep_size` divides the number of experts.
    """
    for block in model.modules():
        if not isinstance(block, MoEBlock):
            continue
        num_experts, experts = len(block.gate.weight), block.experts
        assert num_experts % ep_size == 0, f"ep_size={ep_size} does not divide num_experts={num_experts}"
        assert num_experts < 2**15, "the dispatchers send ids in 16 bits"
        assert experts.num_local_experts == num_experts, "the experts are already distributed"
        experts.num_local_experts = num_experts // ep_size
        for name, weight in list(experts.named_parameters()):
            share = weight.detach().chunk(ep_size)[ep_rank].clone()  # a copy, so that the rest is freed
            setattr(experts, name, nn.Parameter(share, requires_grad=weight.requires_grad))
        block.dispatcher = dispatcher


def dispatched(model: nn.Module) -> tuple[int, int, int]:
    """Bytes sent to other ranks, slots routed and slots received, in this rank's forward passes so far."""
    dispatchers = {b.dispatcher for b in model.modules() if isinstance(b, MoEBlock)}
    counts = [(d.bytes_sent, d.slots_routed, d.slots_received) for d in dispatchers]
    sent, routed, received = map(sum, zip(*counts, strict=True)) if counts else (0, 0, 0)
    return sent, routed, received
