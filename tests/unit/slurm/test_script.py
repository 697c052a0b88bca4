"""The variables of the job script, and what it mounts into a container."""

from pathlib import Path

from hydra import compose, initialize_config_module

from slurm.config import SubmitConfig
from slurm.script import job_script
from trainer.settings.typed import typed


def script(folder: Path, *overrides: str) -> list[str]:
    with initialize_config_module("conf", version_base="1.3"):
        config = typed(SubmitConfig, compose("submit", overrides=["name=t", *overrides]))
    return job_script(folder, [config], False).splitlines()


CONTAINER = ["slurm.container.kind=pyxis", "slurm.container.image=image"]


def test_a_container_is_started_before_the_nodes_are_checked(tmp_path):
    """With its own time limit; kernels are compiled in /tmp, which every image has."""
    assert {"START_SECONDS=1800", "SCRATCH=/tmp"} <= set(script(tmp_path, *CONTAINER))
    assert "START_SECONDS=7" in script(tmp_path, *CONTAINER, "slurm.container.start_seconds=7")
    assert {"START_SECONDS=0", "SCRATCH=''"} <= set(script(tmp_path))


def test_a_run_that_asks_for_no_gpu_sees_none(tmp_path):
    hidden = "export CUDA_VISIBLE_DEVICES=''"
    assert hidden in script(tmp_path)
    assert hidden not in script(tmp_path, "slurm.gpus_per_node=2", "parallel.nproc_per_node=2")


def test_a_streaming_run_sees_its_text_in_the_container(tmp_path):
    """Files, the folder of a pattern, and the tokenizer are mounted, each once."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "one.jsonl").write_text("")
    paths = f"{tmp_path}/one.jsonl,{tmp_path}/texts/*.jsonl,{tmp_path}/texts/a*.jsonl"
    overrides = [
        *("data=jsonl", "data.mode=streaming", f"data.tokenizer={tmp_path}/tokenizer/of/ours"),
        f"data.dir={tmp_path}/never/prepared",
        f"+data.sources.text={{kind: jsonl, paths: [{paths}]}}",
        *("slurm.container.kind=apptainer", "slurm.container.image=image"),
    ]
    (tmp_path / "tokenizer/of/ours").mkdir(parents=True)
    (wrap,) = (line for line in script(tmp_path, *overrides) if "WRAP" in line[:4])
    for place in ("one.jsonl", "texts", "tokenizer/of/ours"):
        assert wrap.count(f"--bind={tmp_path}/{place} ") == 1, wrap
    assert "never" not in wrap, "a path that does not exist cannot be mounted"


def test_a_preparation_has_a_worker_for_each_of_its_processes(tmp_path):
    """On CPUs, whatever the cluster's file asks for; it sees its text and its folder in the container."""
    (tmp_path / "one.jsonl").write_text("")
    (tmp_path / "data").mkdir()
    lines = script(
        tmp_path,
        *("job=prepare", "slurm=h100_ib", "slurm.partition=p", "data=jsonl", "data.num_workers=12"),
        *(f"data.dir={tmp_path}/data", f"+data.sources.t={{kind: jsonl, paths: [{tmp_path}/one.jsonl]}}"),
        *("slurm.container.kind=apptainer", "slurm.container.image=image", "stage.init_from=/etc"),
    )
    assert {"#SBATCH --ntasks-per-node=12", "#SBATCH --cpus-per-task=1", "RANKS_PER_NODE=12"} <= set(lines)
    assert not [line for line in lines if "--gpus-per-node" in line]
    assert {"MODULE=slurm.prepare", f"DATA_DIR={tmp_path}/data", "HEALTH_SECONDS=0"} <= set(lines)
    (wrap,) = (line for line in lines if "WRAP" in line[:4])
    assert f"--bind={tmp_path}/one.jsonl " in wrap
    assert f"--bind={tmp_path}/data " in wrap
    assert "--bind=/etc" not in wrap
    assert {"MODULE=trainer.run", "DATA_DIR=''"} <= set(script(tmp_path))


def test_a_container_sees_all_models_that_a_run_reads(tmp_path):
    folders = [tmp_path / name for name in ("start", "teacher", "lessons", "reference")]
    for folder in folders:
        folder.mkdir()
    start, teacher, lessons, reference = folders
    container = ["slurm.container.kind=apptainer", "slurm.container.image=image", f"stage.init_from={start}"]
    taught = ["distill=teacher", f"distill.teacher={teacher}", f"distill.lessons={lessons}"]
    rewarded = [
        "rl=grpo",
        "rl.max_prompt_tokens=8",
        "rl.sampling.max_new_tokens=8",
        f"rl.reference={reference}",
    ]
    rewarded += ["rl.verifiers={a: {kind: exact, weight: 1}}"]
    for keys, seen in ((taught, [start, teacher, lessons]), (rewarded, [start, reference])):
        (wrap,) = (line for line in script(tmp_path, *container, *keys) if "WRAP" in line[:4])
        assert [folder for folder in folders if f"--bind={folder} " in wrap] == seen
