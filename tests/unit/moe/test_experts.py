"""The fast expert backends against the reference, and the memory that they keep for the backward."""

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moe import experts_optional
from moe.config import ConfigError, ModelConfig
from moe.experts import Experts, choose_backend, supports

# T tokens, H hidden, I intermediate, E local experts, K slots per token

H, INTERMEDIATE = 16, 8


def build(num_experts: int, backend: str, dtype: torch.dtype) -> Experts:
    torch.manual_seed(1)
    experts = Experts(num_experts, H, INTERMEDIATE, backend).to(dtype)
    for weight in experts.parameters():
        torch.nn.init.normal_(weight)
    return experts


def results(experts: Experts, expert_indices: Tensor) -> list[Tensor]:
    """Output, and the gradients of x, the routing weights and both weights."""
    torch.manual_seed(2)
    dtype = experts.down_proj.dtype
    x = torch.randn(len(expert_indices), H, dtype=dtype, requires_grad=True)
    routing_weights = torch.rand(*expert_indices.shape, dtype=dtype, requires_grad=True)
    y = experts(x, routing_weights, expert_indices)
    return [y, *torch.autograd.grad(y, [x, routing_weights, *experts.parameters()], torch.randn_like(y))]


def draw(tokens: int, top_k: int, experts: list[int]) -> Tensor:
    """[T,K] distinct experts per token."""
    torch.manual_seed(3)
    return torch.tensor(experts)[torch.rand(tokens, len(experts)).argsort(-1)[:, :top_k]]


# name: number of experts, expert_indices; an id equal to the number of experts is on another rank
CASES: dict[str, tuple[int, Tensor]] = {
    "all experts": (8, draw(21, 3, list(range(8)))),
    "some slots are elsewhere": (8, draw(21, 3, list(range(9))).clamp(max=8)),
    "many slots are elsewhere": (4, draw(21, 4, list(range(16))).clamp(max=4)),
    "empty experts": (8, draw(21, 2, [1, 2, 6])),
    "one hot expert": (8, draw(21, 1, [5])),
    "K=1": (8, draw(21, 1, list(range(8)))),
    "K=E": (6, draw(9, 6, list(range(6)))),
    "hundreds of rows": (4, draw(400, 2, [0, 2, 3])),
    "no tokens": (4, draw(0, 2, list(range(4)))),
    "no token is here": (4, torch.full((5, 2), 4)),
    "more ids than a byte holds": (300, draw(40, 4, list(range(300)))),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    ("backend", "dtype", "tolerance"),
    [("loop", torch.float64, 1e-13), ("loop", torch.float32, 2e-6), ("grouped", torch.float32, 2e-6)],
)
def test_equals_reference(backend: str, dtype: torch.dtype, tolerance: float, name: str) -> None:
    num_experts, expert_indices = CASES[name]
    expected = results(build(num_experts, "reference", dtype), expert_indices)
    actual = results(build(num_experts, backend, dtype), expert_indices)
    for value, exact in zip(actual, expected, strict=True):
        scale = exact.abs().max().item() if exact.numel() else 0.0
        torch.testing.assert_close(value, exact, rtol=0, atol=tolerance * scale)


def test_products_of_many_steps_have_few_sizes() -> None:
    """oneDNN keeps 1,024 compiled products, but each expert has another number of rows in every step."""
    torch.manual_seed(0)
    experts = build(64, "loop", torch.float32)
    sizes = set()

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_):
                sizes.add((func, *(operand.shape for operand in args), args[-1].stride()))
            return func(*args, **(kwargs or {}))

    for step in range(10):
        torch.manual_seed(step)
        chosen = torch.randn(64).softmax(0).expand(4000, 64).multinomial(2)
        with Record():
            results(experts, chosen)
    assert 100 < len(sizes) < 500


@pytest.mark.parametrize(
    ("rows", "dtype", "rounded"),
    [(16 * 5 - 1, torch.float32, False), (16 * 5, torch.float32, True), (1, torch.float64, True)],
)
def test_few_rows_are_not_rounded(rows: int, dtype: torch.dtype, rounded: bool) -> None:
    """In fp32, if there are fewer than 16 for each expert, for example in decoding."""
    experts, seen = build(5, "loop", dtype), set()

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.add(func.overloadpacket)
            return func(*args, **(kwargs or {}))

    with Record(), torch.no_grad():
        experts(
            torch.randn(rows, H, dtype=dtype),
            torch.ones(rows, 1, dtype=dtype),
            torch.arange(rows).view(-1, 1) % 5,
        )
    assert (torch.ops.aten._grouped_mm in seen) != rounded
    assert (torch.ops.aten.mm in seen) == rounded


