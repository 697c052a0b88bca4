"""Fast matrix products on a CPU: the library for fp32, and bf16 on CPUs without instructions for it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

aten = torch.ops.aten
_ATTEND = aten._scaled_dot_product_flash_attention_for_cpu
_PRODUCTS = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten._grouped_mm, _ATTEND}
_PRODUCTS.add(aten._scaled_dot_product_flash_attention_for_cpu_backward)


@contextmanager
def fast_products(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Inside, a CPU multiplies matrices of `dtype` as fast as it can, summing in fp32; no effect on a GPU."""
    if device.type != "cpu":
        yield
    elif dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        with _InFp32():
            yield
    else:
        settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
        before, settings.fp32_precision = settings.fp32_precision, "bf16"
        if not _exact():
            settings.fp32_precision = before
        yield
        settings.fp32_precision = before


def _exact() -> bool:
    """Whether fp32 products stay fp32: oneDNN may now round operands to bf16, and does so if that is faster.

    Otherwise (no AMX) the setting only replaces MKL by oneDNN, which is twice as fast on some CPUs.
    """
    a, b = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(0)).unbind()
    exact = a.double() @ b.double()
    layouts = ((a, b), (a.t().contiguous().t(), b), (a, b.t().contiguous().t()))
    return all((x @ y - exact).abs().max() < 1e-5 * exact.abs().max() for x, y in layouts)


class _InFp32(TorchDispatchMode):
    """Computes products of bf16 operands in fp32 and rounds once: bf16 itself takes over ten times as long.

    The mode sees operators below autograd, so it also covers the backward.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket not in _PRODUCTS or args[0].dtype != torch.bfloat16:
            return func(*args, **kwargs)
        out = kwargs.pop("out", None)
        wide = tree_map_only(Tensor, lambda x: x.float() if x.dtype == torch.bfloat16 else x, (args, kwargs))
        result = func.overloadpacket(*wide[0], **wide[1])
        if out is not None:
            return out.copy_(result)
        if func.overloadpacket is _ATTEND:  # the second result is the logsumexp, in fp32
            return result[0].bfloat16(), result[1]
        return tree_map_only(Tensor, Tensor.bfloat16, result)
