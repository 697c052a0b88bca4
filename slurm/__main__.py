"""`python -m slurm experiment=NAME slurm=CLUSTER [key=value ...]`: validate, freeze, queue; -m sweeps."""

from slurm.sweep import Gathered
from trainer.cli import compose_and

runs = Gathered()
compose_and("submit", runs.take, runs.submit)
