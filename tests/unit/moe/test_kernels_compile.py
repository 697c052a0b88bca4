"""Every Triton kernel compiles for real GPUs, without one, and keeps its values in registers."""

import re
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

if find_spec("triton") is None:
    pytest.skip("Triton is not installed; `make megablocks` does it", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

KERNELS = Path(__file__).parents[3] / "moe" / "kernels"
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
BF16, FP32, INT, LONG, BOOL = "*bf16", "*fp32", "i32", "*i64", "*i1"
ROUTER = {"TOKENS": 8, "EXPERTS": 128, "K": 8, "COLUMNS": 8, "NORMALIZE": True, "MASKED": True}
CROSS_ENTROPY = [BF16, LONG, *[FP32] * 3, INT, "fp32"]
ROTARY = [*[BF16] * 5, *[INT] * 6, "fp32", "fp32"]
ROTARY_BACKWARD = [*[BF16] * 6, FP32, *[INT] * 8, "fp32", "fp32"]
# module.kernel: the types of its arguments, and its constants, as in Qwen3-30B-A3B
CASES = {
    "experts._activate": (
        [BF16, BF16, LONG, BF16, INT, INT],
        {"ROWS": 2, "BLOCK": 1024},
    ),
    "experts._activate_backward": (
        [BF16, BF16, LONG, BF16, BF16, BF16, INT, INT],
        {"ROWS": 2, "BLOCK": 1024},
    ),
    "cross_entropy._loss_and_gradient": (
        CROSS_ENTROPY,
        {"IGNORED": -100, "GRADIENT": True, "SCALED": True, "ENTROPIES": False, "BLOCK": 4096},
    ),
    "cross_entropy._loss_and_gradient with entropies": (
        CROSS_ENTROPY,
        {"IGNORED": -100, "GRADIENT": False, "SCALED": False, "ENTROPIES": True, "BLOCK": 4096},
    ),
    "experts._combine": ([LONG, LONG, BF16, BF16, INT, INT, INT], {"BLOCK": 2048}),
    "router._route": (
        [FP32, FP32, BOOL, BF16, LONG, FP32, FP32, INT, INT],
        {**ROUTER, "BIASED": True},
    ),
    "router._route_backward": ([FP32, BOOL, LONG, BF16, FP32, FP32, FP32, INT, INT], ROUTER),
    "sums._accumulate": ([FP32, BF16, "i64"], {"FIRST": False, "BLOCK": 2048}),
    "sums._accumulate of the first": ([FP32, BF16, "i64"], {"FIRST": True, "BLOCK": 2048}),
    "rotary._normalize_and_rotate": (ROTARY, {"ROWS": 8, "HALF": 64, "REST": 0}),
    "rotary._normalize_and_rotate of Qwen3-Next": (ROTARY, {"ROWS": 4, "HALF": 32, "REST": 256}),
    "rotary._normalize_and_rotate_backward": (
        ROTARY_BACKWARD,
        {"ROWS": 8, "STEPS": 16, "HALF": 64, "REST": 0},
    ),
    "rotary._normalize_and_rotate_backward of Qwen3-Next": (
        ROTARY_BACKWARD,
        {"ROWS": 4, "STEPS": 16, "HALF": 32, "REST": 256},
    ),
}
PARTS = {"router._softmax", "experts._load"}  # called by kernels


def test_no_kernel_is_left_out():
    found = set()
    for path in KERNELS.glob("*.py"):
        kernels = re.findall(r"@triton\.jit\ndef (\w+)", path.read_text())
        found |= {f"{path.stem}.{kernel}" for kernel in kernels}
    assert found == {name.split()[0] for name in CASES} | PARTS


@pytest.mark.parametrize("capability", [80, 90, 100])  # A100, H100 and H200, B200
@pytest.mark.parametrize("name", CASES)
def test_kernel_compiles(name, capability, tmp_path):
    module, function = name.split()[0].split(".")
    kernel = getattr(__import__(f"moe.kernels.{module}", fromlist=[module]), function)
    types, constants = CASES[name]
    types = [*types, *["constexpr"] * len(constants)]
    signature = dict(zip(kernel.arg_names, types, strict=True))
    source = ASTSource(kernel, signature, constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage = subprocess.run(
        [CUOBJDUMP, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    registers, stack, local = (
        int(re.search(rf"{what}:(\d+)", usage)[1]) for what in ("REG", "STACK", "LOCAL")
    )
    assert local == 0, usage
    assert stack == 0 or registers < 255, usage  # else registers are spilled to memory
