"""What the loop asks of a training stage. Another kind of stage is another file beside supervised.py."""

from typing import Any, Protocol

from torch import Tensor

from data_pipeline.loader import Batch
from moe.model import ModelOutput
from trainer.engine.loss import LossShares, Totals


class Stage(Protocol):
    """The batches, the loss and the evaluation of one kind of training.

    Every rank makes the same calls in the same order: they may contain collectives.
    """

    def describe(self) -> list[str]:
        """What it trains on, as lines for the start of the run."""

    def micro_batches(self) -> list[Batch]:
        """This rank's micro-batches of the next step, on the host."""

    def loss_shares(
        self, batch: Batch, output: ModelOutput, frequencies: Tensor | None, totals: Totals
    ) -> LossShares:
        """The terms of a micro-batch's loss, as shares of the global batch (the rule of engine/loss.py).

        `frequencies` [L,E] are those of the balance loss; None for a dense model.
        """

    def evaluate(self) -> dict[str, float]:
        """Metrics on held-out data; the model is in evaluation mode meanwhile."""

    def metrics(self) -> dict[str, Any]:
        """What a logged step says of the stage beside its loss."""

    def results(self, metrics: dict[str, Any]) -> dict[str, str]:
        """Lines of the last words of a finished run, by title, from its last metrics."""

    def close(self) -> None:
        """End its threads and close its files."""
