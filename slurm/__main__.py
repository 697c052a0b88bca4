"""`python -m slurm experiment=NAME slurm=CLUSTER [key=value ...]`: check, freeze and queue; -m: a sweep."""

import logging

from slurm.submit import Submission
from trainer.settings.command import compose_and

logging.getLogger("hydra").setLevel(logging.WARNING)  # hide Hydra's message that it launches a sweep
submission = Submission()
compose_and("submit", submission.take, submission.submit)
