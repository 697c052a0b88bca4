"""`python -m slurm experiment=NAME slurm=CLUSTER [key=value ...]`: validate, freeze, queue; -m sweeps."""

from slurm.submit import Submission
from trainer.cli import compose_and

submission = Submission()
compose_and("submit", submission.take, submission.submit)
