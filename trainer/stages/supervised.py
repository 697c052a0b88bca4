"""Next-token training on prepared or streamed rows: pre-training, long context, SFT."""

import math
from typing import Any

from torch import Tensor

from data_pipeline.loader import Batch
from moe.balance import Balance
from moe.model import ModelOutput
from trainer.engine.engine import Engine
from trainer.engine.loss import LossShares, Totals
from trainer.ranks.runtime import Ranks
from trainer.settings.config import RunConfig
from trainer.stages.held_out import held_out_losses, open_loader


class Supervised:
    """A `Stage` whose batches come from the run's data, from the first row after `step` steps."""

    def __init__(self, config: RunConfig, ranks: Ranks, engine: Engine, balance: Balance, step: int) -> None:
        self._config, self._ranks, self._engine, self._balance = config, ranks, engine, balance
        rows = config.stage.global_batch_size
        self._loader = open_loader(config, ranks, next_row=step * rows)
        self._loader.check_budget(config.stage.total_steps * rows)

    def describe(self) -> list[str]:
        """The sources and their shares."""
        return self._loader.describe()

    def micro_batches(self) -> list[Batch]:
        """The next rows of the data order."""
        return next(self._loader)

    @staticmethod
    def loss_shares(
        batch: Batch, output: ModelOutput, frequencies: Tensor | None, totals: Totals
    ) -> LossShares:
        """Cross entropy per labelled token of the global batch, and the terms of routers and of MTP."""
        assert output.cross_entropy_sum is not None
        cross_entropy = output.cross_entropy_sum / max(totals.label_tokens, 1)
        return LossShares.of(cross_entropy, output, frequencies, totals)

    def evaluate(self) -> dict[str, float]:
        """Held-out cross entropy (`loss/SOURCE`) and its exponential (`perplexity/SOURCE`)."""
        self._engine.module.eval()
        losses = held_out_losses(
            lambda batch: self._engine.forward(batch, self._balance.bias), self._config, self._ranks
        )
        self._engine.module.train()
        return losses | {f"perplexity{key[4:]}": math.exp(min(loss, 700)) for key, loss in losses.items()}

    def metrics(self) -> dict[str, Any]:
        """Tokens and epochs that training has seen of each source."""
        return {"sources": self._loader.seen()}

    def results(self, metrics: dict[str, Any]) -> dict[str, str]:
        """The held-out loss of each source, next to the loss of a model that knows only token frequencies."""
        manifest, lines = self._loader.manifest, []
        for name, source in manifest.sources.items() if manifest else ():
            if f"loss/{name}" in metrics:
                known = source.validation_unigram_cross_entropy
                beside = f" (token frequencies alone: {known:.3f})" if known else ""
                lines.append(f"{name} {metrics[f'loss/{name}']:.3f}{beside}")
        return {"held out": ", ".join(lines)}

    def state(self, step: int) -> dict[str, Any]:
        """Nothing: the rows of a step follow from its number."""
        return {}

    def close(self) -> None:
        """End the loader's threads."""
        self._loader.close()
