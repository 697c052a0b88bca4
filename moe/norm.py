"""RMSNorm (arXiv 1910.07467): torch's own, and the one whose weight is centred at zero."""

import torch.nn.functional as F
from torch import Tensor, nn

from moe.config import ModelConfig


class ZeroCenteredRMSNorm(nn.RMSNorm):
    """x / rms(x) * (1 + weight) in fp32: [..., H] -> [..., H] of the dtype of x."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.normalized_shape, 1.0 + self.weight.float(), self.eps).type_as(x)


def rms_norm(config: ModelConfig, size: int) -> nn.RMSNorm:
    """The norm of this model over `size` values."""
    kind = ZeroCenteredRMSNorm if config.zero_centered_norm else nn.RMSNorm
    return kind(size, eps=config.rms_norm_eps)
