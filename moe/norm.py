"""RMSNorm (arXiv 1910.07467): torch's version, and a version whose weight is centred at zero."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.config import ModelConfig


def precise(x: Tensor) -> Tensor:
    """x in fp32, or in its own dtype if that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class ZeroCenteredRMSNorm(nn.RMSNorm):
    """x / rms(x) * (1 + weight) in at least fp32: [..., H] -> [..., H] of the dtype of x."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(precise(x), self.normalized_shape, 1.0 + precise(self.weight), self.eps).type_as(x)


def rms_norm(config: ModelConfig, size: int) -> nn.RMSNorm:
    """The kind of norm that the model uses, over `size` values."""
    kind = ZeroCenteredRMSNorm if config.zero_centered_norm else nn.RMSNorm
    return kind(size, eps=config.rms_norm_eps)
