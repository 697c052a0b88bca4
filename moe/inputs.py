"""The inputs that one forward passes to all its layers besides the hidden states."""
# T = B*S tokens

from dataclasses import dataclass

from torch import Tensor

from moe.cache import CacheStep
from moe.documents import Documents
from moe.router import PLAIN, RoutingInputs


@dataclass(frozen=True)
class LayerInputs:
    """Inputs that are equal for every layer. A dataclass, because DeepSpeed's hooks ignore its tensors."""

    rotary: tuple[Tensor, Tensor]  # the tables of `moe.rope.rotary_tables` for the T tokens
    documents: Documents
    cache: CacheStep | None = None
    routing: RoutingInputs = PLAIN
