"""Reads the files of the W&B client: a leveldb log (blocks of 32 KiB) of protobuf records."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

BLOCK, HEADER = 32768, 7


def records(path: Path) -> Iterator[Record]:
    """The records of a .wandb file; the first 7 bytes of the file are its magic number."""
    data, at, parts = path.read_bytes(), HEADER, b""
    while at + HEADER <= len(data):
        left = BLOCK - at % BLOCK
        if left < HEADER:  # too short for a header: padding
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + HEADER])
        parts += data[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(parts)
            parts = b""


def history(folder: Path) -> list[dict[str, Any]]:
    """The points of all attempts under a run's `wandb/`, in the order in which they were written."""
    rows = []
    for path in sorted(folder.glob("*run-*/*.wandb")):
        for record in records(path):
            if record.HasField("history"):
                items = record.history.item
                row = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}
                row["_step"] = record.history.step.num
                rows.append(row)
    return rows


def of_kind(folder: Path, kind: str) -> list[Any]:
    """The records of one kind (`run`, `alert`, `artifact`, `summary`, ...) of all attempts."""
    every = (record for path in sorted(folder.glob("*run-*/*.wandb")) for record in records(path))
    return [getattr(record, kind) for record in every if record.HasField(kind)]
