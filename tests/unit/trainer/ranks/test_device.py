"""The device of a rank, on fake machines: with and without GPUs, with a driver that is too old, with MIG."""

import os
from pathlib import Path

import pytest
import torch

from moe.config import ConfigError
from trainer.ranks import device as device_module
from trainer.ranks import launch
from trainer.ranks.device import choose_device, device_facts, device_name

TOO_OLD = "The NVIDIA driver on your system is too old (found version 12040). Please update\nyour GPU driver."


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """`machine(gpus=8, usable=True, ...)`: what torch and the kernel report about the machine."""

    def fake(
        gpus: int = 0, usable: bool = True, name: str = "NVIDIA H100 80GB HBM3", visible: str | None = None
    ) -> None:
        def init() -> None:
            raise RuntimeError(TOO_OLD)

        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: usable and gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus if usable else 0)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        monkeypatch.setattr(torch.cuda, "init", init)
        (devices := tmp_path / f"{gpus} GPUs").mkdir(exist_ok=True)
        for number in range(gpus):
            (devices / f"nvidia{number}").touch()
        monkeypatch.setattr(launch, "_DEVICES", devices)
        monkeypatch.setattr(device_module, "driver_version", lambda: "550.54.15")

    return fake


def refused(*arguments: object) -> str:
    with pytest.raises(ConfigError) as caught:
        choose_device(*arguments)
    (problem,) = caught.value.problems
    return problem


def test_auto_takes_the_gpu_of_the_rank(machine):
    machine(gpus=8)
    assert [choose_device("auto", rank, 8, 16) for rank in (0, 7)] == [
        (torch.device("cuda", 0), None),
        (torch.device("cuda", 7), None),
    ]
    assert choose_device("cuda", 3, 4, 4) == (torch.device("cuda", 3), None)


@pytest.mark.parametrize("visible", [None, "0,1", ""])
def test_cpu_hides_every_gpu_from_the_process(machine, visible):
    machine(gpus=8, visible=visible)
    assert choose_device("cpu", 3, 4, 4) == (torch.device("cpu"), None)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


def test_a_machine_without_gpus(machine):
    machine(gpus=0)
    assert choose_device("auto", 1, 2, 2) == (torch.device("cpu"), None), "no warning without a GPU"
    assert refused("cuda") == (
        "device=cuda cannot be used: this machine shows no NVIDIA GPU (/dev/nvidia0); or use device=cpu"
    )


def test_a_driver_that_is_too_old(machine):
    machine(gpus=8, usable=False)
    device, warning = choose_device("auto", 0, 8, 8)
    assert device.type == "cpu"
    for part in (
        "training on the CPU",
        "CUDA 13.0",
        "driver 550.54.15",
        "too old (found version 12040). Please update your GPU driver.",
        "--index-url https://download.pytorch.org/whl/cu126",
    ):
        assert part in str(warning)
        assert part in refused("cuda") or part == "training on the CPU"
    assert "\n" not in str(warning)


def test_a_build_without_cuda_on_a_machine_with_a_gpu(machine, monkeypatch):
    machine(gpus=1, usable=False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "is built without CUDA; `pip install" in str(choose_device("auto")[1])


@pytest.mark.parametrize("visible", ["", "-1", "NoDevFiles"])
def test_gpus_that_the_user_hides_are_no_surprise(machine, visible):
    machine(gpus=8, usable=False, visible=visible)
    assert choose_device("auto", 0, 2, 2) == (torch.device("cpu"), None)
    assert f"CUDA_VISIBLE_DEVICES={visible} hides every GPU; unset it" in refused("cuda")


def test_more_ranks_than_gpus(machine):
    machine(gpus=1)
    asked, remedy = "2 ranks (parallel.nproc_per_node or --nproc)", "use 1, or device=cpu to train on the CPU"
    expected = f"{asked} but this machine has 1 GPU; {remedy}"
    assert [refused("auto", rank, 2, 2) for rank in (0, 1)] == [expected] * 2, "every rank reports it"
    assert refused("cuda", 1) == expected, "also if the number of ranks is unknown"
    machine(gpus=8, visible="0,3")
    machine_of_two = "this machine has 8 GPUs (CUDA_VISIBLE_DEVICES=0,3); use 8"
    assert machine_of_two in refused("auto", 0, 9, 9)


def test_a_task_that_sees_one_gpu_takes_it(machine):
    """As under SLURM's --gpus-per-task; `Ranks.join` sets LOCAL_RANK, which DeepSpeed reads."""
    machine(gpus=1, visible="3")
    assert choose_device("auto", 3, 8, 16) == (torch.device("cuda", 0), None)


def test_mig(machine):
    machine(gpus=1, name="NVIDIA A100-SXM4-40GB MIG 1g.5gb", visible="MIG-7d2f")
    assert choose_device("auto")[0] == torch.device("cuda", 0)
    assert "2 ranks on MIG instances (NVIDIA A100-SXM4-40GB MIG 1g.5gb): NCCL" in refused("auto", 0, 1, 2)


def test_names_and_facts(machine, monkeypatch):
    machine(gpus=2)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 28, 3))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    gpu = torch.device("cuda", 1)
    assert device_name(gpu) == "NVIDIA H100 80GB HBM3"
    facts = device_facts(gpu)
    assert facts | {"host": "", "torch": ""} == {
        "host": "",
        "torch": "",
        "device": "NVIDIA H100 80GB HBM3",
        "device_count": 2,
        "cuda": "13.0",
        "nccl": "2.28.3",
        "driver": "550.54.15",
        "compute_capability": (9, 0),
    }
    assert device_facts(torch.device("cpu"))["device"] == "the CPU"
