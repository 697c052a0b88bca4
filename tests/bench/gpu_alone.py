"""Measures parts of a step alone for `make bench-gpu`: prints a line of JSON per figure.

`python tests/bench/gpu_alone.py SECTION,... UNTIL [tiny] [liger]`: sections are ceilings, experts, attention,
cross_entropy and router; UNTIL is the time (seconds since 1970) after which nothing new is started.
"""

import json
import sys
import time
from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from work import device

from moe.kernels import support

# T tokens, H hidden, I intermediate, E experts, K slots per token, V vocabulary, N heads, C head_dim

# layers of Qwen3-30B-A3B, and tiny ones for a rehearsal
WHOLE: dict[str, Any] = {"hidden": 2048, "heads": 32, "key_value_heads": 4, "head_dim": 128}
WHOLE |= {"experts": 128, "top_k": 8, "width": 768, "vocab": 151936}
TINY: dict[str, Any] = {
    "hidden": 64,
    "heads": 4,
    "key_value_heads": 2,
    "head_dim": 16,
    "experts": 8,
    "top_k": 2,
}
TINY |= {"width": 32, "vocab": 512, "rows": 2, "seq_len": 64, "document": 64}
RUNS = 10  # timed calls, after three for warm-up


def is_tiny() -> bool:
    """Whether this is a rehearsal."""
    return "tiny" in sys.argv


def tell(section: str, **figures: Any) -> None:
    """Print a figure of a section."""
    print(json.dumps({"section": section, **figures}), flush=True)


def print_card() -> None:
    """Print the device on which everything is measured."""
    from trainer.monitor.hardware import peak_flops

    about = {"torch": torch.__version__, "tiny": is_tiny()}
    if not torch.cuda.is_available():
        tell("card", name="the CPU", gib=0, peak=peak_flops(device(), torch.float32), **about)
        return
    name, memory = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
    tell("card", name=name, gib=memory / 2**30, peak=peak_flops(device(), torch.bfloat16), **about)


def synchronize() -> None:
    """Wait for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def milliseconds(function: Callable[[], Any]) -> float:
    """The mean of RUNS calls in a row, after three calls for warm-up."""
    for _ in range(3):
        function()
    synchronize()
    start = time.perf_counter()
    for _ in range(RUNS):
        function()
    synchronize()
    return 1000 * (time.perf_counter() - start) / RUNS


def random(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Normally distributed numbers that require a gradient."""
    return (scale * torch.randn(shape, device=device(), dtype=dtype)).requires_grad_()


def there_and_back(
    name: str, section: str, function: Callable[[], Tensor], flops: float, **about: Any
) -> None:
    """Print the times of a forward, and of forward and backward; `flops` are those of the forward.

    The backward has twice the FLOPs of the forward, as for a product, unless `about` has another `backward`.
    """
    told = {"name": name, "flops": flops, "backward": 2.0} | about
    try:
        direction = torch.randn_like(function())

        def both() -> None:
            function().backward(direction)

        there, kept = milliseconds(function), kept_bytes(function)
        tell(section, **told, forward_ms=there, both_ms=milliseconds(both), kept=kept)
    except torch.OutOfMemoryError:
        tell(section, **told, forward_ms=None, why="out of memory")


def kept_bytes(function: Callable[[], Tensor]) -> int:
    """Bytes on the device that a forward leaves behind for its backward, its result included."""
    if not torch.cuda.is_available():
        return 0
    before = torch.cuda.memory_allocated()
    result = function()
    kept = torch.cuda.memory_allocated() - before
    del result
    return kept


def ceilings() -> None:
    """What the card can do: TFLOP/s of a large product, and TB/s of a copy, reads plus writes."""
    size, length = (256, 2**20) if is_tiny() else (8192, 2**31)
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (random(size, size, dtype=dtype).detach() for _ in range(2))
        took = milliseconds(lambda a=a, b=b: a @ b)
        tell("ceilings", name=f"product {size}^3, {dtype}", rate=2 * size**3 / took / 1e9, unit="TFLOP/s")
    source = torch.zeros(length, dtype=torch.uint8, device=device())
    to = torch.empty_like(source)
    took = milliseconds(lambda: to.copy_(source))
    tell("ceilings", name="copy", rate=2 * length / took / 1e9, unit="TB/s")


def experts() -> None:
    """The experts of a layer, by backend and number of tokens."""
    from moe.experts import Experts, supports

    shape = TINY if is_tiny() else WHOLE
    hidden, width, count, top_k = (shape[key] for key in ("hidden", "width", "experts", "top_k"))
    backends = ["grouped", "loop", *(["liger"] if "liger" in sys.argv else [])]
    if supports("megablocks", device(), torch.bfloat16) is None:
        backends.append("megablocks")
    module = Experts(count, hidden, width, "loop").to(device(), torch.bfloat16)
    for weight in module.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    peer = _peer_experts(shape)
    for tokens in (64, 128) if is_tiny() else (4096, 32768):
        x = random(tokens, hidden)
        ids = torch.rand(tokens, count, device=device()).argsort(-1)[:, :top_k].contiguous()
        weights = torch.full(ids.shape, 1 / top_k, device=device(), dtype=x.dtype, requires_grad=True)
        about = {"tokens": tokens, "flops": 6 * tokens * top_k * hidden * width}
        for backend in backends:
            module.backend = backend
            function = lambda: module(x, weights, ids, ids.numel())  # noqa: B023, E731
            there_and_back(backend, "experts", function, **about)
            if backend == "grouped":
                with support.turned_off():
                    there_and_back("grouped, torch's passes", "experts", function, **about)
        there_and_back("transformers, grouped_mm", "experts", lambda: peer(x, ids, weights), **about)  # noqa: B023
        module.zero_grad()
        peer.zero_grad()


