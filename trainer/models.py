"""`python -m trainer.models`: size, FLOPs and memory per rank of every shipped model. Torch-free."""

import argparse
import sys
from importlib.resources import files

from hydra import compose, initialize_config_module

from moe.config import ModelConfig
from trainer.settings.typed import typed


def shipped_models() -> dict[str, ModelConfig]:
    """Name and shape of each model in conf/model, smallest first."""
    paths = (path.name for path in files("conf").joinpath("model").iterdir())
    names = [name.removesuffix(".yaml") for name in paths if name[0] != "_"]
    with initialize_config_module("conf", version_base="1.3"):
        models = {name: typed(ModelConfig, compose(overrides=[f"+model={name}"]).model) for name in names}
    return dict(sorted(models.items(), key=lambda item: item[1].num_parameters()))


def bytes_per_rank(
    model: ModelConfig, *, zero_stage: int, ep_size: int, world_size: int, dtype: str = "bf16"
) -> list[float]:
    """Bytes of weights, gradient sums and optimizer (master weights and two moments) on one rank.

    Everything except the weights is fp32; in fp32 without ZeRO the weights also serve as master weights. ZeRO
    partitions the optimizer (from stage 1 on), gradients (2) and weights (3) over the ranks that hold the
    same parameter: all ranks, or every ep_size-th rank for routed experts.
    """
    experts = model.num_expert_parameters()
    shared, local = model.num_parameters() - experts, experts / ep_size
    whole, cut = shared + local, shared / world_size + local * ep_size / world_size
    weight, states = (2, 12) if dtype == "bf16" else (4, 12 if zero_stage else 8)
    return [
        size * (cut if zero_stage >= stage else whole) for size, stage in ((weight, 3), (4, 2), (states, 1))
    ]


def buffer_bytes(zero_stage: int, dtype: str) -> float:
    """Bytes of DeepSpeed's buffers for gradient reduction and optimizer step, as set in conf/deepspeed."""
    with initialize_config_module("conf", version_base="1.3"):
        zero = compose(overrides=[f"+deepspeed=zero{zero_stage}"]).deepspeed.zero_optimization
    if zero_stage < 2:
        return 0
    bucket, in_bf16 = zero.reduce_bucket_size, dtype == "bf16"
    if zero_stage == 2:  # one is filled while the other is reduced; bf16 is reduced in an fp32 copy
        return bucket * (2 * 2 + 4 if in_bf16 else 2 * 4)
    # one bucket is filled while another is reduced; sub_group_size: gradients copied for one update
    return bucket * 4 * 2 + zero.sub_group_size * 4


def table(options: argparse.Namespace) -> list[str]:
    """The lines of the table."""
    zero, ep_size, world, dtype = options.zero_stage, options.ep_size, options.world_size, options.dtype
    buffers = buffer_bytes(zero, dtype) / 2**30
    lines = [
        f"per rank: GiB in {dtype}, fp32 gradient sums, AdamW; ZeRO {zero}, {world} ranks, ep_size {ep_size}",
        f"{'model':20}{'total B':>10}{'active B':>10}{'GFLOP/token':>13}{'at length':>11}"
        f"{'weights':>10}{'gradients':>11}{'optimizer':>11}{'buffers':>9}{'sum':>9}",
    ]
    for name, model in shipped_models().items():
        seq_len = min(options.seq_len, model.max_position_embeddings)
        total, active = model.num_parameters() / 1e9, model.num_active_parameters() / 1e9
        line = f"{name:20}{total:10.3f}{active:10.3f}{model.flops_per_token(seq_len) / 1e9:13.2f}{seq_len:11}"
        ep = ep_size if model.num_experts else 1
        if model.num_experts % ep:
            lines.append(f"{line}   ep_size {ep} does not divide {model.num_experts} experts")
            continue
        sizes = bytes_per_rank(model, zero_stage=zero, ep_size=ep, world_size=world, dtype=dtype)
        weights, gradients, optimizer = (size / 2**30 for size in sizes)
        held = f"{weights:10.2f}{gradients:11.2f}{optimizer:11.2f}{buffers:9.2f}"
        lines.append(f"{line}{held}{weights + gradients + optimizer + buffers:9.2f}")
    lines.append("Not included: activations, kept forward passes, and 1 to 3 GiB for CUDA and NCCL.")
    return lines


def main(arguments: list[str]) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m trainer.models", description=__doc__)
    parser.add_argument("--zero-stage", type=int, default=1, choices=range(4))
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "fp32"), help="of the weights")
    parser.add_argument("--ep-size", type=int, default=1, help="ranks that share the experts")
    parser.add_argument("--world-size", type=int, default=8, help="number of ranks")
    parser.add_argument("--seq-len", type=int, default=4096, help="tokens per row, at most the model's limit")
    options = parser.parse_args(arguments)
    if min(options.ep_size, options.world_size, options.seq_len) < 1 or options.world_size % options.ep_size:
        parser.error("--ep-size must divide --world-size, and all must be above 0")
    print("\n".join(table(options)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
