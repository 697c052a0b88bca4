"""What a run is: typed, and checked as a whole before anything starts. Torch-free, for login nodes."""

import os
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, Literal

from data_pipeline.config import DataConfig
from moe.config import ConfigError, ModelConfig
from moe.upcycle import upcycle_problems
from trainer.settings.benchmarks import BenchmarksConfig
from trainer.settings.deepspeed_section import deepspeed_problems
from trainer.settings.distill import DistillConfig
from trainer.settings.hub import fetch, is_hub_name
from trainer.settings.parallel import ParallelConfig, ParallelPlan
from trainer.settings.rl import RLConfig
from trainer.settings.run_folder import hf_folder, is_inside, read_run
from trainer.settings.typed import AtLeast0, AtLeast1, NotNegative, typed, value_problems


@dataclass
class StageConfig:
    """One stage of training: how long a row is, how many make a step, how many tokens in all."""

    seq_len: AtLeast1
    global_batch_size: int  # rows per optimizer step
    train_tokens: AtLeast1
    init_from: str | None  # run folder, checkpoint, Hugging Face folder or model of the hub to start from

    @property
    def step_tokens(self) -> int:
        """Tokens of one optimizer step over all ranks."""
        return self.global_batch_size * self.seq_len

    @property
    def total_steps(self) -> int:
        """The least number of optimizer steps that reaches train_tokens."""
        return -(-self.train_tokens // self.step_tokens)


@dataclass
class InitConfig:
    """The initial weights, and whether a dense stage.init_from is upcycled (moe/upcycle.py)."""

    router_scale: NotNegative
    upcycle: Literal["none", "copy", "split"]
    upcycle_noise: NotNegative


@dataclass
class OptimizerConfig:
    """AdamW (arXiv 1711.05101)."""

    lr: float
    betas: list[float]
    eps: NotNegative
    weight_decay: NotNegative
    max_grad_norm: NotNegative


@dataclass
class ScheduleConfig:
    """The learning rate as a function of the step."""

    kind: Literal["cosine", "wsd", "constant"]
    warmup_steps: AtLeast0
    decay_fraction: float
    min_lr_ratio: float


@dataclass
class BalanceConfig:
    """The load-balancing loss and the router z-loss."""

    mode: Literal["exact", "prior_buffer", "buffer", "micro_batch"]
    micro_weight: NotNegative
    z_loss_coef: NotNegative
    bias_update_rate: NotNegative


@dataclass
class ExpertsConfig:
    """How a rank computes its experts, and what changes routing in training only."""

    backend: Literal["auto", "reference", "loop", "grouped", "megablocks", "liger"]
    capacity_factor: float | None
    router_jitter_noise: float


@dataclass
class CheckpointConfig:
    """When checkpoints are written, and how many are kept."""

    every_steps: AtLeast1
    keep: AtLeast1
    keep_every_steps: AtLeast0
    background: bool


@dataclass
class EvaluateConfig:
    """Held-out loss and benchmarks during training."""

    every_steps: AtLeast0
    rows: AtLeast1
    benchmarks: BenchmarksConfig | None = None  # a run of before has none


@dataclass
class AlarmsConfig:
    """The thresholds of alarms."""

    loss_spike: NotNegative  # standard deviations above the trend of the losses before
    effective_experts: NotNegative  # least share of its experts that a layer must use
    data_stall: NotNegative  # share of a step spent waiting for data
    straggler: NotNegative  # how much longer than the median rank a rank computes
    repeat_after_steps: AtLeast0


@dataclass
class TrackerConfig:
    """Weights & Biases, intervals of metrics, and alarms."""

    wandb: Literal["auto", "online", "offline", "disabled"]
    project: str
    group: str | None
    tags: list[str]
    timeout_seconds: Annotated[float, 1]
    log_every_steps: AtLeast1
    expert_load_every_steps: AtLeast0
    watch: AtLeast0
    alarms: AlarmsConfig


@dataclass
class RunConfig:
    """A whole run. Values live in conf/, laws here; `load` reports all mistakes at once."""

    name: str
    output_dir: str
    seed: int
    dtype: Literal["fp32", "bf16"]
    device: Literal["auto", "cuda", "cpu"]
    micro_batch_size: int
    recompute: Literal["none", "experts", "local", "full"]
    deterministic: bool
    mtp_loss_scaling_factor: NotNegative
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
    rl: RLConfig | None = field(default=None, kw_only=True)  # None: supervised training
    distill: DistillConfig | None = field(default=None, kw_only=True)  # None: no teacher

    @classmethod
    def load(cls, cfg: Any) -> "RunConfig":
        """Type a composed configuration. Raises ConfigError with every unknown, missing or mistyped key."""
        return typed(cls, cfg)

    @classmethod
    def of_run(cls, run_dir: Path) -> "RunConfig":
        """The configuration that a run continues with. Raises ConfigError for any other folder."""
        return cls.load(read_run(run_dir))

    @property
    def run_dir(self) -> Path:
        """The folder of the run."""
        return Path(self.output_dir) / self.name

    @property
    def world_size(self) -> int:
        """The number of ranks that the run asks for."""
        return self.parallel.nproc_per_node

    def plan(self, world_size: int | None = None) -> ParallelPlan:
        """The layout of the run on `world_size` ranks; by default, on the number that it asks for."""
        ranks = self.world_size if world_size is None else world_size
        return ParallelPlan(ranks, self.parallel.ep_size, self.micro_batch_size, self.stage.global_batch_size)

    @property
    def zero_stage(self) -> int:
        """DeepSpeed's ZeRO stage."""
        return int(self.deepspeed.get("zero_optimization", {}).get("stage", 0))

    def check(self, world_size: int | None = None) -> None:
        """Raises ConfigError with every broken law of the run on `world_size` ranks; see `plan`."""
        of_model = self.model.problems()
        problems = [
            *of_model,
            *self.data.problems(),
            *self.plan(world_size).problems(self.model.num_experts),
            *value_problems(self),
            *self._own_problems(),
            *self._stage_problems(),
            *(self._init_problems() if not of_model else []),
            *(self._guest_problems() if not of_model else []),
            *deepspeed_problems(self.deepspeed, self.dtype),
            *(self.evaluate.benchmarks.problems() if self.evaluate.benchmarks else []),
        ]
        if problems:
            raise ConfigError(problems)

    def _own_problems(self) -> list[str]:
        """Broken laws that the types of single values cannot express."""
        stage, model, schedule, betas = self.stage, self.model, self.schedule, self.optimizer.betas
        shares = {f"schedule.{key}": getattr(schedule, key) for key in ("decay_fraction", "min_lr_ratio")}
        shares["experts.router_jitter_noise"] = self.experts.router_jitter_noise
        shares |= {f"optimizer.betas[{i}]": beta for i, beta in enumerate(betas)}
        found = []
        for key, share in shares.items():
            if not 0 <= share <= 1 or (share == 1 and "betas" in key):
                found.append(f"{key}={share} is outside 0 to 1; use a fraction")
        if len(betas) != 2:
            found.append(f"optimizer.betas={betas} must hold two numbers, as [0.9, 0.95]")
        if not 0 <= self.seed < 2**31:
            found.append(f"seed={self.seed} must be a number from 0 to 2^31 - 1")
        has_steps = stage.seq_len > 0 and stage.global_batch_size > 0  # else other laws are broken
        if has_steps and schedule.warmup_steps > stage.total_steps and schedule.kind != "constant":
            found.append(
                f"schedule.warmup_steps={schedule.warmup_steps} exceeds the {stage.total_steps} steps of the "
                "run (stage.train_tokens in steps of stage.global_batch_size x stage.seq_len), so that the "
                "peak rate is never reached; shorten it or raise stage.train_tokens"
            )
        capacity = self.experts.capacity_factor
        if capacity is not None and not capacity > 0:
            found.append(f"experts.capacity_factor={capacity} must be above 0; null drops nothing")
        keys = ["balance.micro_weight", "balance.z_loss_coef", "balance.bias_update_rate"]
        keys += ["experts.router_jitter_noise", "experts.capacity_factor"]
        found += [
            f"{key}={value} needs experts, but model.num_experts=0; use {'null' if 'capacity' in key else 0}"
            for key in keys
            if model.num_experts == 0 and (value := attrgetter(key)(self))
        ]
        if self.data.mode == "streaming" and self.evaluate.every_steps:
            found.append(
                f"evaluate.every_steps={self.evaluate.every_steps} needs held-out rows, which "
                "data.mode=streaming does not keep; use 0, or prepare the data"
            )
        if not self.optimizer.lr > 0:
            found.append(f"optimizer.lr={self.optimizer.lr} must be above 0")
        backend, size = self.experts.backend, 2 if self.dtype == "bf16" else 4
        for key in model.unaligned_keys(size) if backend == "grouped" else ():
            found.append(
                f"model.{key}={getattr(model, key)} is not a multiple of {16 // size}, which "
                f"experts.backend=grouped needs in {self.dtype}; round it up or use experts.backend=loop"
            )
        if backend in ("megablocks", "liger"):
            if self.deterministic:
                why = "its kernels promise no equal bits, as deterministic=true wants"
                found.append(f"experts.backend={backend}: {why}; use auto, or deterministic=false")
            if self.device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
                why = "its Triton kernels need a CUDA device, not device=cpu"
                found.append(f"experts.backend={backend}: {why}; use auto")
        if stage.seq_len > model.max_position_embeddings:
            found.append(
                f"stage.seq_len={stage.seq_len} exceeds model.max_position_embeddings="
                f"{model.max_position_embeddings}; shorten the rows or raise the model's limit"
            )
        if Path(self.name) == Path() or not is_inside(self.name):
            found.append(f"name={self.name!r} must be a relative path inside output_dir")
        for key in ("name", "output_dir"):
            if not (value := getattr(self, key)).isprintable():
                what = "holds a line end or another character that cannot be printed"
                found.append(f"{key}={value!r} {what}; use one line of visible characters")
        return found

    def _stage_problems(self) -> list[str]:
        """What the kind of stage needs of the rest."""
        rl, found = self.rl, self.data.reading_problems(as_prompts=self.rl is not None)
        if rl is None:
            return found
        same = "sampling and training must route alike"
        laws = {
            f"rl: experts.capacity_factor={self.experts.capacity_factor}: {same}; use null": (
                self.experts.capacity_factor is not None
            ),
            f"rl: experts.router_jitter_noise={self.experts.router_jitter_noise}: {same}; use 0": (
                self.experts.router_jitter_noise != 0
            ),
            "rl: model.num_nextn_predict_layers=1 is not trained by rewards; use 0": (
                self.model.num_nextn_predict_layers != 0
            ),
            "rl and distill cannot be one stage; set one to null": self.distill is not None,
            "rl: data.mode=streaming cannot be sampled from; prepare the data": self.data.mode != "prepared",
        }
        found += rl.problems(self.stage.seq_len, self.stage.global_batch_size)
        return found + [law for law, is_broken in laws.items() if is_broken]

    def _guest_problems(self) -> list[str]:
        """Why the model in rl.reference or distill.teacher cannot run beside this one."""
        of = self.distill
        found = of.problems(self.model) if of is not None else []
        if of is not None and of.lessons is None:
            free = vars(self.model).keys() - {"vocab_size"}
            theirs, why = self._other_problems("distill.teacher", of.teacher, free)
            seq_len, ep_size = self.stage.seq_len, self.parallel.ep_size
            found += why + (of.teacher_problems(theirs, seq_len, ep_size) if theirs else [])
        if self.rl is not None and self.rl.reference is not None:
            found += self._other_problems("rl.reference", self.rl.reference, _FREE_AT_HAND_OVER)[1]
        return found

    def _init_problems(self) -> list[str]:
        """Why the weights of stage.init_from are not of this model and cannot be upcycled into it."""
        how, upcycles = self.init.upcycle, self.init.upcycle in ("copy", "split")
        if self.stage.init_from is None:
            return [f"init.upcycle={how} needs stage.init_from, a dense folder"] if how != "none" else []
        free = _FREE_AT_HAND_OVER | (_FREE_TO_UPCYCLE if how != "none" else set())  # also for an unknown way
        theirs, found = self._other_problems("stage.init_from", self.stage.init_from, free)
        return (upcycle_problems(theirs, self.model, how) if theirs and upcycles else []) + found

    def _other_problems(self, name: str, folder: str, free: set[str]) -> tuple[ModelConfig | None, list[str]]:
        """The model in `folder`, and why it is not that of the run; keys in `free` may differ."""
        origin = Path(folder)
        named = f"{name}={origin}"
        if not is_hub_name(folder) and not os.path.isdir(origin):  # also for a name that is too long
            what = "is not a folder; name a run folder, a checkpoint or a Hugging Face folder"
            return None, [f"{named} {what}"]
        try:
            is_here = os.path.isdir(origin)
            theirs = ModelConfig.of_folder(hf_folder(origin) if is_here else fetch(folder, weights=False))
        except ConfigError as error:
            return None, [f"{named}: {problem}" for problem in error.problems]
        if len(self.model.moe_layers) == self.model.num_hidden_layers:
            free = free | {"intermediate_size"}  # no layer has it
        found = []
        for key, value in vars(theirs).items():
            if key not in free and getattr(self.model, key) != value:
                hint = " (a dense model becomes a mixture by init.upcycle)" if key == "num_experts" else ""
                ours = f"model.{key}={getattr(self.model, key)}"
                found.append(f"{named} has {key}={value}, but {ours}; set the same{hint}")
        return theirs, found


# Keys of the model that a stage may change when it starts from existing weights.
_FREE_AT_HAND_OVER = {"initializer_range", "max_position_embeddings", "rope_theta", "rope_scaling"}
_FREE_AT_HAND_OVER |= {"router_aux_loss_coef", "num_nextn_predict_layers"}
# Keys that differ as well when a dense model becomes a mixture of experts.
_FREE_TO_UPCYCLE = {"num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"}
_FREE_TO_UPCYCLE |= {"decoder_sparse_step", "mlp_only_layers"}
