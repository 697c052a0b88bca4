"""Runs on a machine that seems to have a GPU, and runs that ask for a device that does not exist."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ENVIRONMENT, assert_same_run, python

# A machine with one GPU, on which every call that would open a CUDA context raises.
FAKED = """
import os, sys
import torch
asked = []

def is_available():  # as in CUDA, the variable counts only at the first call
    if not asked:
        asked.append(os.environ.get("CUDA_VISIBLE_DEVICES") != "")
    return asked[0]

def opens(name):  # torch._dynamo needs a separate function for each name
    def opened(*arguments, **keywords):
        raise AssertionError(f"{name} opens a CUDA context")
    return opened

torch.cuda.is_available = is_available
torch.cuda.device_count = lambda: 1 if is_available() else 0
torch.cuda.get_device_name = lambda device: "NVIDIA H100 80GB HBM3"
for name in ("_lazy_init", "init", "set_device", "get_rng_state", "current_device", "get_device_properties"):
    setattr(torch.cuda, name, opens(name))
from trainer.{module} import main
code = main(sys.argv[1:])
sys.stdout.flush()
sys.stderr.flush()
os._exit(code)
"""
ALONE = ["name=a", "stage.train_tokens=1024", "parallel.nproc_per_node=1", "parallel.ep_size=1"]


def on_a_machine_with_a_gpu(module: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run `python -m trainer.MODULE ARGUMENTS` with one rank on such a machine."""
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    environment = {key: value for key, value in ENVIRONMENT.items() if key != "CUDA_VISIBLE_DEVICES"}
    command = [sys.executable, "-c", FAKED.replace("{module}", module), *arguments]
    return subprocess.run(
        command, env=environment | place, cwd=cwd, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.fixture
def frozen(small, tmp_path, composed):
    """`frozen("device=cpu")`: the folder of a run of two steps on one rank, not started yet."""
    from trainer.settings.run_folder import freeze

    def freezing(*overrides: str) -> Path:
        run_dir = tmp_path / "runs/a"
        run_dir.mkdir(parents=True)
        freeze(run_dir, composed(*small[1:], *ALONE, f"output_dir={tmp_path}/runs", *overrides), [])
        return run_dir

    return freezing


def test_a_run_on_the_cpu_opens_no_context_on_a_machine_with_a_gpu(frozen, tmp_path):
    run_dir = frozen("device=cpu")
    done = on_a_machine_with_a_gpu("run", str(run_dir), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    first = done.stdout.splitlines()[0]
    assert "on the CPU (experts loop, attention per document), 1 ranks" in first
    environment = json.loads((run_dir / "environment.json").read_text())
    assert environment["packages"]["torch"], "the frozen entries must stay"
    assert environment["attempts"]["1"]["device"] == "the CPU"
    assert environment["attempts"]["1"]["backends"] == {"experts": "loop", "attention": "per document"}
    for command in (("evaluate", str(run_dir)), ("generate", str(run_dir), "The", "--tokens=2")):
        done = on_a_machine_with_a_gpu(*command, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
    done = on_a_machine_with_a_gpu("profile", str(run_dir), "--steps=1", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_auto_takes_the_gpu(frozen, tmp_path):
    done = on_a_machine_with_a_gpu("run", str(frozen()), cwd=tmp_path)
    assert done.returncode == 1
    assert "set_device opens a CUDA context" in done.stderr


def test_a_device_that_is_not_there_is_one_message_before_anything_is_built(train, tmp_path):
    done = train("name=a", "device=cuda")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    message = "device=cuda cannot be used: CUDA_VISIBLE_DEVICES= hides every GPU; unset it; or use device=cpu"
    assert done.stderr.count(message) == 1
    assert "logs are in" not in done.stderr, "there are no logs"
    done = train("name=a", "device=cpu")
    assert done.returncode == 0, "the name must be free, as no rank had started\n" + done.stdout + done.stderr
    refused = python("trainer.resume", "runs/a", "device=cuda", cwd=tmp_path)
    assert refused.returncode == 2
    assert message in refused.stderr
    assert not list((tmp_path / "runs/a").glob("resume-*.yaml"))
    done = train("name=b", "device=gpu", "experts.backend=liger", "deterministic=true")
    assert done.returncode == 2
    assert "device=gpu is unknown; use auto, cuda, cpu" in done.stderr
    assert "experts.backend=liger: its kernels promise no equal bits" in done.stderr
    assert not (tmp_path / "runs/b/config.yaml").exists(), "must be refused before anything is started"


def test_a_deterministic_run_goes_through_all_that_torch_would_refuse(train, tmp_path):
    """On a CPU torch refuses fewer operations than on a GPU; both settings must give the same bits."""
    model = ["model=tiny_qwen3_next", "model.vocab_size=512", "model.num_hidden_layers=4", "tracker.watch=2"]
    for name, deterministic in (("a", "true"), ("b", "false")):
        done = train(f"name={name}", *model, f"deterministic={deterministic}", "experts.capacity_factor=2.0")
        assert done.returncode == 0, done.stdout + done.stderr
    assert_same_run(tmp_path / "runs/a", tmp_path / "runs/b")
