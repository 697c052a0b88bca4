"""What slurm.status shows for a job that slurmctld has forgotten, with and without accounting."""

from pathlib import Path

import pytest
from cluster import SMALL, Cluster


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("accounting", "expected"), [("0", "lost: its job is gone"), ("1", "cancelled")])
def test_a_forgotten_job(cluster: Cluster, folder: Path, accounting: str, expected: str):
    conf = folder / "forgets.conf"
    conf.write_text("MinJobAge=2\n")
    lab = {
        "SLURM_LAB_ID": f"4{2 + int(accounting)}",
        "SLURM_LAB_ACCT": accounting,
        "SLURM_LAB_CONF": str(conf),
    }
    forgetful = Cluster.start(cluster.data, nodes=2, **lab)
    try:
        run = forgetful.submit(folder, "a", "+slurm.sbatch.hold=true")
        (job,) = run.jobs
        assert "pending" in forgetful.python("slurm.status", "runs/a", cwd=folder).stdout
        assert forgetful.run("scancel", job).returncode == 0
        run.wait(lambda run: "Invalid job id" in forgetful.run("squeue", "-j", job).stderr)
        shown = forgetful.python("slurm.status", "runs/a", cwd=folder)
        assert shown.returncode == 0, shown.stderr
        assert expected in shown.stdout
        again = forgetful.python("slurm", *SMALL, *forgetful.data, "name=a", cwd=folder)
        assert again.returncode == 0, "the same run can be submitted again"
    finally:
        forgetful.down()
