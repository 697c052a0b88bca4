"""`python -m trainer.resume RUN_DIR [key=value ...]`: continue a run here, also in another layout."""

import argparse
import sys
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from data_pipeline.check import check_data
from data_pipeline.manifest import write_atomically
from moe.config import ConfigError
from trainer.ranks.launch import start
from trainer.settings.command import refuse_unsafe, tells_mistakes
from trainer.settings.config import RunConfig
from trainer.settings.run_folder import ROOT, lock, read_run, read_state
from trainer.settings.secrets import redacted
from trainer.settings.typed import literal

# Keys that a resume may change: where and how the ranks compute and what is kept, not what they compute.
_LAYOUT_KEYS = (
    *("device", "parallel", "deepspeed", "micro_batch_size", "recompute", "deterministic", "experts.backend"),
    *("checkpoint", "evaluate", "tracker"),
)


def change_layout(cfg: Any, overrides: list[str]) -> dict[str, Any]:
    """Apply the overrides of a resume to `cfg`; returns the sections that they change.

    Raises ConfigError for a key that could change what the run computes.
    """
    problems, touched = [], []
    # deepspeed=GROUP before deepspeed.KEY=VALUE
    for override in sorted(overrides, key=lambda text: text.partition("=")[0]):
        key, given, value = override.partition("=")
        touched.append(key.partition(".")[0])
        if not given or not any(f"{key}.".startswith(f"{free}.") for free in _LAYOUT_KEYS):
            allowed = ", ".join(_LAYOUT_KEYS)
            problems.append(f"{override}: only KEY=VALUE with these keys can change at a resume: {allowed}")
        elif key == "deepspeed":
            groups = {path.stem: path for path in (ROOT / "conf/deepspeed").glob("*.yaml")}
            if value in groups:
                cfg.deepspeed = OmegaConf.load(groups[value])
            else:
                problems.append(f"{override} is unknown; use {', '.join(sorted(groups))}")
        else:
            try:
                cfg.merge_with_dotlist([override])
            except (YAMLError, OmegaConfBaseException) as error:
                problems.append(f"{override} cannot be read ({error})")
    if problems:
        raise ConfigError(problems)
    refuse_unsafe(cfg)
    resolved: Any = OmegaConf.to_container(cfg, resolve=True)
    return {section: resolved[section] for section in touched}


def record_layout(run_dir: Path, sections: dict[str, Any], overrides: list[str]) -> Path:
    """Write resume-K.yaml, where K is the next attempt; it applies to this and all later attempts."""
    path = run_dir / f"resume-{read_state(run_dir)['attempt'] + 1}.yaml"
    written = OmegaConf.to_yaml(OmegaConf.create(literal(sections)), resolve=True)
    text = redacted(f"# python -m trainer.resume with {overrides}\n") + written
    write_atomically(path, text.encode())
    return path


@tells_mistakes
def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m trainer.resume", description=__doc__)
    parser.add_argument("run_dir", type=Path, help="folder of the run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="how it is laid out and kept")
    options = parser.parse_args(arguments)
    run_dir, overrides = options.run_dir, options.overrides
    cfg = read_run(run_dir)
    changed = change_layout(cfg, overrides)
    config = RunConfig.load(cfg)
    config.check()
    check_data(config.data, config.model.vocab_size, config.seed)
    held = lock(run_dir)
    recorded = [record_layout(run_dir, changed, overrides)] if changed else []
    return start(run_dir, config, held, recorded)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
