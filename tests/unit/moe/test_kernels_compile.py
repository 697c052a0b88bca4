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
BF16, INT, LONG, FLOAT = "*bf16", "i32", "*i64", "fp32"
ROTARY = [*[BF16] * 5, *[INT] * 6, FLOAT, FLOAT]
ROTARY_BACKWARD = [*[BF16] * 6, "*fp32", *[INT] * 8, FLOAT, FLOAT]
# module.kernel: the types of its arguments, and its constants, as in Qwen3-30B-A3B
CASES = {
    "experts._activate": (
        [BF16, BF16, BF16, LONG, BF16, INT, INT],
        {"ROWS": 2, "BLOCK": 1024},
    ),
    "experts._activate_backward": (
        [BF16, BF16, BF16, LONG, BF16, BF16, BF16, BF16, INT, INT],
        {"ROWS": 2, "BLOCK": 1024},
    ),
    "experts._combine": ([BF16, LONG, LONG, BF16, INT, INT, INT], {"BLOCK": 2048}),
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


def test_no_kernel_is_left_out():
    found = set()
    for path in KERNELS.glob("*.py"):
        kernels = re.findall(r"@triton\.jit\ndef (\w+)", path.read_text())
        found |= {f"{path.stem}.{kernel}" for kernel in kernels}
    assert found == {name.split()[0] for name in CASES}


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
    assert re.search(r"STACK:0 .*LOCAL:0 ", usage), usage  # no register is spilled to memory
