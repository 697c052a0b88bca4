"""What the model sees: decoded rows with the borders and origins of their documents, and what is learned."""

import itertools

import numpy as np

from data_pipeline.config import DataConfig, DataError
from data_pipeline.loader import Batch, Loader
from data_pipeline.packing import NO_LOSS
from data_pipeline.tokenizer import Tokenizer, load_tokenizer


def show(config: DataConfig, which: str, *, seq_len: int, seed: int) -> str:
    """One row, readable. which: ROW, a global row number of the run; or SOURCE or SOURCE:ROW, a training row
    of one source in plain order.

    Raises DataError for what is no row of the prepared folder.
    """
    source, _, number = which.partition(":") if not which.isdecimal() else ("", "", which)
    if (source and source not in config.sources) or not (number or "0").isdecimal():
        known = ", ".join(config.sources)
        raise DataError(f"{which} is no row: give ROW, SOURCE or SOURCE:ROW; sources: {known}")
    if config.mode == "streaming":
        raise DataError("data.mode=streaming: only rows of a prepared folder have a place; prepare the data")
    one = {"global_batch_size": 1, "micro_batch_size": 1, "rank": 0, "world_size": 1}
    place = {"next_row": int(number or 0), "source": source or None}
    with Loader(config, seq_len=seq_len, seed=seed, **one, **place) as loader:
        for [batch] in loader:
            return _describe(batch, loader.origins(batch.rows[0]), load_tokenizer(config.dir))
    raise DataError(f"{which}: there are not so many rows")


def _describe(batch: Batch, origins: list[str], tokenizer: Tokenizer) -> str:
    tokens, labels = batch.input_ids[0].numpy(), batch.labels[0].numpy()
    valid = int(batch.token_mask.sum())
    # the target of position t is token t+1; the first token is a target of another row, if of any
    learned = np.append(False, labels[:-1] != NO_LOSS)
    targets = int((labels != NO_LOSS).sum())
    lines = [f"row {batch.rows[0]}: {valid} tokens, {targets} targets; [- not learned -]"]
    borders = [border for border in batch.cu_seqlens.tolist() if border <= valid]
    for (start, stop), origin in zip(itertools.pairwise(borders), origins, strict=True):
        lines.append(f"--- tokens {start} to {stop}: {origin}")
        lines.append(_marked(tokens[start:stop], learned[start:stop], tokenizer))
    if valid < len(tokens):
        lines.append(f"--- tokens {valid} to {len(tokens)}: padding")
    return "\n".join(lines)


def _marked(tokens: np.ndarray, learned: np.ndarray, tokenizer: Tokenizer) -> str:
    """The text of a document, with brackets around what is not learned."""
    changes = np.flatnonzero(learned[1:] != learned[:-1]) + 1
    text = ""
    for start, stop in itertools.pairwise([0, *changes.tolist(), len(tokens)]):
        part = tokenizer.decode(tokens[start:stop].tolist())
        text += part if learned[start] else f"[-{part}-]"
    return text
