"""States and weights on disk: saving, restoring, export. May ask settings/, ranks/, engine/ and monitor/."""
