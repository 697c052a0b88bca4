"""Distillation: its keys, their laws, and the record of what a teacher has said beforehand. Torch-free."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from moe.config import ConfigError, ModelConfig
from trainer.settings.typed import AtLeast1

RECORD = "teacher.json"  # of a folder of lessons


@dataclass
class DistillConfig:
    """The teacher, what is kept of its distribution, and the loss."""

    teacher: str  # run folder, checkpoint, Hugging Face folder or model of the hub, with the same vocabulary
    lessons: str | None  # folder that `python -m trainer.teach` fills; null: the teacher runs beside training
    top_k: AtLeast1  # its most probable tokens that are kept; all others are one more entry
    temperature: Annotated[float, 0.01]  # of both distributions
    divergence: Literal["forward", "reverse"]  # KL(teacher | student) | KL(student | teacher)
    weight: float  # of the divergence in the loss; the cross entropy of the labels has the rest

    def problems(self, model: ModelConfig) -> list[str]:
        """Every broken law that the type of a single value cannot express, one line each."""
        found = []
        if self.top_k > model.vocab_size > 0:
            found.append(f"distill.top_k={self.top_k} exceeds model.vocab_size={model.vocab_size}; lower it")
        if not 0 <= self.weight <= 1:
            found.append(f"distill.weight={self.weight} is outside 0 to 1; use a fraction")
        return found

    def teacher_problems(self, teacher: ModelConfig, seq_len: int, ep_size: int) -> list[str]:
        """Why the model of the teacher cannot run beside training, one line each."""
        found, named = [], f"distill.teacher={self.teacher}"
        if seq_len > teacher.max_position_embeddings:
            longest = teacher.max_position_embeddings
            found.append(f"{named} reads at most {longest} tokens; lower stage.seq_len={seq_len}")
        if teacher.num_experts % ep_size:
            what = (
                f"{named} has {teacher.num_experts} experts, which parallel.ep_size={ep_size} does not divide"
            )
            found.append(f"{what}; use another ep_size")
        return found

    def record(self, seq_len: int) -> dict[str, Any]:
        """What a folder of lessons is made with."""
        made = {"teacher": self.teacher, "top_k": self.top_k, "temperature": self.temperature}
        return made | {"seq_len": seq_len}

    def check_lessons(self, seq_len: int) -> None:
        """Raises ConfigError if `lessons` is not a folder of lessons, or was made with other settings."""
        if self.lessons is None:
            return
        named, path = f"distill.lessons={self.lessons}", Path(self.lessons) / RECORD
        try:
            record = json.loads(path.read_text())
            found = {key: record[key] for key in self.record(seq_len)}
        except (OSError, ValueError, KeyError, TypeError) as error:
            what = f"{named} is no folder of lessons ({path.name}: {type(error).__name__})"
            raise ConfigError(f"{what}; make it with python -m trainer.teach and the same keys") from error
        problems = [
            f"{named} was made with {key}={found[key]}, not {value}; set the same, or name another folder"
            for key, value in self.record(seq_len).items()
            if found[key] != value
        ]
        if problems:
            raise ConfigError(problems)