def test_reference_is_the_definition() -> None:
    num_experts, expert_indices = CASES["some slots are elsewhere"]
    experts = build(num_experts, "reference", torch.float64)
    x = torch.randn(len(expert_indices), H, dtype=torch.float64)
    routing_weights = torch.rand(expert_indices.shape, dtype=torch.float64)
    y = experts(x, routing_weights, expert_indices)
    for token, slots in enumerate(expert_indices.tolist()):
        expected = torch.zeros(H, dtype=torch.float64)
        for weight, expert in zip(routing_weights[token], slots, strict=True):
            if expert < num_experts:
                gate, up = (experts.gate_up_proj[expert] @ x[token]).chunk(2)
                expected += weight * (experts.down_proj[expert] @ (gate * torch.sigmoid(gate) * up))
        torch.testing.assert_close(y[token], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["some slots are elsewhere", "empty experts"])
def test_gradcheck(name: str) -> None:
    num_experts, expert_indices = CASES[name]
    expert_indices = expert_indices[:4]
    torch.manual_seed(4)
    experts = Experts(num_experts, 3, 2, "loop").double()
    x = torch.randn(len(expert_indices), 3, dtype=torch.float64, requires_grad=True)
    routing_weights = torch.rand(expert_indices.shape, dtype=torch.float64, requires_grad=True)
    weights = [torch.randn_like(weight, requires_grad=True) for weight in experts.parameters()]

    def forward(x: Tensor, routing_weights: Tensor, *weights: Tensor) -> Tensor:
        named = dict(zip(dict(experts.named_parameters()), weights, strict=True))
        return torch.func.functional_call(experts, named, (x, routing_weights, expert_indices))

    assert torch.autograd.gradcheck(forward, (x, routing_weights, *weights))


@pytest.mark.parametrize("backend", ["loop", "grouped"])
def test_given_number_of_rows_changes_nothing(backend: str) -> None:
    num_experts, expert_indices = CASES["some slots are elsewhere"]
    experts = build(num_experts, backend, torch.float32)
    x, routing_weights = torch.randn(len(expert_indices), H), torch.rand(expert_indices.shape)
    num_rows = int((expert_indices < num_experts).sum())
    assert torch.equal(
        experts(x, routing_weights, expert_indices, num_rows=num_rows),
        experts(x, routing_weights, expert_indices),
    )


def saved_bytes(run: Callable[[], Tensor], without: list[Tensor]) -> int:
    """Bytes that autograd keeps for backward, each storage once, without the storages of `without`."""
    storages = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    for tensor in without:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storages.values())


@pytest.mark.parametrize("backend", ["loop", "grouped"])
@pytest.mark.parametrize("recompute", [False, True])
def test_keeps_only_the_pre_activation(backend: str, recompute: bool) -> None:
    """Qwen3-30B-A3B in bf16: gate and up, 2 x 8 slots x 768 x 2 bytes = 24 KiB per token, and indices; with
    recompute, the indices alone."""
    tokens, top_k, num_experts, hidden, intermediate = 64, 8, 16, 2048, 768
    experts = Experts(num_experts, hidden, intermediate, backend, recompute).bfloat16()
    for weight in experts.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    x = torch.randn(tokens, hidden).bfloat16().requires_grad_()
    routing_weights = torch.rand(tokens, top_k).bfloat16().requires_grad_()
    expert_indices = torch.rand(tokens, num_experts).argsort(-1)[:, :top_k].clone()
    kept = saved_bytes(
        lambda: experts(x, routing_weights, expert_indices), [x, routing_weights, *experts.parameters()]
    )
    pre_activation = 2 * top_k * intermediate * 2
    assert pre_activation == 24 * 1024
    index_vectors = 3 * top_k * 8 + 8  # token, slot and bag_rows of each slot, bag_starts: int64
    assert kept == tokens * (index_vectors + (0 if recompute else pre_activation)) + num_experts * 4


