"""The shell scripts."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SCRIPTS = ["slurm/job.sh", "tests/slurm/slurm-up", "tests/slurm/slurm-down", ".ci/run"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_shellcheck_has_nothing_to_say(script):
    shellcheck = Path(sys.executable).parent / "shellcheck"
    done = subprocess.run(
        [shellcheck, ROOT / script], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_job_script_stays_short():
    assert len((ROOT / "slurm/job.sh").read_text().splitlines()) <= 160
