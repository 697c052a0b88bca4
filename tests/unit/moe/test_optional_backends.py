"""megablocks and liger against the reference: Triton's interpreter runs their real kernels."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moe import experts_optional
from moe.experts import Experts, supports

# T tokens, H hidden, I intermediate, E local experts, K slots per token

H, INTERMEDIATE = 20, 12
PACKAGES = {"megablocks": ["megablocks", "stk", "triton"], "liger": ["liger_kernel", "triton"]}


def draw(tokens: int, top_k: int, num_ids: int) -> Tensor:
    """[T,K] distinct ids per token."""
    torch.manual_seed(3)
    return torch.rand(tokens, num_ids).argsort(-1)[:, :top_k]


# name: number of experts, expert_indices; an id equal to the number of experts is on another rank
CASES: dict[str, tuple[int, Tensor]] = {
    "all experts": (8, draw(21, 3, 8)),
    "many slots are elsewhere": (4, draw(21, 4, 16).clamp(max=4)),
    "empty experts": (8, draw(21, 2, 3) * 3 + 1),
    "one hot expert": (8, torch.full((21, 1), 5)),
    "one expert": (1, torch.zeros(9, 1, dtype=torch.int64)),
    "K=E": (6, draw(9, 6, 6)),
    "no tokens": (4, draw(0, 2, 4)),
    "no token is here": (4, torch.full((5, 2), 4)),
}


def results(backend: str, name: str) -> list[Tensor]:
    """Output, and the gradients of x, the routing weights and both weights."""
    num_experts, expert_indices = CASES[name]
    torch.manual_seed(1)
    experts = Experts(num_experts, H, INTERMEDIATE, backend)
    for weight in experts.parameters():
        torch.nn.init.normal_(weight)
    x = torch.randn(len(expert_indices), H, requires_grad=True)
    routing_weights = torch.rand(expert_indices.shape, requires_grad=True)
    y = experts(x, routing_weights, expert_indices)
    return [y, *torch.autograd.grad(y, [x, routing_weights, *experts.parameters()], torch.randn_like(y))]


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[Tensor]]]:
    """Results of every installed backend and case, from a new process: Triton reads its mode only once."""
    path = tmp_path_factory.mktemp("interpreted") / "results.pt"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(path)]
    subprocess.run(command, env=environment, cwd=Path(__file__).parents[3], check=True, timeout=200)
    return torch.load(path)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", PACKAGES)
def test_equals_reference(backend: str, name: str, request: pytest.FixtureRequest) -> None:
    missing = [package for package in PACKAGES[backend] if find_spec(package) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed")
    actual = request.getfixturevalue("interpreted")[backend][name]
    for value, exact in zip(actual, results("reference", name), strict=True):
        scale = exact.abs().max().item() if exact.numel() else 0.0
        torch.testing.assert_close(value, exact, rtol=0, atol=2e-6 * scale)


def test_importing_the_experts_imports_no_optional_package() -> None:
    packages = sorted({package for packages in PACKAGES.values() for package in packages} | {"grouped_gemm"})
    code = f"import moe.experts, sys; assert not set({packages}) & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3], timeout=60)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The packages that find_spec finds; a test may change the set. Triton's interpreter is off."""
    names = {"megablocks", "stk", "triton", "liger_kernel"}
    monkeypatch.setattr(experts_optional, "find_spec", lambda name: True if name in names else None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    return names


@pytest.mark.parametrize("backend", PACKAGES)
def test_supports_cuda_in_bf16(backend: str, installed: set[str]) -> None:
    assert supports(backend, "cuda", torch.bfloat16) is None
    assert "no torch.float64 kernel" in str(supports(backend, "cuda", torch.float64))


def test_supports_names_what_is_not_installed(installed: set[str]) -> None:
    installed.discard("megablocks")
    assert supports("megablocks", "cuda", torch.bfloat16) == (
        "experts.backend=megablocks needs megablocks, not installed here; run `make megablocks`"
    )
    installed.clear()
    reason = str(supports("liger", "cuda", torch.bfloat16))
    assert "needs liger_kernel, triton, not installed" in reason
    assert "pip install liger-kernel" in reason


@pytest.mark.parametrize("backend", PACKAGES)
def test_supports_the_cpu_only_by_the_interpreter(
    backend: str, installed: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "need a CUDA device, not cpu" in str(supports(backend, "cpu", torch.float32))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert supports(backend, "cpu", torch.float32) is None


def test_supports_only_the_dtypes_with_a_kernel(installed: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert supports("megablocks", "cuda", torch.float32) is None
    installed.add("grouped_gemm")
    assert "no torch.float32 kernel here, only torch.bfloat16" in str(
        supports("megablocks", "cuda", torch.float32)
    )
    assert "no torch.float32 kernel" in str(supports("liger", "cuda", torch.float32))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "no torch.bfloat16 kernel" in str(supports("liger", "cpu", torch.bfloat16))


if __name__ == "__main__":
    found = [backend for backend, packages in PACKAGES.items() if all(map(find_spec, packages))]
    torch.save({backend: {name: results(backend, name) for name in CASES} for backend in found}, sys.argv[1])
    leftover = {"megablocks_ops", "grouped_gemm"} & set(sys.modules)
    assert not leftover, f"stand-ins are still in sys.modules: {leftover}"