def _peer_experts(shape: dict[str, Any]) -> Any:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    sizes = {"hidden_size": shape["hidden"], "moe_intermediate_size": shape["width"]}
    config = Qwen3MoeConfig(**sizes, num_experts=shape["experts"], num_experts_per_tok=shape["top_k"])
    config._experts_implementation = "grouped_mm"
    module = Qwen3MoeExperts(config).to(device(), torch.bfloat16)
    for weight in module.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    return module


def attention() -> None:
    """The core of attention by path, over documents of equal lengths and of different lengths."""
    from moe.attention import attend_per_document, attend_varlen, varlen_obstacle
    from moe.documents import Documents

    shape, tokens = (TINY, 128) if is_tiny() else (WHOLE, 16384)
    paths: dict[str, Any] = {"per document": attend_per_document}
    if varlen_obstacle(device(), torch.bfloat16) is None:
        paths = {"varlen": attend_varlen, **paths}
    whole = [[tokens], [tokens // 4] * 4]
    few = [_different(tokens, count) for count in (2, 4, 8)]  # to judge `moe.attention.prefers_per_document`
    # lengths as in packed text: half of the tokens in the longest tenth of the documents
    cuts = torch.rand(63, generator=torch.Generator().manual_seed(0)).pow(2).mul(tokens - 1).long() + 1
    borders = sorted({0, tokens, *cuts.tolist()})
    ragged = [stop - start for start, stop in pairwise(borders)]
    heads = [shape["heads"], shape["key_value_heads"], shape["key_value_heads"]]
    query, key, value = (random(tokens, count, shape["head_dim"]) for count in heads)
    for lengths in (*whole, *few, ragged):
        starts = torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32)
        documents = Documents(starts.to(device()), tuple(lengths))
        # two products of length^2 x C for each head; only the causal half counts
        flops = 2 * heads[0] * shape["head_dim"] * sum(length**2 for length in lengths)
        about = {"documents": len(lengths), "longest": max(lengths), "backward": 2.5}
        for name, path in paths.items():
            function = lambda path=path: path(query, key, value, documents)  # noqa: B023, E731
            there_and_back(name, "attention", function, flops, **about)


def _different(tokens: int, count: int) -> list[int]:
    """`count` different lengths that add up to `tokens`, descending, so that they have to be sorted."""
    return [tokens // count + (count - 1 - 2 * number) * (tokens // (16 * count)) for number in range(count)]


def cross_entropy() -> None:
    """The head and its loss."""
    from moe.cross_entropy import chunked_cross_entropy

    shape, tokens = (TINY, 128) if is_tiny() else (WHOLE, 16384)
    hidden, weight = random(tokens, shape["hidden"]), random(shape["vocab"], shape["hidden"], scale=0.02)
    labels = torch.randint(0, shape["vocab"], (tokens,), device=device())
    # ours computes the gradients in the forward, which therefore has all three products
    product = 2 * tokens * shape["hidden"] * shape["vocab"]
    about = {"tokens": tokens, "logits_bytes": 2 * tokens * shape["vocab"]}
    function = lambda: chunked_cross_entropy(hidden, weight, labels)  # noqa: E731
    there_and_back("ours", "cross_entropy", function, 3 * product, backward=0.0, **about)
    with support.turned_off():
        there_and_back("ours, torch's passes", "cross_entropy", function, 3 * product, backward=0.0, **about)
    hidden.grad = weight.grad = None
    function = lambda: F.cross_entropy((hidden @ weight.T).float(), labels, reduction="sum")  # noqa: E731
    there_and_back("torch, all logits at once", "cross_entropy", function, product, **about)
    if "liger" in sys.argv:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        function = lambda: liger_fused_linear_cross_entropy(hidden, weight, labels, reduction="sum")  # noqa: E731
        there_and_back("liger", "cross_entropy", function, 3 * product, backward=0.0, **about)


def router() -> None:
    """The router of a layer with its statistics."""
    from moe.router import Router

    shape, tokens = (TINY, 128) if is_tiny() else (WHOLE, 16384)
    module = Router(shape["hidden"], shape["experts"], shape["top_k"], True).to(device(), torch.bfloat16)
    torch.nn.init.normal_(module.weight, std=0.02)
    hidden = random(tokens, shape["hidden"])
    mask = torch.ones(tokens, dtype=torch.bool, device=device())

    def function() -> Tensor:
        weights, _, statistics = module(hidden, mask)
        return weights.float().sum() + statistics.probability_sums.sum() + statistics.z_sums

    about = {"tokens": tokens, "flops": 2 * tokens * shape["hidden"] * shape["experts"]}
    there_and_back("ours", "router", function, **about)
    with support.turned_off():
        there_and_back("ours, torch's passes", "router", function, **about)


SECTIONS = {function.__name__: function for function in (ceilings, experts, attention, cross_entropy, router)}


def main(sections: str, until: str, *_: str) -> None:
    """Measure the sections."""
    print_card()
    for name in sections.split(","):
        if time.time() < float(until):
            torch.manual_seed(0)
            SECTIONS[name]()


if __name__ == "__main__":
    main(*sys.argv[1:])
