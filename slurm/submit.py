"""From a command line to queued jobs: collect and check runs, freeze folders, call sbatch. Torch-free."""

import json
import os
from contextlib import ExitStack
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from data_pipeline.claims import open_folder
from data_pipeline.config import DataError
from data_pipeline.manifest import write_atomically
from data_pipeline.streaming import absolute_paths
from moe.config import ConfigError
from slurm.config import SlurmConfig, SubmitConfig
from slurm.jobs import is_sweep, points_of, preparation_of, refuse_queued, slurm
from slurm.script import job_script, snapshot
from trainer.settings.command import check, refuse_unsafe
from trainer.settings.run_folder import freeze, lock, pasted
from trainer.settings.secrets import redacted
from trainer.settings.typed import typed


class Submission:
    """The runs of one command line: one, or with -m the points of a sweep, which become one job array.

    Hydra passes the runs to `take` one by one; `submit` checks all of them before it writes any folder.
    """

    def __init__(self) -> None:
        self._cfgs: list[DictConfig] = []
        self._overrides: list[list[str]] = []
        self._sweep = False

    def take(self, cfg: DictConfig) -> int:
        """Keep one run for `submit`."""
        hydra_config = HydraConfig.get()
        self._sweep = hydra_config.mode == RunMode.MULTIRUN
        if self._sweep:
            cfg.name = f"{cfg.name}/{len(self._cfgs)}"
        if cfg.job == "prepare":  # a folder beside that of the run
            cfg.name = f"{cfg.name}-prepare"
        self._cfgs.append(cfg)
        self._overrides.append([redacted(override) for override in hydra_config.overrides.task])
        return 0

    def submit(self) -> int:
        """Freeze the folders and queue the job, or (slurm.dry_run) print its script.

        Raises ConfigError, with nothing queued, if a run has a problem, if a folder cannot be used, or if
        sbatch refuses.
        """
        configs = self._checked()
        config, request = configs[0], configs[0].slurm
        run_dirs = [config.run_dir.resolve() for config in configs]
        folder = run_dirs[0].parent if self._sweep else run_dirs[0]
        script = job_script(folder, configs, self._sweep)
        if request.dry_run:
            print(script, end="")
            return 0
        slurm("sbatch", "--version")
        self._refuse_other(folder)
        with ExitStack() as held:
            for run_dir in run_dirs:
                held.callback(os.close, lock(run_dir))
            refuse_queued(run_dirs)
            if config.job == "prepare":
                open_folder(Path(config.data.dir))
            self._freeze(folder, run_dirs)
            (folder / "job.sh").write_text(script)
            ids = queue(folder, run_dirs, request)
        points = f"{len(run_dirs)} points of " if self._sweep else ""
        who = "workers" if config.job == "prepare" else "ranks"
        print(f"queued as job {', '.join(ids)}: {points}{request.nodes} nodes, {config.world_size} {who}")
        shown = pasted(folder)
        print(f"  python -m slurm.status {shown}\n  python -m slurm.logs -f {pasted(run_dirs[0])}")
        print(f"  python -m slurm.stop {shown}")
        return 0

    def _checked(self) -> list[SubmitConfig]:
        """The checked configurations. Raises ConfigError with the problems of all runs."""
        configs: list[SubmitConfig] = []
        problems: list[str] = []
        first = self._cfgs[0]
        for point, (cfg, overrides) in enumerate(zip(self._cfgs, self._overrides, strict=True)):
            try:
                config = typed(SubmitConfig, cfg)
                (_check_preparation if config.job == "prepare" else check)(config, cfg)
                configs.append(config)
            except (ConfigError, DataError) as error:
                where = f"point {point} ({' '.join(overrides)}):\n" if self._sweep else ""
                problems.append(f"{where}{error}")
            if cfg.slurm != first.slurm or cfg.parallel.nproc_per_node != first.parallel.nproc_per_node:
                keys = "slurm.* and parallel.nproc_per_node must be the same for all points"
                problems.append(f"point {point}: {keys}: a job array has one request")
        if self._sweep and first.job == "prepare":
            problems.append("job=prepare prepares one folder, without -m; submit once for each folder")
        if problems:
            raise ConfigError(problems)
        return configs

    def _refuse_other(self, folder: Path) -> None:
        there = points_of(folder) if is_sweep(folder) else None
        if (folder / "config.yaml").exists() and self._sweep:
            raise ConfigError([f"{folder} is a single run; choose another name for the sweep"])
        if there is not None and (not self._sweep or there != self._overrides):
            raise ConfigError([f"{folder} holds another sweep, of {len(there)} points; choose another name"])

    def _freeze(self, folder: Path, run_dirs: list[Path]) -> None:
        for run_dir, cfg, overrides in zip(run_dirs, self._cfgs, self._overrides, strict=True):
            freeze(run_dir, _of_workers(cfg, run_dir) if cfg.job == "prepare" else _of_run(cfg), overrides)
            (run_dir / "logs").mkdir(exist_ok=True)
        if not any((run_dir / "jobs").exists() for run_dir in run_dirs):
            snapshot(folder / "code")  # a run continues with the code with which it started
        if self._sweep:
            write_atomically(folder / "sweep.json", json.dumps(self._overrides, indent=1).encode())
        (folder / "slurm.yaml").write_text(OmegaConf.to_yaml(self._cfgs[0].slurm, resolve=True))


