"""Which process does which step, when processes of several machines prepare one folder. Torch-free.

A step has a result, a path that appears when it is complete. Whoever makes the file survey/claims/STEP.0 does
the step, and touches the file every BEAT_SECONDS. If that process ends without a result, another one makes
STEP.1 and does the step again. A process has ended if it gave its claim back, if this machine knows it to be
gone, or if its file was not touched for STALE_SECONDS on the clock of the watcher: clocks of machines are not
compared. A process that was only slow damages nothing: both make the same bytes, and a result appears by a
rename. Making a claim is linking a file to a new name, which is atomic on local file systems, NFS and Lustre.
"""

import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from data_pipeline.config import DataError

BEAT_SECONDS = 10.0
STALE_SECONDS = 120.0  # more than the 60 s for which an NFS client may show an old time of a file
_WAITS = 0.05, 5.0  # seconds between two looks at the steps of others: at first, at most


@dataclass(frozen=True)
class Step:
    """A part of a preparation that one process does. bytes: of input."""

    name: str
    result: Path
    act: Callable[[], int | None]  # makes the result, always the same bytes; returns its units
    bytes: int = 0


def is_complete(folder: Path) -> bool:
    """Whether a folder is prepared."""
    return (folder / "manifest.json").exists()


def open_folder(folder: Path) -> None:
    """Make the folder of claims, unless the folder is prepared already. Raises DataError if the folder holds
    other files, or cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = {name for name in os.listdir(folder) if not name.endswith(".partial")}
        claims = folder / "survey" / "claims"
        begun = {"survey"} if claims.is_dir() else set()
        if not names & {"manifest.json", "plan.json"} and names - begun:
            raise DataError(f"data.dir={folder} holds other files; name a new or an empty folder")
        if "manifest.json" not in names:
            claims.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"data.dir={folder} cannot be written ({error}); name another folder") from error


def take_part(folder: Path, steps: list[Step], pool: Executor | None = None) -> Iterator[int]:
    """Do the steps that no other process does, on the processes of `pool` or here, until all have results.

    Yields the units that each step made here, 0 if it is another's. Raises what a step raises.
    """
    wait = _WAITS[0]
    while to_do := undone(steps):
        busy = False
        for units in (pool.map if pool else map)(partial(do, folder / "survey" / "claims"), to_do):
            busy |= units is not None
            yield units or 0
        wait = _WAITS[0] if busy else min(2 * wait, _WAITS[1])
        time.sleep(0 if busy else wait)


def undone(steps: list[Step]) -> list[Step]:
    """The steps without a result. The results of all steps are in one folder, which is listed once."""
    results = steps[0].result.parent
    present = set(os.listdir(results)) if results.is_dir() else set()
    return [step for step in steps if step.result.name not in present]


def do(claims: Path, step: Step) -> int | None:
    """Do a step without a result, unless a live process does it; returns its units, None if not done here."""
    taken = 0  # how often the step was claimed
    while (claims / f"{step.name}.{taken}").exists():
        taken += 1
    if step.result.exists() or (taken and not _has_ended(claims / f"{step.name}.{taken - 1}")):
        return None
    claim, next_claim = (claims / f"{step.name}.{number}" for number in (taken, taken + 1))
    if not _make(claim):
        return None
    ended = threading.Event()
    beats = threading.Thread(target=_beat, args=(claim, ended), daemon=True)
    beats.start()
    try:
        return None if step.result.exists() else step.act() or 0
    except BaseException as error:
        ended.set()
        beats.join()
        with suppress(OSError):
            os.utime(claim, (0, 0))  # gives the claim back; needs no space on a full disk
        if isinstance(error, OSError | DataError) and next_claim.exists():
            return None  # this process was slow, and the step is another's: see there
        raise
    finally:
        ended.set()


def _make(claim: Path) -> bool:
    """Make a claim, complete from the first moment; returns whether this process was the first."""
    own = claim.with_name(f".{uuid.uuid4().hex}")
    own.write_text(f"{_machine()} {os.getpid()} {_birth('self')}")
    with suppress(FileExistsError):
        os.link(own, claim)
    is_first = own.stat().st_nlink == 2  # true also where the answer to link was lost on its way
    own.unlink()
    return is_first


def _beat(claim: Path, ended: threading.Event) -> None:
    while not ended.wait(BEAT_SECONDS):
        with suppress(OSError):  # claims are removed when the preparation is complete
            os.utime(claim)


_seen: dict[Path, tuple[int, float]] = {}  # by claim: its time, and when it was seen first


def _has_ended(claim: Path) -> bool:
    """Whether the process that made a claim has ended or stands still."""
    with open(claim) as file:  # opening makes an NFS client ask the server
        text, touched = file.read(), os.fstat(file.fileno()).st_mtime_ns
    machine, process, birth = text.rsplit(maxsplit=2)
    if touched == 0:
        return True
    if machine == _machine() and _birth(process) != birth:
        return True
    time_seen, since = _seen.get(claim, (None, 0.0))
    if time_seen != touched:
        time_seen, since = _seen[claim] = touched, time.monotonic()
    return time.monotonic() - since > STALE_SECONDS


@cache
def _machine() -> str:
    """Where numbers of processes mean the same: host, boot and namespace."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"


def _birth(process: str) -> str | None:
    """When a process of this machine began, in ticks since the boot; None if it has ended."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]  # a killed process may wait for its parent
