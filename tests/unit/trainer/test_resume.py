"""The keys that a resume may change, and how a run folder stores them."""

import pytest
from omegaconf import OmegaConf

from moe.config import ConfigError
from trainer.resume import change_layout, record_layout
from trainer.settings.config import RunConfig
from trainer.settings.run_folder import freeze, read_run, write_state


@pytest.fixture
def run_dir(composed, tmp_path):
    freeze(tmp_path, composed("deepspeed=zero1", "parallel.nproc_per_node=4"), [])
    return tmp_path


def test_layouts_of_resumes_follow_one_another(run_dir):
    write_state(run_dir, "stopped", 1)
    first = ["deepspeed.zero_optimization.stage=2", "deepspeed=zero3", "parallel.ep_size=2"]
    record_layout(run_dir, change_layout(read_run(run_dir), first), first)
    write_state(run_dir, "stopped", 9)
    second = ["parallel.ep_size=4", "checkpoint.keep=7"]
    record_layout(run_dir, change_layout(read_run(run_dir), second), second)
    config = RunConfig.of_run(run_dir)
    assert config.zero_stage == 2, "a key is applied after its group, in any order"
    assert "stage3_prefetch_bucket_size" in config.deepspeed["zero_optimization"]
    assert "allgather_bucket_size" not in config.deepspeed["zero_optimization"], "the group is replaced"
    assert (config.parallel.nproc_per_node, config.parallel.ep_size, config.checkpoint.keep) == (4, 4, 7)
    assert sorted(path.name for path in run_dir.glob("resume-*")) == ["resume-10.yaml", "resume-2.yaml"]
    assert OmegaConf.load(run_dir / "config.yaml").parallel.ep_size == 1, "config.yaml stays frozen"


@pytest.mark.parametrize(
    "override",
    ["optimizer.lr=1", "seed=2", "dtype=fp32", "parallel", "stage.seq_len=8", "experts=1", "parallels.a=1"],
)
def test_what_would_change_the_run_is_refused_by_name(run_dir, override):
    with pytest.raises(ConfigError, match=f"{override}: only KEY=VALUE with these keys"):
        change_layout(read_run(run_dir), [override])


def test_all_mistakes_are_told_at_once(run_dir):
    wrong = ["deepspeed=zero7", "checkpoint.keep=[", "name=b"]
    with pytest.raises(ConfigError) as caught:
        change_layout(read_run(run_dir), wrong)
    assert len(caught.value.problems) == 3
    assert "use zero0, zero1, zero2, zero3" in str(caught.value)


def test_a_resume_may_change_the_device(run_dir):
    overrides = ["device=cpu", "deterministic=true", "experts.backend=loop"]
    record_layout(run_dir, change_layout(read_run(run_dir), overrides), overrides)
    config = RunConfig.of_run(run_dir)
    assert (config.device, config.deterministic, config.experts.backend) == ("cpu", True, "loop")
