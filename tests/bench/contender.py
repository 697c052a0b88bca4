"""One contender of `make bench` in a process of its own: trains on random tokens, prints one line of JSON.

`python tests/bench/contender.py NAME [key=value ...]` with the keys of `Work`; WORLD_SIZE, RANK as torchrun.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Work:
    """What every contender does; the defaults are the reference work."""

    dtype: str = "bf16"
    rows: int = 4  # of all ranks together
    seq_len: int = 1024
    document: int = 1024  # tokens of each document
    layers: int = 4
    hidden: int = 512
    heads: int = 8
    key_value_heads: int = 2
    head_dim: int = 64
    experts: int = 128
    top_k: int = 8
    width: int = 192  # of one expert
    vocab: int = 8192
    backend: str = "loop"  # ours: experts.backend
    recompute: str = "none"  # ours
    zero_stage: int = -1  # ours; -1: 1 in bf16 and on several ranks, else 0
    parts: int = 0  # ours: 1 to time the parts of the last step
    warm_up: int = 2
    steps: int = 5

    @classmethod
    def parse(cls, overrides: list[str]) -> "Work":
        """Typed by the defaults."""
        kinds = {field.name: type(field.default) for field in fields(cls)}
        pairs = (item.split("=", 1) for item in overrides)
        return cls(**{key: kinds[key](value) for key, value in pairs})

    def model_keys(self) -> dict[str, Any]:
        """The model with Hugging Face's keys."""
        return {
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_value_heads,
            "head_dim": self.head_dim,
            "num_experts": self.experts,
            "num_experts_per_tok": self.top_k,
            "moe_intermediate_size": self.width,
            "norm_topk_prob": True,
            "router_aux_loss_coef": 0.001,
            "tie_word_embeddings": False,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6,
        }

    def tokens(self, rank: int, world_size: int) -> Tensor:
        """This rank's rows [B, S+1] on its device; the same for every contender."""
        generator = torch.Generator().manual_seed(0)
        everything = torch.randint(0, self.vocab, (self.rows, self.seq_len + 1), generator=generator)
        share = self.rows // world_size
        return everything[rank * share : (rank + 1) * share].to(device())

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of the weights."""
        return {"bf16": torch.bfloat16, "fp32": torch.float32}[self.dtype]


def device() -> torch.device:
    """A GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


UNTIL_THE_END = ExitStack()
LEARNING_RATE = 1e-4
BETAS, EPS, DECAY, CLIP = (0.9, 0.95), 1e-8, 0.1, 1.0


def ours(work: Work) -> tuple[Callable[[], float], Any]:
    """The step of trainer.train, and its engine."""
    from data_pipeline.loader import Batch
    from trainer.cpu_products import fast_products
    from trainer.engine import Engine, init_deepspeed
    from trainer.loss import agree_on_totals
    from trainer.optimizer import build_optimizer
    from trainer.parallel import ParallelPlan
    from trainer.runtime import Ranks
    from trainer.train import build_balance, build_model, train_step

    ranks = Ranks.join()
    init_deepspeed(ranks.device)
    UNTIL_THE_END.enter_context(fast_products(ranks.device, work.torch_dtype))
    config = run_config(work, ranks.world_size)
    plan = ParallelPlan.of(config, ranks.world_size)
    model = build_model(config, plan, ranks)
    engine = Engine(model, build_optimizer(model, config.optimizer), config, plan, ranks)
    balance = build_balance(config, plan, ranks.device)
    tokens = work.tokens(ranks.rank, ranks.world_size)
    rows = len(tokens)
    batch = Batch(
        input_ids=tokens[:, :-1].contiguous(),
        labels=tokens[:, 1:].contiguous(),
        position_ids=(torch.arange(work.seq_len) % work.document).repeat(rows, 1),
        cu_seqlens=torch.arange(0, rows * work.seq_len + 1, work.document, dtype=torch.int32),
        token_mask=torch.ones(rows, work.seq_len, dtype=torch.bool),
        rows=tuple(range(rows)),
    ).to(ranks.device)

    def step() -> float:
        totals = agree_on_totals([batch], False, ranks.device)
        sums, _, _ = train_step(engine, [batch], totals, balance, config, LEARNING_RATE)
        return float(sums.cross_entropy)

    return step, engine


