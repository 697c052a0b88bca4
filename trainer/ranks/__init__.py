"""The processes of a run: how they start, their devices, seeds and output. May import settings/."""
