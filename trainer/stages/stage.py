"""The interface of a training stage to the loop. A new kind of stage is a new file beside supervised.py."""

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from data_pipeline.loader import Batch
from moe.model import CausalLM, ModelOutput
from trainer.engine.loss import LossShares, Totals
from trainer.settings.config import RunConfig

BuildModel = Callable[[RunConfig], CausalLM]  # with this rank's experts; every rank must call it


class Stage(Protocol):
    """The batches, the loss and the evaluation of one kind of training.

    Every rank makes the same calls in the same order: they may contain collectives.
    """

    def describe(self) -> list[str]:
        """Lines on the training data, printed at the start of the run."""

    def micro_batches(self) -> list[Batch]:
        """This rank's micro-batches of the next step, on the host."""

    def loss_shares(
        self, batch: Batch, output: ModelOutput, frequencies: Tensor | None, totals: Totals
    ) -> LossShares:
        """The terms of a micro-batch's loss, as shares of the global batch (the rule of engine/loss.py).

        `frequencies` [L,E]: the expert frequencies for the balance loss; None for a dense model.
        """

    def evaluate(self) -> dict[str, float]:
        """Metrics on held-out data, with the model in evaluation mode."""

    def metrics(self) -> dict[str, Any]:
        """Metrics of the stage for a logged step, in addition to its loss."""

    def results(self, metrics: dict[str, Any]) -> dict[str, str]:
        """Lines for the summary of a finished run, by title, from its last metrics."""

    def state(self, step: int) -> dict[str, Any]:
        """What the step after `step` needs beside the configuration and its number: tensors and plain values.

        Its micro-batches may have been taken already, if the run stops. Equal on all ranks, for any layout of
        ranks to go on with; {} if there is nothing.
        """

    def close(self) -> None:
        """End the threads of the stage and close its files."""