def time_parts(engine: Any) -> None:
    """Let the engine's clock see the modules: forward and backward of each under one name."""
    from moe.attention import Attention
    from moe.block import MoEBlock
    from moe.experts import Experts
    from moe.model import LanguageModelHead
    from moe.router import Router

    names = {
        Attention: "attention",
        Router: "router",
        Experts: "experts",
        MoEBlock: "dispatch",  # what is left of the block: the parts inside it do not count
        LanguageModelHead: "cross entropy",
        torch.nn.RMSNorm: "norms",
    }
    engine.clock.measuring = True
    for module in engine.module.modules():
        name = next((name for kind, name in names.items() if isinstance(module, kind)), None)
        if name is None or (
            name == "norms" and module.normalized_shape[0] != engine.module.config.hidden_size
        ):
            continue  # the norms of queries and keys are attention
        spans: list[Any] = []

        def start(*_: Any, name: str = name, spans: list[Any] = spans) -> None:
            spans.append(engine.clock.part(name))
            spans[-1].__enter__()

        def stop(*_: Any, spans: list[Any] = spans) -> None:
            spans.pop().__exit__(None, None, None)

        module.register_forward_pre_hook(start)
        module.register_forward_hook(stop)
        module.register_full_backward_pre_hook(start)
        module.register_full_backward_hook(stop)


def run_config(work: Work, world_size: int) -> Any:
    """The configuration of a run of ours that does `work`."""
    from hydra import compose, initialize_config_module

    from trainer.config import RunConfig

    stage = work.zero_stage if work.zero_stage >= 0 else int(work.dtype == "bf16" or world_size > 1)
    keys = {f"model.{key}": value for key, value in work.model_keys().items()}
    keys |= {
        "dtype": work.dtype,
        "micro_batch_size": work.rows // world_size,
        "stage.seq_len": work.seq_len,
        "stage.global_batch_size": work.rows,
        "parallel.nproc_per_node": world_size,
        "parallel.ep_size": world_size,
        "experts.backend": work.backend,
        "recompute": work.recompute,
        "optimizer.lr": LEARNING_RATE,
        "optimizer.betas": list(BETAS),
        "optimizer.eps": EPS,
        "optimizer.weight_decay": DECAY,
        "optimizer.max_grad_norm": CLIP,
    }
    overrides = ["experiment=demo", f"deepspeed=zero{stage}", *(f"{k}={v}" for k, v in keys.items())]
    with initialize_config_module("conf", version_base="1.3"):
        return RunConfig.load(compose("train", overrides=overrides))


def hf_model(work: Work, implementation: str) -> Any:
    """transformers' model in fp32, with our initial weights."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(**work.model_keys(), attn_implementation="sdpa", output_router_logits=True)
    config._experts_implementation = implementation
    config.use_cache = False
    return Qwen3MoeForCausalLM(config)


def transformers(work: Work, implementation: str = "grouped_mm") -> tuple[Callable[[], float], Any]:
    """transformers' model, its own losses, torch's clipping and fused AdamW."""
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
    """transformers' model under DeepSpeed AutoEP, ZeRO-1, ep_size = world size."""
    import deepspeed

    join_deepspeed()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    model = hf_model(work, "grouped_mm")
    settings = {
        "train_micro_batch_size_per_gpu": work.rows // world_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": CLIP,
        "zero_optimization": {"stage": 1},
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
    """A gloo process group that DeepSpeed knows, without the operator that it would compile."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    dist.init_process_group("gloo")
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)


def peak_gib() -> float:
    """The largest memory so far: allocated on a GPU, resident on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


CONTENDERS: dict[str, Callable[[Work], tuple[Callable[[], float], Any]]] = {
    "ours": ours,
    "transformers": transformers,
    "autoep": autoep,
    "deepspeed_moe": deepspeed_moe,
}


def main(name: str, *overrides: str) -> None:
    """Train; rank 0 prints. The loss of a step is read on the host, so a step's time is the device's too."""
    for key, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(key, value)
    os.environ.setdefault("LOCAL_RANK", os.environ["RANK"])
    os.environ.setdefault("MASTER_PORT", "29546")
    work = Work.parse(list(overrides))
    imported = peak_gib()
    step, engine = CONTENDERS[name](work)
    losses, seconds = [], []
    for _ in range(work.warm_up + work.steps):
        if dist.is_initialized():
            dist.barrier()
        start = time.perf_counter()
        losses.append(step())
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    parts = {}
    if work.parts:
        time_parts(engine)
        engine.clock.lap()
        engine.clock.measuring = True
        step()
        parts = engine.clock.lap()[2]
    if os.environ["RANK"] == "0":
        result = {"name": name, **asdict(work), "losses": losses, "seconds": seconds[work.warm_up :]}
        print(
            json.dumps({**result, "parts": parts, "imported_gib": imported, "peak_gib": peak_gib()}),
            flush=True,
        )
    if dist.is_initialized():
        dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
