"""What a job runs: its script (flags and variables, then job.sh), and a copy of the code. Torch-free."""

import os
import shlex
import shutil
import sys
from pathlib import Path

from data_pipeline.streaming import absolute_paths
from moe.config import ConfigError
from slurm.config import SubmitConfig
from trainer.settings.hub import is_hub_name
from trainer.settings.run_folder import ROOT, git

_PACKAGES = ("trainer", "moe", "data_pipeline", "slurm", "conf")


def job_script(folder: Path, configs: list[SubmitConfig], sweep: bool) -> str:
    """The script of a run, or of the job array of a sweep whose points are numbered folders in `folder`."""
    config, slurm = configs[0], configs[0].slurm
    flags = {
        "job-name": config.name if not sweep else str(Path(config.name).parent),
        "ntasks-per-node": str(config.ranks_per_node),
        **slurm.flags(),
        "output": str(folder).replace("%", "%%") + ("/%a" if sweep else "") + "/logs/job.log",
        "open-mode": "append",
        "signal": f"B:USR1@{slurm.stop_before_seconds}",
        ("requeue" if slurm.resume == "requeue" else "no-requeue"): None,
    }
    _check_lines(flags)
    step, wrap = _container(folder, configs)
    contained = slurm.container.kind != "none"
    variables: dict[str, object] = {
        "RUN_DIR": folder,
        "MODULE": "slurm.prepare" if config.job == "prepare" else "trainer.run",
        "DATA_DIR": Path(config.data.dir).resolve() if config.job == "prepare" else "",
        "CODE": folder / "code",
        "PYTHON": slurm.python or ("python" if contained else sys.executable),
        "RANKS_PER_NODE": config.ranks_per_node,
        "RESUME": slurm.resume,
        "MAX_RESTARTS": slurm.max_restarts,
        "EXCLUDE": slurm.exclude or "",
        "START_SECONDS": slurm.container.start_seconds if contained else 0,
        "HEALTH_SECONDS": slurm.health.seconds,
        "HEALTH": [slurm.gpus_per_node, slurm.health.min_free_gib, slurm.health.max_skew_seconds],
        "SCRATCH": "/tmp" if contained else "",  # the TMPDIR of the node may be missing in a container
        "SRUN": step,
        "WRAP": wrap,
        "SETUP": slurm.setup,
    }
    lines = ["#!/usr/bin/env bash"]
    lines += [
        f"#SBATCH --{flag}" + (f"={shlex.quote(v)}" if v is not None else "") for flag, v in flags.items()
    ]
    lines += [f"{name}={_quoted(value)}" for name, value in variables.items()]
    # some nodes show their GPUs also to jobs that did not request any
    cpu_only = {} if slurm.gpus_per_node else {"CUDA_VISIBLE_DEVICES": ""}
    lines += [f"export {name}={_quoted(value)}" for name, value in (cpu_only | slurm.env).items()]
    return "\n".join([*lines, "", Path(__file__).with_name("job.sh").read_text()])


def _check_lines(flags: dict[str, str | None]) -> None:
    """Raises ConfigError for a flag that would not be one line of the script, also through its folder.

    sbatch reads a backslash in the name of the log as an order to leave %% as it is.
    """
    broken = {flag: value for flag, value in flags.items() if value and not value.isprintable()}
    if "\\" in (log := flags["output"] or ""):
        broken["output"] = log
    if broken:
        law = "must be one line of visible characters, --output without backslashes; rename the run or folder"
        raise ConfigError([f"#SBATCH --{flag}={value!r} {law}" for flag, value in broken.items()])


def _container(folder: Path, configs: list[SubmitConfig]) -> tuple[list[str], list[str]]:
    """Flags of srun, and a prefix of the rank command, with which ranks run in the container."""
    container, code = configs[0].slurm.container, folder / "code"
    needed = {folder.resolve()}.union(*map(_places, configs))
    if container.kind != "none" and (split := [str(path) for path in needed if {",", ":"} & set(str(path))]):
        what = "holds a comma or a colon, which would mount other folders in the container"
        raise ConfigError([f"{path} {what}; choose another name or folder" for path in sorted(split)])
    mounts = [*sorted(map(str, needed)), *container.mounts]
    if container.kind == "pyxis":
        pairs = ",".join(mount if ":" in mount else f"{mount}:{mount}" for mount in mounts)
        places = [f"--container-mounts={pairs}", f"--container-workdir={code}"]
        return [f"--container-image={container.image}", *places], []
    if container.kind == "apptainer":
        gpus = ["--nv"] if configs[0].slurm.gpus_per_node else []
        binds = [f"--bind={mount}" for mount in mounts]
        return [], ["apptainer", "exec", *gpus, *binds, f"--pwd={code}", str(container.image)]
    return [], []


def _places(config: SubmitConfig) -> set[Path]:
    """The paths of data, models and benchmarks that a run reads, or their nearest existing parent folders."""
    prepares = config.job == "prepare"
    paths = [] if config.data.mode == "streaming" and not prepares else [Path(config.data.dir).resolve()]
    if config.data.mode == "streaming" or prepares:
        text = absolute_paths(config.data)
        named = [text["tokenizer"], *text["exclude"]]
        named += [path for of in text["sources"].values() for path in of["paths"]]
        paths += [Path(path) for path in named if path and os.path.isabs(path)]  # others are names on the hub
    models = [config.stage.init_from, config.rl and config.rl.reference]
    models += [config.distill.teacher, config.distill.lessons] if config.distill else []
    given = [] if prepares else [model for model in models if model and not is_hub_name(model)]
    paths += [Path(model).resolve() for model in given]
    if not prepares and config.evaluate.benchmarks is not None:
        paths += config.evaluate.benchmarks.paths()
    return {next(place for place in (path, *path.parents) if os.path.exists(place)) for path in paths}


def _quoted(value: object) -> str:
    """A value as bash text: an array for a list, else a string."""
    if isinstance(value, list):
        return f"({shlex.join(map(str, value))})"
    text = shlex.quote(str(value))
    return f"'{text}'" if text.startswith("=") else text  # shellcheck takes NAME==x for a comparison


def snapshot(target: Path, root: Path = ROOT) -> None:
    """Copy the current code of `root` into `target`, so that later edits do not change a queued job.

    In a git checkout these are the files that git does not ignore; an installed package is copied whole.
    """
    shutil.rmtree(target, ignore_errors=True)
    listed = git("ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *_PACKAGES, root=root)
    for package in _PACKAGES if not listed else ():
        shutil.copytree(root / package, target / package, ignore=shutil.ignore_patterns("__pycache__"))
    for file in filter(None, listed.split("\0")):
        if (root / file).is_file():  # git still lists deleted files until that is committed
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / file, target / file)
