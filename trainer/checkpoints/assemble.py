"""Build the model of a run: this rank's experts, with weights from another folder or from the seed."""

from pathlib import Path

import torch
import torch.distributed as dist

from data_pipeline.config import DataConfig
from data_pipeline.tokenizer import load_tokenizer, tokenizer_of
from moe.config import ConfigError
from moe.dispatch import AllToAllDispatcher, DeduplicatedAllToAllDispatcher
from moe.hf import load_hf
from moe.init import init_weights, upcycle_weights
from moe.model import CausalLM
from moe.parallelize import apply_expert_parallel
from trainer.checkpoints.folder import reading
from trainer.engine.backends import backends_of
from trainer.engine.engine import all_to_all, expert_parallel_group, mark_experts
from trainer.ranks.runtime import DTYPES, Ranks
from trainer.settings.config import RunConfig
from trainer.settings.hub import fetch, is_hub_name
from trainer.settings.parallel import ParallelPlan
from trainer.settings.run_folder import hf_folder

DISPATCHERS = {"all_to_all": AllToAllDispatcher, "deduplicated": DeduplicatedAllToAllDispatcher}


def build_model(config: RunConfig, plan: ParallelPlan, ranks: Ranks) -> CausalLM:
    """The model with this rank's experts only, weights read from `stage.init_from` or drawn from the seed."""
    backend = backends_of(config, ranks).names.get("experts", "loop")
    ep_rank, upcycles = plan.ep_rank(ranks.rank), config.init.upcycle != "none"
    with torch.device("meta"):
        model = CausalLM(config.model, backend=backend, recompute=config.recompute)
    if plan.ep_size > 1:
        kind, chunks = DISPATCHERS[config.parallel.dispatcher], config.parallel.dispatch_chunks
        dispatcher = kind(expert_parallel_group(plan.ep_size), all_to_all, chunks)
        apply_expert_parallel(model, ep_rank=ep_rank, ep_size=plan.ep_size, dispatcher=dispatcher)
    if not upcycles:  # upcycling computes in fp32
        model.to(DTYPES[config.dtype])
    model.to_empty(device=ranks.device)
    if config.stage.init_from is None:
        init_weights(model, config.seed, ep_rank=ep_rank, router_scale=config.init.router_scale)
    else:
        weights = _weights_folder(config.stage.init_from, ranks)
        check_tokenizer(weights, config.data)
        with reading(weights):
            if not upcycles:
                load_hf(model, weights, ep_rank=ep_rank)
            else:
                noise, scale = config.init.upcycle_noise, config.init.router_scale
                upcycle_weights(
                    model, weights, seed=config.seed, noise=noise, ep_rank=ep_rank, router_scale=scale
                )
                model.to(DTYPES[config.dtype])
    # Last, because a parameter that is replaced loses its marks.
    mark_experts(model, config.model.num_experts, plan.ep_size, ep_rank)
    return model


def _weights_folder(source: str, ranks: Ranks) -> Path:
    """The Hugging Face folder of a source; the first rank of each machine fetches a model of the hub."""
    if not is_hub_name(source):
        found = [hf_folder(Path(source))]
        dist.broadcast_object_list(found)  # the same checkpoint for all ranks, even if that run saves now
        return found[0]
    if ranks.local_rank == 0:
        fetch(source)
    dist.barrier()
    return fetch(source, here=True)


def check_tokenizer(weights: Path, data: DataConfig) -> None:
    """Raises ConfigError if a tokenizer is beside the weights and differs from that of the data."""
    known = (weights / "tokenizer.json").is_file()
    if known and load_tokenizer(weights).vocabulary() != tokenizer_of(data).vocabulary():
        raise ConfigError(
            f"stage.init_from: {weights} was trained with a different tokenizer from that of "
            f"data.dir={data.dir}; prepare the data with data.tokenizer={weights}"
        )
