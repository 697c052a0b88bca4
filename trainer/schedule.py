"""The learning rate as a pure function of the step: nothing to save, nothing to resume."""

import math

from trainer.config import ScheduleConfig


def learning_rate(config: ScheduleConfig, peak: float, step: int, total_steps: int) -> float:
    """Learning rate of the update numbered `step` (from 0) out of `total_steps`.

    Linear warmup to `peak`, a plateau, then a fall to `min_lr_ratio * peak` over the last `decay_fraction` of
    the run: half a cosine (arXiv 1608.03983), a line for `wsd` (arXiv 2404.06395), none for `constant`.
    """
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    decay_steps = min(round(config.decay_fraction * total_steps), total_steps - config.warmup_steps)
    into_decay = step - (total_steps - decay_steps)
    if config.kind == "constant" or into_decay < 0:
        return peak
    progress = min((into_decay + 1) / decay_steps, 1.0)
    remaining = (1 + math.cos(math.pi * progress)) / 2 if config.kind == "cosine" else 1 - progress
    return peak * (config.min_lr_ratio + (1 - config.min_lr_ratio) * remaining)
