"""What a run is: typed, checked as a whole before anything starts. Torch-free, for login nodes."""

from dataclasses import dataclass, fields
from operator import attrgetter
from pathlib import Path
from typing import Any

from data_pipeline.config import DataConfig
from moe.config import ConfigError, ModelConfig
from moe.upcycle import upcycle_problems
from trainer.deepspeed_section import deepspeed_problems
from trainer.parallel import ParallelConfig, ParallelPlan
from trainer.run_folder import hf_folder, read_run
from trainer.tracker_config import TrackerConfig
from trainer.typed import typed


@dataclass
class StageConfig:
    """One stage of training: how long a row is, how many make a step, how many tokens in all."""

    seq_len: int
    global_batch_size: int  # rows per optimizer step
    train_tokens: int
    init_from: str | None  # run folder, checkpoint or Hugging Face folder whose weights it starts from

    @property
    def step_tokens(self) -> int:
        """Tokens of one optimizer step over all ranks."""
        return self.global_batch_size * self.seq_len

    @property
    def total_steps(self) -> int:
        """Optimizer steps that cover train_tokens; the last one completes the budget."""
        return -(-self.train_tokens // self.step_tokens)


@dataclass
class InitConfig:
    """First weights, and how those of stage.init_from become the model's (moe/upcycle.py)."""

    router_scale: float
    upcycle: str
    upcycle_noise: float


@dataclass
class OptimizerConfig:
    """AdamW (arXiv 1711.05101)."""

    lr: float
    betas: list[float]
    eps: float
    weight_decay: float
    max_grad_norm: float


@dataclass
class ScheduleConfig:
    """The learning rate as a function of the step."""

    kind: str
    warmup_steps: int
    decay_fraction: float
    min_lr_ratio: float


@dataclass
class BalanceConfig:
    """The load-balancing loss and the router z-loss."""

    mode: str
    micro_weight: float
    z_loss_coef: float
    bias_update_rate: float


@dataclass
class ExpertsConfig:
    """How a rank computes its experts, and what routing does in training alone."""

    backend: str
    capacity_factor: float | None
    router_jitter_noise: float


@dataclass
class CheckpointConfig:
    """When checkpoints are written and how many stay."""

    every_steps: int
    keep: int
    keep_every_steps: int
    background: bool


@dataclass
class EvaluateConfig:
    """Held-out loss during training."""

    every_steps: int
    rows: int


@dataclass
class RunConfig:
    """A whole run. Values live in conf/, laws here; `load` reports everything that is wrong at once."""

    name: str
    output_dir: str
    seed: int
    dtype: str
    micro_batch_size: int
    recompute: str
    mtp_loss_scaling_factor: float
    model: ModelConfig
    stage: StageConfig
    init: InitConfig
    data: DataConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    deepspeed: dict[str, Any]
    parallel: ParallelConfig
    balance: BalanceConfig
    experts: ExpertsConfig
    checkpoint: CheckpointConfig
    evaluate: EvaluateConfig
    tracker: TrackerConfig

    @classmethod
    def load(cls, cfg: Any) -> "RunConfig":
        """Type a composed configuration. Raises ConfigError with every unknown, missing or mistyped key."""
        return typed(cls, cfg)

    @classmethod
    def of_run(cls, run_dir: Path) -> "RunConfig":
        """The configuration that a run folder goes on with. Raises ConfigError where there is none."""
        return cls.load(read_run(run_dir))

    @property
    def run_dir(self) -> Path:
        """The folder of the run."""
        return Path(self.output_dir) / self.name

    @property
    def zero_stage(self) -> int:
        """DeepSpeed's ZeRO stage."""
        return int(self.deepspeed.get("zero_optimization", {}).get("stage", 0))

    def check(self, plan: ParallelPlan) -> None:
        """Raises ConfigError with every broken law of the run under this layout of ranks."""
        problems = [
            *self.model.problems(),
            *self.data.problems(),
            *plan.problems(self.model.num_experts),
            *self._value_problems(),
            *self._own_problems(),
            *self._init_problems(),
            *deepspeed_problems(self.deepspeed),
        ]
        if problems:
            raise ConfigError(problems)

    def _value_problems(self) -> list[str]:
        """Laws of single values: a choice, a least value, a fraction."""
        found = []
        for key, value, choices in [
            ("dtype", self.dtype, ("fp32", "bf16")),
            ("init.upcycle", self.init.upcycle, ("none", "copy", "split")),
            ("recompute", self.recompute, ("none", "experts", "full")),
            (
                "experts.backend",
                self.experts.backend,
                ("reference", "loop", "grouped", "megablocks", "liger"),
            ),
            ("balance.mode", self.balance.mode, ("exact", "prior_buffer", "buffer", "micro_batch")),
            ("schedule.kind", self.schedule.kind, ("cosine", "wsd", "constant")),
            ("tracker.wandb", self.tracker.wandb, ("auto", "online", "offline", "disabled")),
        ]:
            if value not in choices:
                found.append(f"{key}={value} is unknown; use {', '.join(choices)}")
        for key, number, least in [
            ("stage.seq_len", self.stage.seq_len, 1),
            ("stage.train_tokens", self.stage.train_tokens, 1),
            ("mtp_loss_scaling_factor", self.mtp_loss_scaling_factor, 0),
            ("init.router_scale", self.init.router_scale, 0),
            ("init.upcycle_noise", self.init.upcycle_noise, 0),
            ("optimizer.eps", self.optimizer.eps, 0),
            ("optimizer.max_grad_norm", self.optimizer.max_grad_norm, 0),
            ("optimizer.weight_decay", self.optimizer.weight_decay, 0),
            ("schedule.warmup_steps", self.schedule.warmup_steps, 0),
            ("balance.micro_weight", self.balance.micro_weight, 0),
            ("balance.z_loss_coef", self.balance.z_loss_coef, 0),
            ("balance.bias_update_rate", self.balance.bias_update_rate, 0),
            ("checkpoint.every_steps", self.checkpoint.every_steps, 1),
            ("checkpoint.keep", self.checkpoint.keep, 1),
            ("checkpoint.keep_every_steps", self.checkpoint.keep_every_steps, 0),
            ("evaluate.every_steps", self.evaluate.every_steps, 0),
            ("evaluate.rows", self.evaluate.rows, 1),
            ("tracker.timeout_seconds", self.tracker.timeout_seconds, 1),
            ("tracker.log_every_steps", self.tracker.log_every_steps, 1),
            ("tracker.expert_load_every_steps", self.tracker.expert_load_every_steps, 0),
            ("tracker.watch", self.tracker.watch, 0),
            *((f"tracker.alarms.{key}", value, 0) for key, value in vars(self.tracker.alarms).items()),
        ]:
            if not number >= least:
                found.append(f"{key}={number} is below {least}; use {least} or more")
        for key, share in [
            ("schedule.decay_fraction", self.schedule.decay_fraction),
            ("schedule.min_lr_ratio", self.schedule.min_lr_ratio),
            ("experts.router_jitter_noise", self.experts.router_jitter_noise),
            *((f"optimizer.betas[{i}]", beta) for i, beta in enumerate(self.optimizer.betas)),
        ]:
            if not 0 <= share <= 1 or (share == 1 and "betas" in key):
                found.append(f"{key}={share} is outside 0 to 1; use a fraction")
        return found

    def _own_problems(self) -> list[str]:
        """Laws that single values do not show."""
        found = []
        if len(self.optimizer.betas) != 2:
            found.append(f"optimizer.betas={self.optimizer.betas} must hold two numbers, as [0.9, 0.95]")
        if not 0 <= self.seed < 2**31:
            found.append(f"seed={self.seed} is outside 0 to 2^31 - 1")
        if self.schedule.warmup_steps > self.stage.total_steps and self.schedule.kind != "constant":
            found.append(
                f"schedule.warmup_steps={self.schedule.warmup_steps} exceeds the "
                f"{self.stage.total_steps} steps of the run, so that the peak rate is never reached; "
                "shorten it or raise stage.train_tokens"
            )
        capacity = self.experts.capacity_factor
        if capacity is not None and not capacity > 0:
            found.append(f"experts.capacity_factor={capacity} must be above 0; null drops nothing")
        keys = ["balance.micro_weight", "balance.z_loss_coef", "balance.bias_update_rate"]
        keys += ["experts.router_jitter_noise", "experts.capacity_factor"]
        found += [
            f"{key}={value} needs experts, but model.num_experts=0; use {'null' if value == capacity else 0}"
            for key, value in ((key, attrgetter(key)(self)) for key in keys)
            if self.model.num_experts == 0 and value
        ]
        if self.data.mode == "streaming" and self.evaluate.every_steps:
            found.append(
                f"evaluate.every_steps={self.evaluate.every_steps} needs held-out rows, which "
                "data.mode=streaming does not keep; use 0, or prepare the data"
            )
        if not self.optimizer.lr > 0:
            found.append(f"optimizer.lr={self.optimizer.lr} must be above 0")
        if self.experts.backend == "grouped":
            values = 8 if self.dtype == "bf16" else 4  # rows of 16 bytes
            for key in ("hidden_size", "moe_intermediate_size"):
                if (size := getattr(self.model, key)) % values:
                    found.append(
                        f"model.{key}={size} is not a multiple of {values}, which experts.backend=grouped "
                        f"needs in {self.dtype}; round it up or use experts.backend=loop"
                    )
        if self.stage.seq_len > self.model.max_position_embeddings:
            found.append(
                f"stage.seq_len={self.stage.seq_len} exceeds model.max_position_embeddings="
                f"{self.model.max_position_embeddings}; shorten the rows or raise the model's limit"
            )
        if Path(self.name) == Path() or Path(self.name).is_absolute() or ".." in Path(self.name).parts:
            found.append(f"name={self.name!r} must be a relative path inside output_dir")
        return found

    def _init_problems(self) -> list[str]:
        """Whether the weights of stage.init_from are of this model, or can be upcycled into it."""
        how = self.init.upcycle
        if self.stage.init_from is None:
            return [f"init.upcycle={how} needs stage.init_from, a dense folder"] if how != "none" else []
        origin = Path(self.stage.init_from)
        if not origin.is_dir():
            return [
                f"stage.init_from={origin} is not a folder; "
                "name a run folder, a checkpoint or a Hugging Face folder"
            ]
        try:
            theirs = ModelConfig.of_folder(hf_folder(origin))
        except ConfigError as error:
            return [f"stage.init_from={origin}: {problem}" for problem in error.problems]
        free = _FREE_AT_HAND_OVER | (_FREE_TO_UPCYCLE if how in ("copy", "split") else set())
        if len(self.model.moe_layers) == self.model.num_hidden_layers:
            free = free | {"intermediate_size"}  # no layer has it
        return [
            f"stage.init_from={origin} has {field.name}={getattr(theirs, field.name)}, "
            f"but model.{field.name}={getattr(self.model, field.name)}; set the same"
            + (" (a dense model becomes a mixture by init.upcycle)" if field.name == "num_experts" else "")
            for field in fields(ModelConfig)
            if field.name not in free and getattr(theirs, field.name) != getattr(self.model, field.name)
        ] + (upcycle_problems(theirs, self.model, how) if how in ("copy", "split") else [])


# What a stage may change of the model whose weights it takes over.
_FREE_AT_HAND_OVER = {"initializer_range", "max_position_embeddings", "rope_theta", "rope_scaling"}
_FREE_AT_HAND_OVER |= {"router_aux_loss_coef", "num_nextn_predict_layers"}
# And what makes a mixture of a dense one.
_FREE_TO_UPCYCLE = {"num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"}
_FREE_TO_UPCYCLE |= {"decoder_sparse_step", "mlp_only_layers"}
