"""The table of shipped models: its bytes against parameters counted on the modules, and its errors."""

import re
import subprocess
import sys

import pytest
import torch

from moe.config import ConfigError
from moe.dispatch import LocalDispatcher
from moe.formats import RopeScaling
from moe.model import CausalLM
from moe.parallelize import apply_expert_parallel
from trainer.models import bytes_per_rank, main, shipped_models


@pytest.mark.parametrize("name", ["tiny_moe", "tiny_qwen2_moe", "tiny_qwen3_next", "qwen3_next_80b_a3b"])
def test_bytes_are_those_of_the_modules_of_a_rank(name):
    config, ep_size, world_size = shipped_models()[name], 8, 32
    with torch.device("meta"):
        model = CausalLM(config)
    apply_expert_parallel(model, ep_rank=3, ep_size=ep_size, dispatcher=LocalDispatcher())
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    shared = sum(p.numel() for p in model.parameters()) - experts
    cut = shared / world_size + experts / (world_size / ep_size)
    for stage, held in enumerate([(1, 1, 1), (1, 1, 0), (1, 0, 0), (0, 0, 0)]):
        whole = [
            size * (shared + experts if full else cut) for size, full in zip((2, 4, 12), held, strict=True)
        ]
        sizes = bytes_per_rank(config, zero_stage=stage, ep_size=ep_size, world_size=world_size)
        assert sizes == pytest.approx(whole)


def test_every_model_has_a_line(capsys):
    assert main(["--ep-size", "8", "--world-size", "64", "--zero-stage", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:-1]] == list(shipped_models())
    assert "30.532     3.353        23.08" in next(line for line in lines if "qwen3_30b_a3b" in line)
    assert "does not divide 60 experts" in next(line for line in lines if "qwen1_5_moe" in line)


YARN = "model.rope_scaling={rope_type: yarn, factor: %s, original_max_position_embeddings: 1024}"


def test_yarn_from_the_command_line(run_config):
    config = run_config(YARN % 4)
    assert config.model.rope_scaling == RopeScaling("yarn", 4.0, 1024)
    config.check(1)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ([YARN % 0.5], "model.rope_scaling.factor=0.5 must be at least 1: YaRN cannot shorten the context"),
        (["model.layer_types=[full_attention,full_attention,full_attention]"], "does not divide"),
        (["model.moe_intermediate_size=0"], "model.moe_intermediate_size=0 must be above 0"),
        (["model.num_key_value_heads=3"], "model.num_key_value_heads=3 does not divide"),
    ],
)
def test_contradictions_are_refused_before_a_run(run_config, overrides, line):
    config = run_config(*overrides)
    with pytest.raises(ConfigError, match=re.escape(line)):
        config.check(1)


def test_layouts_that_do_not_divide_are_refused():
    command = [sys.executable, "-m", "trainer.models", "--ep-size", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "must divide --world-size" in done.stderr
