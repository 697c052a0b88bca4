"""A process that runs verifiers, one check after another, as `scorer.py` sends them. Torch-free.

It reads lines of JSON from the socket that is its standard input. For each it answers an empty line when the
verifier is imported, so that only the check itself is timed, and then a line with the verdict or the error.
"""

import ctypes
import importlib
import json
import os
import resource
import signal
import sys
from typing import Any

_MEMORY_BYTES = 8 << 30  # of addresses: a verifier that goes wild must not take the memory of the rank
_REASON_CHARACTERS = 500


def main() -> None:
    """Answer until the socket closes."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: also in the middle of a check
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = _MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(hard, _MEMORY_BYTES)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    with open(os.dup(0)) as jobs, open(os.dup(0), "w") as answers:
        # What a verifier prints must not be taken for an answer, and it has no input.
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(2, 1)
        for line in jobs:
            job = json.loads(line)
            try:
                module, _, function = job["function"].partition(":")
                verify = getattr(importlib.import_module(module), function)
                print(file=answers, flush=True)
                answer = _judged(verify(job["fields"], job["completion"], job["options"]))
            except Exception as error:
                answer = {"error": f"{type(error).__name__}: {error}"[:_REASON_CHARACTERS]}
            print(json.dumps(answer), file=answers, flush=True)


def _judged(result: Any) -> dict[str, Any]:
    """A verifier's result for the answer. Raises ValueError for a reward outside 0 to 1."""
    reward, reason = result if isinstance(result, tuple) else (result, "")
    reward = float(reward)
    if not 0 <= reward <= 1:  # or NaN
        raise ValueError(f"the reward {reward} is outside 0 to 1")
    return {"reward": reward, "reason": str(reason)[:_REASON_CHARACTERS]}


if __name__ == "__main__":
    main()
