"""What the ranks of tests import, once for all of them: `harness.py` forks each rank from such a process."""

import gc

import layouts  # noqa: F401, imports the trainer with torch and DeepSpeed

gc.freeze()  # the collector would write to, and thereby copy, the pages that all ranks share
