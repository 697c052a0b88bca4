"""A trial of the Triton kernels, before a run relies on them."""
# T tokens, H hidden, E experts, K experts per token, V vocabulary, N heads, C head_dim, R rotated values

from functools import cache

import torch
from torch import Tensor

from moe.attention import HeadNorm
from moe.cross_entropy import chunked_cross_entropy, token_log_probs
from moe.documents import Documents
from moe.experts import Experts
from moe.inputs import LayerInputs
from moe.kernels import support
from moe.router import Router
from moe.sums import accumulate

T, H, E, K, V, N, C, R = 50, 48, 16, 3, 700, 5, 32, 16


@cache
def kernels_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why torch's code runs in place of moe/kernels on `device`, and a remedy; None if the kernels run.

    Each kernel is compared once per process with torch, forward and backward. If one raises or is wrong, none
    is used from then on.
    """
    if (why := support.obstacle(device)) is not None:
        return why
    try:
        found = _results(device, dtype)
        with support.turned_off():
            expected = _results(device, dtype)
        pairs = zip(found, expected, strict=True)
        errors = [float((one.float() - other.float()).norm() / other.float().norm()) for one, other in pairs]
        if all(error <= 2**-5 for error in errors):  # false for NaN
            return None
        said = "relative errors " + ", ".join(f"{error:.1e}" for error in errors)
    except Exception as error:  # whatever it is, training goes on with torch's code
        said = " ".join(f"{type(error).__name__}: {error}".split())
    support.turn_off()
    return f"the Triton kernels fail here ({said[:500]}); report it, with the version of Triton"


def _results(device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """What every kernel computes, with gradients, from the same small inputs."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()

    with torch.inference_mode(False), torch.enable_grad():
        router, experts, head_norm = Router(H, E, K, True), Experts(E, H, 24, "loop"), HeadNorm(C, eps=1e-6)
        modules = torch.nn.ModuleList([router, experts, head_norm]).to(device, dtype)
        for weight in modules.parameters():
            weight.data.copy_(drawn(*weight.shape))
        x, heads, head = drawn(T, H), drawn(T, N, C), drawn(V, H)
        angles = torch.arange(T * R // 2, device=device).view(T, 1, R // 2)
        borders = torch.tensor([0, T], dtype=torch.int32, device=device)
        tables = (angles.cos().to(dtype), angles.sin().to(dtype))
        weights, ids, statistics = router(x)
        y = experts(x, weights, ids, T * K)
        rotated = head_norm(heads, LayerInputs(tables, Documents(borders, (T,))))
        labels = torch.arange(T, device=device)
        cross_entropy = chunked_cross_entropy(x, head, labels)
        log_probs, entropies = token_log_probs(x, head, labels, temperature=0.7)
        loss = cross_entropy + y.float().square().sum() + rotated.float().square().sum()
        loss = (
            loss + log_probs.square().sum() + statistics.z_sums + statistics.probability_sums.square().sum()
        )
        gradients = torch.autograd.grad(loss, [x, heads, head, *modules.parameters()])
    total = torch.ones(T, H, device=device)
    for first in (True, False):
        accumulate(total, x.detach(), first)
    heads_results = cross_entropy, log_probs, entropies
    return [
        x.detach() for x in (weights, *statistics.present(), y, rotated, *heads_results, total, *gradients)
    ]