def _check_preparation(config: SubmitConfig, cfg: DictConfig) -> None:
    """Raises ConfigError if a preparation is wrong. Its paths become absolute in `cfg`."""
    config.check()
    refuse_unsafe(cfg)
    cfg.data.dir = str(Path(config.data.dir).resolve())
    cfg.data.merge_with(absolute_paths(config.data))


def _of_run(cfg: DictConfig) -> DictConfig:
    return OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key not in ("slurm", "job")])


def _of_workers(cfg: DictConfig, run_dir: Path) -> DictConfig:
    """The `Preparation` of a configuration. It replaces an earlier one of the same data: the plan of the data
    guards what may not differ."""
    if (run_dir / "config.yaml").exists():
        earlier = preparation_of(run_dir)
        if earlier is not None and earlier.data.dir == cfg.data.dir:
            (run_dir / "config.yaml").unlink()
    kept = {key: cfg[key] for key in ("job", "name", "output_dir", "seed", "data")}
    return OmegaConf.create({**kept, "vocab_size": cfg.model.vocab_size, "seq_len": cfg.stage.seq_len})


def queue(folder: Path, run_dirs: list[Path], request: SlurmConfig) -> list[str]:
    """Submit the script of a frozen run, or of points of a sweep; returns the job ids, several for a chain.

    Raises ConfigError if SLURM refuses; nothing stays queued then.
    """
    for run_dir in run_dirs:
        for name in ("stop", "restarts", "excluded"):  # left by earlier jobs for later ones
            (run_dir / name).unlink(missing_ok=True)
    sweep, parallel = is_sweep(folder), f"%{request.max_parallel}" if request.max_parallel else ""
    array = [f"--array={','.join(run_dir.name for run_dir in run_dirs)}{parallel}"] if sweep else []
    ids: list[str] = []
    try:
        for _ in range(request.chain_length if request.resume == "chain" else 1):
            after = [f"--dependency=afterany:{ids[-1]}"] if ids else []
            answer = slurm("sbatch", "--parsable", *array, *after, str(folder / "job.sh"))
            ids.append(answer.strip().split(";")[0])
    except ConfigError:
        if ids:
            slurm("scancel", *ids)
        raise
    for run_dir in run_dirs:
        with (run_dir / "jobs").open("a") as jobs:
            jobs.writelines(f"{job}_{run_dir.name}\n" if sweep else f"{job}\n" for job in ids)
    return ids
