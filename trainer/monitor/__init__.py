"""What users see of a run: metrics, alarms, W&B, terminal, report. May import settings/, ranks/, engine/."""