def test_supports() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert supports("loop", "cpu", dtype) is None
        assert supports("reference", torch.device("cuda", 1), dtype) is None
    assert supports("grouped", "cuda", torch.bfloat16) is None
    assert supports("grouped", "cpu", torch.float32) is None
    assert "torch.float64" in str(supports("grouped", "cpu", torch.float64))
    assert "mps" in str(supports("grouped", "mps", torch.float32))
    assert "reference, loop, grouped" in str(supports("groupd", "cpu", torch.float32))


def test_unknown_backend() -> None:
    with pytest.raises(ConfigError, match=r"experts.backend=groupd is unknown; use one of reference, loop"):
        Experts(4, H, INTERMEDIATE, "groupd")


BF16, FP32 = torch.bfloat16, torch.float32
LIGER = "use experts.backend=liger"
INSTALL = "experts.backend=liger needs liger_kernel, triton, not installed here; run `.venv/bin/python -m pip"


@pytest.fixture
def aligned(moe_config: ModelConfig) -> ModelConfig:
    return replace(moe_config, moe_intermediate_size=16)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch):
    """`gpu((9, 0), liger=True)`: a device of that compute capability, with or without liger installed."""

    def fake(capability: tuple[int, int], liger: bool = True) -> torch.device:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(experts_optional, "find_spec", lambda name: True if liger else None)
        return torch.device("cuda", 0)

    return fake


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize(
    ("wanted", "chosen"), [("auto", "loop"), ("grouped", "grouped"), ("reference", "reference")]
)
def test_on_a_cpu_auto_is_the_loop(moe_config, wanted: str, chosen: str, dtype: torch.dtype) -> None:
    assert choose_backend(wanted, torch.device("cpu"), dtype, moe_config) == (chosen, None)


@pytest.mark.parametrize(
    ("capability", "liger", "dtype", "deterministic", "chosen", "slow"),
    [
        ((9, 0), True, BF16, False, "grouped", None),
        ((10, 3), False, BF16, True, "grouped", None),
        ((8, 0), True, BF16, False, "liger", None),
        ((12, 0), True, BF16, False, "liger", None),  # Blackwell, but not the data center GPU
        ((8, 9), False, BF16, False, "loop", f"no grouped kernel for compute capability 8.9; {INSTALL}"),
        ((8, 0), True, BF16, True, "loop", "capability 8.0; nothing faster is deterministic here"),
        ((9, 0), True, FP32, False, "loop", "no grouped kernel in torch.float32; use dtype=bf16"),
    ],
)
def test_auto_on_a_gpu(aligned, gpu, capability, liger, dtype, deterministic, chosen, slow) -> None:
    found = choose_backend("auto", gpu(capability, liger), dtype, aligned, deterministic)
    assert found[0] == chosen
    assert found[1] is None if slow is None else slow in str(found[1])


@pytest.mark.parametrize(
    ("wanted", "capability", "slow"),
    [
        ("loop", (9, 0), "ten times slower on a GPU than grouped products; use experts.backend=auto"),
        ("grouped", (8, 0), f"waits for the GPU at every product here: torch has no .* 8.0; {LIGER}"),
        ("grouped", (9, 0), None),
        ("liger", (9, 0), None),
    ],
)
def test_a_choice_that_is_slow_is_told(aligned, gpu, wanted, capability, slow) -> None:
    chosen, said = choose_backend(wanted, gpu(capability), BF16, aligned)
    assert chosen == wanted
    assert said is None if slow is None else re.search(slow, str(said))


def test_sizes_that_the_kernel_does_not_take(moe_config, gpu) -> None:
    """12 values of an expert in bf16 are 24 bytes, not a multiple of 16."""
    chosen, slow = choose_backend("auto", gpu((9, 0), liger=False), BF16, moe_config)
    assert chosen == "loop"
    assert "multiple of 16 bytes, not model.moe_intermediate_size=12; round up to a multiple of 8" in str(
        slow
    )


def test_a_backend_that_cannot_run_is_refused(moe_config, gpu) -> None:
    with pytest.raises(ConfigError, match="liger needs liger_kernel, triton, not installed here"):
        choose_backend("liger", gpu((9, 0), liger=False), BF16, moe_config)
    gpu((9, 0))
    with pytest.raises(ConfigError, match="need a CUDA device, not cpu"):
        choose_backend("megablocks", torch.device("cpu"), BF16, moe_config)
