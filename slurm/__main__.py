"""`python -m slurm experiment=NAME slurm=CLUSTER [key=value ...]`: validate, freeze, queue; -m sweeps."""

import logging

from slurm.submit import Submission
from trainer.settings.command import compose_and

logging.getLogger("hydra").setLevel(logging.WARNING)  # it would say that a sweep is launched here
submission = Submission()
compose_and("submit", submission.take, submission.submit)
