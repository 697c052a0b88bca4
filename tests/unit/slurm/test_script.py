"""What the job script mounts into a container."""

from hydra import compose, initialize_config_module

from slurm.config import SubmitConfig
from slurm.script import job_script
from trainer.typed import typed


def test_a_streaming_run_sees_its_text_in_the_container(tmp_path):
    """Files, the folder of a pattern, and the tokenizer; nothing of the hub, each once."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "one.jsonl").write_text("")
    overrides = [
        *("name=t", "data=jsonl", "data.mode=streaming", f"data.tokenizer={tmp_path}/tokenizer/of/ours"),
        f"data.dir={tmp_path}/never/prepared",
        f"data.sources.text.paths=[{tmp_path}/one.jsonl,{tmp_path}/texts/*.jsonl,{tmp_path}/texts/a*.jsonl]",
        *("slurm.container.kind=apptainer", "slurm.container.image=image"),
    ]
    (tmp_path / "tokenizer/of/ours").mkdir(parents=True)
    with initialize_config_module("conf", version_base="1.3"):
        config = typed(SubmitConfig, compose("submit", overrides=overrides))
    (wrap,) = (line for line in job_script(tmp_path, [config], False).splitlines() if "WRAP" in line[:4])
    for place in ("one.jsonl", "texts", "tokenizer/of/ours"):
        assert wrap.count(f"--bind={tmp_path}/{place} ") == 1, wrap
    assert "never" not in wrap, "a place that does not exist cannot be mounted"
