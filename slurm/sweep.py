"""`python -m slurm`: one run, or with -m the points of a sweep, gathered and checked before any is queued."""

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from data_pipeline.config import DataError
from moe.config import ConfigError
from slurm.config import SubmitConfig
from slurm.submit import Submission
from trainer.cli import absolute_paths, check_data
from trainer.typed import typed


class Gathered:
    """The runs of one command line. Hydra hands them over one by one; nothing is written before all are."""

    def __init__(self) -> None:
        self._submission: Submission | None = None
        self._problems: list[str] = []
        self._points = 0

    def take(self, cfg: DictConfig) -> int:
        """Check one run; what is wrong is kept for `submit`, so that all points are reported at once."""
        hydra_config = HydraConfig.get()
        overrides = list(hydra_config.overrides.task)
        sweep = hydra_config.mode == RunMode.MULTIRUN
        try:
            self._add(cfg, overrides, sweep)
        except (ConfigError, DataError) as error:
            where = f"point {self._points} ({' '.join(overrides)}):\n" if sweep else ""
            self._problems.append(f"{where}{error}")
        self._points += 1
        return 0

    def _add(self, cfg: DictConfig, overrides: list[str], sweep: bool) -> None:
        if sweep:
            cfg.name = f"{cfg.name}/{self._points}"
        config = typed(SubmitConfig, cfg)
        config.check(config.plan)
        check_data(config)
        absolute_paths(cfg)
        request = DictConfig(OmegaConf.to_container(cfg.slurm, resolve=True))
        frozen = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "slurm"])
        run_dir = config.run_dir.resolve()
        if self._submission is None:
            folder = run_dir.parent if sweep else run_dir
            self._submission = Submission(folder, [], [], [], request, sweep)
        first = self._submission.configs[0] if self._submission.configs else config
        if request != self._submission.request or config.plan.world_size != first.plan.world_size:
            raise ConfigError(
                [
                    "slurm.* and parallel.nproc_per_node must be the same for all points: a job array has "
                    "one request; start one sweep for each value"
                ]
            )
        self._submission.configs.append(config)
        self._submission.frozen.append(frozen)
        self._submission.overrides.append(overrides)

    def submit(self) -> int:
        """Queue what was gathered, or print its script. Raises ConfigError with all that is wrong."""
        if self._problems or self._submission is None:
            raise ConfigError(self._problems)
        submission = self._submission
        slurm = submission.configs[0].slurm
        if slurm.dry_run:
            print(submission.script(), end="")
            return 0
        ids = submission.submit()
        plan = submission.configs[0].plan
        runs = f"{len(submission.configs)} points of " if submission.sweep else ""
        print(
            f"queued as job {', '.join(ids)}: {runs}{slurm.nodes} nodes, {plan.world_size} ranks\n"
            f"  python -m slurm.status {submission.folder}\n"
            f"  python -m slurm.logs -f {submission.run_dirs[0]}\n"
            f"  python -m slurm.stop {submission.folder}"
        )
        return 0
