"""A stand-in for a GPU on machines without one; it raises where the host would wait for the GPU.

The device computes nothing: its tensors have only shapes (torch's FakeTensorMode, on the device type that
torch reserves for Python backends). Tensors of the host are real. The device stays registered, so use it in a
separate process, such as a worker of `harness.run_ranks`:

    with stand_in() as device:
        model.to_empty(device=device.name)
        ...forward, backward, step; collectives leave tensors as they are
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

ROOT = Path(__file__).parents[2]
READS = ("_local_scalar_dense", "is_nonzero", "equal")  # the result is a number or a bool on the host
SIZES = ("nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount", "histc")
MASKED = ("index", "index_put", "index_put_", "_index_put_impl_")


class DeviceError(AssertionError):
    """On a GPU the host would wait here, or the operation would mix tensors of the host and the device."""


class StandIn(TorchDispatchMode):
    """The device `name`. A read of its values by the host raises, or returns `answer` if that is set."""

    name = "standin:0"

    def __init__(self, shapes: FakeTensorMode, answer: int | None) -> None:
        super().__init__()
        self._shapes = shapes
        self.answer = answer
        self.reads: list[str] = []  # the file and function of the project that made each read

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        here = torch.device(self.name).type
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        kinds = {tensor.device.type for tensor in tensors}
        if here not in kinds | {torch.device(kwargs.get("device") or "cpu").type}:
            with unset_fake_temporarily():  # operations on the host run as usual
                return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name in READS and self.answer is not None:
            self.reads.append(_caller())
            return self.answer
        if problem := _problem(name, tensors, kinds, args, kwargs, here):
            raise DeviceError(f"{func} at {_caller()}: {problem}")
        if func.namespace == "c10d":
            work = FakeWork().boxed()
            return work if len(func._schema.returns) == 1 else (args[0], work)
        args, kwargs = tree_map(self._shape_of, (args, kwargs))
        return func(*args, **kwargs)

    def _shape_of(self, value: Any) -> Any:
        """Convert a tensor of the host to one that has only a shape."""
        is_real = isinstance(value, Tensor) and not isinstance(value, FakeTensor)
        return self._shapes.from_tensor(value) if is_real else value


def _problem(name: str, tensors: list[Tensor], kinds: set[str], args: Any, kwargs: Any, here: str) -> str:
    """Why an operation that involves the device is an error; empty if it is allowed."""
    if name in ("_to_copy", "copy_"):
        is_new = name == "_to_copy"
        source, target = (args[0], kwargs.get("device", here)) if is_new else (args[1], args[0].device)
        if torch.device(target).type != here:
            return "a copy to the host waits for the device"
        at_once = not (kwargs.get("non_blocking") or args[2:3] == (True,))
        waits = at_once and source.device.type != here
        return "a copy to the device waits for it without non_blocking" if waits else ""
    if name in READS:
        return "reading a value waits for the device"
    if name in SIZES or (name == "repeat_interleave" and kwargs.get("output_size") is None):
        return "finding the size of the result waits for the device"
    if name in MASKED and any(t.dtype == torch.bool for t in tree_leaves(args[1]) if t is not None):
        return "counting the elements that a mask selects waits for the device"
    if len(kinds) > 1:
        shapes = ", ".join(f"{tensor.device.type} {list(tensor.shape)}" for tensor in tensors)
        return f"one operation mixes tensors of the host and of the device ({shapes})"
    return ""


def _caller() -> str:
    """The innermost function of the project on the stack, with its file."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        ours = path.is_relative_to(ROOT) and ".venv" not in path.parts
        if ours and path != Path(__file__):
            return f"{path.relative_to(ROOT)} {frame.f_code.co_name}"
        frame = frame.f_back
    return "a place outside the project"


class _Backend(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]  # activation recompute calls this


@contextmanager
def stand_in(answer: int | None = None) -> Iterator[StandIn]:
    """Register the device and watch its operations, which may raise DeviceError inside the block."""
    if not hasattr(torch, "standin"):
        _setup_privateuseone_for_python_backend("standin", _Backend())
    with FakeTensorMode() as shapes, StandIn(shapes, answer) as device:
        yield device
