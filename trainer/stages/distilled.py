"""Next-token training that also learns from a teacher's distribution over each next token."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.loader import Batch
from moe.balance import Balance
from moe.distillation import Lesson
from moe.model import ModelOutput
from trainer.engine.engine import Engine
from trainer.engine.loss import LossShares, Totals
from trainer.ranks.runtime import Ranks
from trainer.settings.config import RunConfig
from trainer.stages.lessons import open_lessons
from trainer.stages.stage import BuildModel
from trainer.stages.supervised import Supervised


@dataclass(frozen=True)
class TaughtBatch(Batch):
    """A batch with what the teacher says, made by `TaughtBatch(**vars(batch), ...)`."""

    ids: Tensor  # [T,k] int32, as in `Lesson`
    log_probs: Tensor  # [T,k+1] fp32
    how: Lesson  # with the other settings, and without tensors

    def options(self) -> dict[str, Any]:
        """The lesson for the model's forward."""
        return {"how": self.how._replace(ids=self.ids, log_probs=self.log_probs)}


class Distilled(Supervised):
    """A `Stage` with the rows, the evaluation and the state of `Supervised`, and a teacher."""

    def __init__(
        self,
        config: RunConfig,
        ranks: Ranks,
        engine: Engine,
        balance: Balance,
        step: int,
        build_model: BuildModel,
    ) -> None:
        super().__init__(config, ranks, engine, balance, step)
        assert config.distill is not None
        of, nothing = config.distill, torch.zeros(0)
        self._how = Lesson(nothing, nothing, of.temperature, of.divergence == "reverse", of.weight)
        self._lessons = open_lessons(config, ranks, build_model)
        self._sums = torch.zeros(0)  # shares of the cross entropy and the divergence, on this rank
        self._teacher = of.lessons or of.teacher

    def describe(self) -> list[str]:
        """The sources, and the teacher."""
        return [*super().describe(), f"teacher: {self._teacher}"]

    def micro_batches(self) -> list[Batch]:
        """The next rows of the data order, with what the teacher says of them."""
        self._sums = torch.zeros(2, dtype=torch.float64, device=self._ranks.device)
        batches = super().micro_batches()
        with self._engine.clock.wait("teacher"):
            return [self._taught(batch) for batch in batches]

    def _taught(self, batch: Batch) -> TaughtBatch:
        ids, log_probs = self._lessons(batch)
        return TaughtBatch(**vars(batch), ids=ids, log_probs=log_probs, how=self._how)

    def loss_shares(  # type: ignore[override]  # a method, because it keeps sums
        self, batch: Batch, output: ModelOutput, frequencies: Tensor | None, totals: Totals
    ) -> LossShares:
        """The mix of cross entropy and divergence per labelled token, and the terms of routers and of MTP."""
        sums = (output.distillation_sum, output.cross_entropy_sum, output.divergence_sum)
        loss, *parts = (of / max(totals.label_tokens, 1) for of in sums if of is not None)
        self._sums += torch.stack(parts)
        return LossShares.of(loss, output, frequencies, totals)

    def metrics(self) -> dict[str, Any]:
        """Those of the data, and the two parts of the loss per labelled token of the global batch."""
        sums = self._sums.clone()
        dist.all_reduce(sums)
        cross_entropy, divergence = sums.tolist()
        return super().metrics() | {"cross_entropy": cross_entropy, "teacher_divergence": divergence}
