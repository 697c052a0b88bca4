"""Commands that load a model, started by srun without anything that names the ranks."""

import subprocess
import sys
from pathlib import Path

import torch
from cluster import Cluster
from hydra import compose, initialize_config_module

from data_pipeline.tokenizer import train_tokenizer
from moe.hf import save_hf
from moe.init import init_weights
from moe.model import CausalLM
from trainer.settings.config import RunConfig


def test_every_task_of_srun_is_a_rank(cluster: Cluster, folder: Path):
    sizes = ["vocab_size=320", "hidden_size=32", "num_hidden_layers=2", "num_experts=16"]
    with initialize_config_module("conf", version_base="1.3"):
        composed = compose("train", ["name=t", "model=tiny_moe", *(f"model.{size}" for size in sizes)])
    model = CausalLM(RunConfig.load(composed).model)
    torch.manual_seed(0)
    init_weights(model, 0)
    save_hf(model, folder / "hf")
    (folder / "hf/tokenizer.json").write_text(train_tokenizer(["the quick brown fox jumps\n" * 20], 320))
    command = [sys.executable, "-m", "trainer.generate", "hf", "the quick", "--tokens", "20"]
    one = cluster.run(*command, cwd=folder)
    assert one.returncode == 0, one.stderr
    srun = ["srun", "-N2", "--ntasks-per-node=2", "--mem=900", "--time=2", "--kill-on-bad-exit"]
    four: subprocess.CompletedProcess[str] = cluster.run(*srun, *command, cwd=folder)
    assert four.returncode == 0, four.stderr
    assert four.stdout == one.stdout
    five = cluster.run("srun", "-n5", "-N1", "--mem=900", "--time=2", *command, cwd=folder)
    assert five.returncode == 2, five.stderr
    assert five.stderr.count("5 ranks cannot share the 16 experts of hf evenly") == 1
