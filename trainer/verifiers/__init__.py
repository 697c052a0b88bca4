"""Programs that judge completions, and the processes in which they run. May import settings/; torch-free."""
