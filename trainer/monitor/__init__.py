"""What a person sees of a run: metrics, alarms, W&B, terminal, report. May ask settings/, ranks/, engine/."""
