"""What a language model says of given next tokens: no gradient, and never the logits of all tokens."""
# T tokens, t tokens of one chunk, H hidden, V vocabulary

import torch
from torch import Tensor

from moe.cross_entropy import CHUNK_BYTES


@torch.no_grad()
def label_scores(
    hidden: Tensor, weight: Tensor, labels: Tensor, chunk_bytes: int = CHUNK_BYTES
) -> tuple[Tensor, Tensor]:
    """Log-probability of each label in softmax(hidden @ weight.T), and whether it is the most probable token.

    hidden [T, H], weight [V, H], labels [T] int64 -> [T] at least fp32, [T] bool. No gradient.
    """
    precise = torch.promote_types(hidden.dtype, torch.float32)
    bytes_per_logit = hidden.element_size() + precise.itemsize
    longest = max(1, chunk_bytes // (weight.shape[0] * bytes_per_logit))  # tokens
    log_probs, best = [], []
    for states, targets in zip(hidden.split(longest), labels.split(longest), strict=True):
        logits = states @ weight.T  # [t, V]
        best.append(logits.argmax(-1) == targets)
        of_all = logits.log_softmax(-1, dtype=precise)
        log_probs.append(of_all.gather(1, targets[:, None]).squeeze(1))
    return torch.cat(log_probs), torch.cat(best)
