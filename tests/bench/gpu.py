"""`make bench-gpu`, or `python tests/bench/gpu.py [SECTION ...]`: layers of Qwen3-30B-A3B on one GPU.

Sections: ceilings (of the card), step (ours against transformers), parts and kernels (of our step), experts,
attention, cross_entropy, router (each alone). Each contender runs in one process. Each figure is written at
once to its section of docs/bench-gpu.json, so that a run that is cut short keeps it. The tables of
docs/performance.md follow at the end. All sections take about four minutes on an H100 or H200.

--tiny is a rehearsal with tiny shapes, also on a CPU, and writes only --out.
"""

import argparse
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from gpu_tables import show

HERE = Path(__file__).parent
DOCS = HERE.parent.parent / "docs"
RESULTS, PAGE = DOCS / "bench-gpu.json", DOCS / "performance.md"
BEGIN, END = "<!-- bench-gpu -->", "<!-- end of bench-gpu -->"
# the processes, and what each measures
PROCESSES = {
    ("gpu_alone.py",): ("ceilings", "experts", "attention", "cross_entropy", "router"),
    ("gpu_step.py", "ours"): ("step", "kernels", "parts"),
    ("gpu_step.py", "transformers"): ("step",),
}
SECTIONS = tuple(dict.fromkeys(section for sections in PROCESSES.values() for section in sections))
GRACE = 45  # seconds that a started process may take beyond the budget


def measure(command: list[str], until: float, results: dict[str, Any], out: Path) -> bool:
    """Run a process and write its figures, line by line; returns whether it succeeded in time."""
    with subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True) as process:
        killer = threading.Timer(max(1.0, until + GRACE - time.time()), process.kill)
        killer.start()
        assert process.stdout is not None
        for line in process.stdout:
            if not line.startswith('{"section"'):
                continue  # output of a library
            told = json.loads(line)
            print(f"  {line.strip()[:200]}", flush=True)
            section = told.pop("section")
            if section == "card":
                results["card"] = told
            else:
                results.setdefault(section, []).append(told)
            whole = out.with_suffix(".new")
            whole.write_text(json.dumps(results, indent=1) + "\n")
            whole.replace(out)
        code = process.wait()
        killer.cancel()
    return code == 0


def main(arguments: list[str]) -> int:
    """Measure, write, show; returns 1 if a process failed or the time was up."""
    parser = argparse.ArgumentParser(prog="tests/bench/gpu.py", description=__doc__)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"{', '.join(SECTIONS)}; default all")
    parser.add_argument("--seconds", type=float, default=210, help="nothing new is started after this time")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON file for the figures")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal with tiny shapes")
    parser.add_argument("--liger", action="store_true", help="also liger's kernels, which tune for minutes")
    options = parser.parse_args(arguments)
    if unknown := set(options.sections) - set(SECTIONS):
        parser.error(f"unknown: {', '.join(unknown)}; sections are {', '.join(SECTIONS)}")
    import torch

    if options.tiny and options.out == RESULTS:
        parser.error("--tiny gives no real figures for docs/; give --out")
    if not options.tiny and not torch.cuda.is_available():
        parser.error("needs an NVIDIA GPU: torch.cuda.is_available() is false here; --tiny rehearses")
    wanted = options.sections or list(SECTIONS)
    results = json.loads(options.out.read_text()) if options.out.exists() else {}
    results = {name: found for name, found in results.items() if name not in wanted}
    until, failed = time.time() + options.seconds, False
    for program, measures in PROCESSES.items():
        if chosen := [section for section in measures if section in wanted]:
            print(f"{' '.join(program)}: {', '.join(chosen)} ...", flush=True)
            flags = [flag for flag in ("tiny", "liger") if getattr(options, flag)]
            command = [str(HERE / program[0]), *program[1:], ",".join(chosen), str(until), *flags]
            ended = time.time() < until and measure(command, until, results, options.out)
            failed |= not ended
            print(f"  {'done' if ended else 'CUT SHORT'}, {until - time.time():.0f} s are left", flush=True)
    tables = show(results)
    if options.out == RESULTS:
        before, rest = PAGE.read_text().split(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{tables}\n{END}{rest.split(END)[1]}")
    print(tables)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
