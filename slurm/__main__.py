"""Queue a run on a SLURM cluster: check the configuration, freeze the run folder with its code, call sbatch.

  python -m slurm experiment=qwen3_30b_a3b_general_4k slurm=h100_ib slurm.nodes=16
  python -m slurm experiment=demo slurm=local slurm.dry_run=true          print the job script, queue nothing
  python -m slurm -m experiment=demo slurm=local optimizer.lr=1e-3,2e-3   a sweep as one job array

Then: python -m slurm.status, slurm.logs, slurm.stop or slurm.resume with the run folder. --cfg job prints the
composed configuration. docs/slurm.md explains the keys of slurm, docs/configuration.md the others.
"""

import logging

from slurm.submit import Submission
from trainer.settings.command import compose_and

if __name__ == "__main__":
    logging.getLogger("hydra").setLevel(logging.WARNING)  # hide Hydra's message that it launches a sweep
    submission = Submission()
    compose_and("submit", __doc__, submission.take, submission.submit)
