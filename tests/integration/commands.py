"""The command line as a user types it, and the settings of a small run."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file

SMALL = [
    "model=tiny_moe",
    "model.vocab_size=512",
    "model.hidden_size=64",
    "model.num_hidden_layers=2",
    "model.num_experts=16",
    "model.num_experts_per_tok=4",
    "model.moe_intermediate_size=32",
    "stage.seq_len=64",
    "stage.global_batch_size=8",
    "stage.train_tokens=4096",  # 8 steps
    "micro_batch_size=2",
    "parallel.nproc_per_node=2",
    "parallel.ep_size=2",
    "dtype=fp32",
    "schedule.warmup_steps=2",
    "checkpoint.every_steps=4",
    "evaluate.every_steps=4",
    "evaluate.rows=8",
    "tracker.log_every_steps=1",
]


# Runs with two ranks in fp32 that must be bit-equal: on the CPU, even if the machine has GPUs.
ENVIRONMENT = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}


def python(
    *arguments: str, cwd: Path, timeout: float = 120, env: Mapping[str, str] = ENVIRONMENT
) -> subprocess.CompletedProcess[str]:
    """Run `python -m ...` in a folder and capture its output."""
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(
        command, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout, check=False
    )


def prepare_corpus(folder: Path) -> list[str]:
    """Prepare a corpus of short sentences with two sources and 512 token ids; returns overrides for it."""
    for source in ("text", "second"):
        lines = [
            f"The {source} number {n} follows {n - 1}, and {n * n} is its square.\n" * 3 for n in range(400)
        ]
        (folder / f"{source}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    overrides = [
        "data=jsonl",
        f"data.dir={folder}/prepared",
        "data.tokenizer_vocab_size=512",
        "data.validation_fraction=0.1",
        f"+data.sources.text={{kind: jsonl, paths: [{folder}/text.jsonl]}}",
        f"+data.sources.second={{kind:jsonl,paths:[{folder}/second.jsonl],weight:0.5}}",
    ]
    prepared = python("data_pipeline", "name=t", "model.vocab_size=512", *overrides, cwd=folder)
    assert prepared.returncode == 0, prepared.stderr
    return overrides


def contents(folder: str | Path) -> dict[str, bytes]:
    """The bytes of all files of a folder."""
    root = Path(folder)
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def metrics(run_dir: Path) -> list[dict]:
    """The logged training steps, without a line that is being written."""
    text = (run_dir / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    return [line for line in lines if "loss" in line]


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    folder = run_dir / "checkpoints" / (run_dir / "latest").read_text().strip() / "hf"
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same_run(a: Path, b: Path) -> None:
    """Assert bit-equal metrics of every step (the last attempt counts) and bit-equal final weights."""
    exact = ("loss", "balance_loss", "grad_norm", "learning_rate", "max_violation")
    histories = [{line["step"]: [line[key] for key in exact] for line in metrics(run)} for run in (a, b)]
    assert histories[0] == histories[1]
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def last_step(run_dir: Path) -> int:
    return max((line["step"] for line in metrics(run_dir)), default=0)


def ranks_of(launcher: subprocess.Popen) -> list[int]:
    """Process ids of the running ranks, in order of rank."""
    path = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
    return [int(child) for child in path.read_text().split()] if path.exists() else []


def kill_a_rank(launcher: subprocess.Popen) -> None:
    """Send kill -9 to the last rank, as the kernel does when memory runs out."""
    os.kill(ranks_of(launcher)[-1], signal.SIGKILL)
