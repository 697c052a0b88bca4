"""`python -m trainer`."""

from trainer.cli import compose_and, train_here

compose_and("train", train_here)
