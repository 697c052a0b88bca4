"""The laws of a submission to a cluster."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_module

from moe.config import ConfigError
from slurm.config import SubmitConfig
from trainer.settings.typed import typed

CLUSTERS = sorted(
    path.stem
    for path in (Path(__file__).parents[3] / "conf/slurm").glob("*.yaml")
    if not path.stem.startswith("_")
)


def submission(*overrides: str) -> SubmitConfig:
    with initialize_config_module("conf", version_base="1.3"):
        return typed(SubmitConfig, compose("submit", overrides=["name=t", *overrides]))


def problems(*overrides: str) -> list[str]:
    config = submission(*overrides)
    with pytest.raises(ConfigError) as error:
        config.check()
    return error.value.problems


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_every_cluster_file_is_lawful(cluster):
    config = submission(
        *(f"slurm={cluster}", "slurm.partition=p", "slurm.nodes=2"),
        *("parallel.nproc_per_node=4", "parallel.ep_size=4", "stage.global_batch_size=8"),
    )
    config.check()
    assert config.world_size == 8
    assert config.slurm.gpus_per_node in (0, 4), "one GPU per rank"


def test_a_cluster_file_leaves_the_partition_to_its_user():
    with pytest.raises(ConfigError, match=r"slurm\.partition has no value; give slurm\.partition="):
        submission("slurm=h100_ib")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("slurm.nodes=0", "slurm.nodes=0 is below 1"),
        ("slurm.resume=never", "slurm.resume=never is unknown; use requeue or chain"),
        ("slurm.container.kind=docker", "slurm.container.kind=docker is unknown"),
        ("slurm.container.kind=apptainer", "needs slurm.container.image"),
        ("slurm.gpus_per_node=3", "a rank is one GPU"),
        ("+slurm.sbatch.open_mode=truncate", "slurm.sbatch.open-mode is set by"),
        ("+slurm.sbatch.no_requeue=true", "slurm.sbatch.no-requeue is set by slurm.resume"),
        ("+slurm.sbatch.J=x", "must be a long flag"),
        ('slurm.partition="a\nb"', "one line"),
        ("+slurm.env.WANDB_API_KEY=x", "looks like a secret"),
        ("+slurm.env.hf_token=x", "looks like a secret"),
        ("+slurm.env.a-b=x", "not the name of an environment variable"),
        ("parallel.ep_size=3", "parallel.ep_size=3 does not divide"),
    ],
)
def test_broken_laws_are_named(override, message):
    assert any(message in problem for problem in problems(override)), problems(override)


@pytest.mark.parametrize(
    ("device", "gpus", "message"),
    [
        (
            "cuda",
            0,
            "slurm.gpus_per_node=0 but device=cuda: no node would give a GPU; use slurm.gpus_per",
        ),
        ("cpu", 2, "slurm.gpus_per_node=2 but device=cpu: the GPUs would be idle; use slurm.gpus_per_node=0"),
        ("auto", 0, None),
        ("auto", 2, None),
        ("cuda", 2, None),
        ("cpu", 0, None),
    ],
)
def test_the_device_and_the_gpus_that_are_asked_for(device, gpus, message):
    request = [f"device={device}", f"slurm.gpus_per_node={gpus}", "parallel.nproc_per_node=2"]
    if message is None:
        config = submission(*request)
        config.check()
    else:
        (problem,) = problems(*request)
        assert problem.startswith(message)


@pytest.mark.parametrize("cluster", [name for name in CLUSTERS if name != "local"])
def test_a_gpu_cluster_keeps_memory_whole_and_tells_of_hangs(cluster):
    env = submission(f"slurm={cluster}", "slurm.partition=p").slurm.env
    assert env["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert env["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
    assert int(env["TORCH_FR_BUFFER_SIZE"]) > 0


def test_a_misplaced_expert_group_is_an_error_in_the_large_experiments():
    for stage in ("general_4k", "stem_code_4k", "long_context_32k", "sft"):
        assert submission(f"experiment=qwen3_30b_a3b_{stage}").parallel.ep_within_node


def test_what_is_no_secret():
    config = submission("+slurm.env.TOKENIZERS_PARALLELISM='false'")
    config.check()


def test_all_problems_at_once():
    assert len(problems("slurm.nodes=0", "slurm.resume=x", "optimizer.lr=0")) >= 3


def test_flags():
    flags = submission(
        *("slurm.nodes=3", "slurm.exclusive=true", "slurm.mem=10G", "slurm.partition=a"),
        *("+slurm.sbatch.partition=b", "+slurm.sbatch.mail_type=END", "+slurm.sbatch.priority=0"),
    ).slurm.flags()
    assert flags["nodes"] == "3"
    assert flags["exclusive"] is None, "a flag without a value"
    assert flags["partition"] == "b"
    assert flags["mail-type"] == "END"
    assert flags["priority"] == "0"
    assert "account" not in flags
    assert "gpus-per-node" not in flags


def test_a_preparation_obeys_the_laws_of_its_data_and_its_request():
    """Not those of a training run: its batch need not fit the ranks."""
    submission("job=prepare", "stage.global_batch_size=7", "slurm.nodes=3", "device=cuda").check()
    assert submission("job=prepare", "data.num_workers=4", "slurm.nodes=3").world_size == 12
    found = problems(
        "job=prepare", "data.num_workers=0", "slurm.resume=no", "slurm.gpus_per_node=2", "slurm.nodes=0"
    )
    for law in (
        "data.num_workers=0 is less than 1; 1 works in this process",
        "slurm.resume=no is unknown; use requeue or chain",
        "slurm.gpus_per_node=2 but job=prepare uses no GPU; leave it out",
        "slurm.nodes=0 is below 1; use 1 or more",
    ):
        assert law in found
