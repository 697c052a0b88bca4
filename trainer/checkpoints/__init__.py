"""States and weights on disk: saving, restoring, export. May import settings/, ranks/, engine/, monitor/."""
