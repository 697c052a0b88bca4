"""What is logged, how often, and from where on it is an alarm. Torch-free."""

from dataclasses import dataclass


@dataclass
class AlarmsConfig:
    """From where on a metric is an alarm."""

    loss_spike: float  # deviations above what the losses before lead to
    effective_experts: float  # least, of any layer
    data_stall: float  # share of the step
    straggler: float  # how much longer than the median rank one computes
    repeat_after_steps: int


@dataclass
class TrackerConfig:
    """Weights & Biases, the intervals of metrics, alarms."""

    wandb: str
    project: str
    group: str | None
    tags: list[str]
    timeout_seconds: float
    log_every_steps: int
    expert_load_every_steps: int
    watch: int
    alarms: AlarmsConfig
