"""What a language model says of given next tokens: no gradient, and never the logits of all tokens."""
# T tokens, t tokens of one chunk, H hidden, V vocabulary

import torch
from torch import Tensor

from moe.cross_entropy import CHUNK_BYTES, over_chunks, precise_dtype


@torch.no_grad()
def label_scores(
    hidden: Tensor, weight: Tensor, labels: Tensor, chunk_bytes: int = CHUNK_BYTES
) -> tuple[Tensor, Tensor]:
    """Log-probability of each label in softmax(hidden @ weight.T), and whether it is the most probable token.

    hidden [T, H], weight [V, H], labels [T] int64 -> [T] at least fp32, [T] bool. No gradient.
    """
    precise = precise_dtype(hidden)

    def of_chunk(logits: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        log_probs = logits.log_softmax(-1, dtype=precise).gather(1, labels[part, None])  # [t, 1]
        best = logits.argmax(-1, keepdim=True) == labels[part, None]
        return torch.cat([log_probs, best.to(precise)], dim=1), logits

    most = chunk_bytes // (hidden.element_size() + precise.itemsize)
    log_probs, best = over_chunks(hidden, weight, of_chunk, most, (False, False))[0].T
    return log_probs, best.bool()
