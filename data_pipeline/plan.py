"""What a folder is prepared from. It is written down first, so that nobody else's folder is touched."""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline.config import DataConfig, DataError
from data_pipeline.inputs import InputFile, list_inputs
from data_pipeline.manifest import differing_settings, to_json, write_atomically


class Plan(NamedTuple):
    """What a folder is prepared from: plan.json while it is, part of manifest.json afterwards."""

    settings: dict[str, Any]
    inputs: dict[str, list[InputFile]]

    def as_json(self) -> dict[str, Any]:
        """As the files hold it."""
        inputs = {name: [file._asdict() for file in files] for name, files in self.inputs.items()}
        return {"settings": self.settings, "inputs": inputs}


def agree_on_plan(config: DataConfig, seed: int, given: str | None, folder: Path) -> Plan:
    """Our plan, written down, or the recorded one. Raises DataError if that is another's."""
    settings = {
        **config.content_settings(),
        "data.tokenizer": None if given is None else f"sha256 {hashlib.sha256(given.encode()).hexdigest()}",
        "data.on_bad_row": "quarantine" if config.on_bad_row == "quarantine" else "skip or error",
        "data.slice_bytes": config.slice_bytes,
        "data.shard_bytes": config.shard_bytes,
        "seed": seed,
    }
    recorded = _recorded(folder)
    if recorded is None and any(not entry.name.endswith(".partial") for entry in folder.iterdir()):
        raise DataError(f"data.dir={folder} holds other files; name a new or an empty folder")
    known = {file.path: file for files in recorded.inputs.values() for file in files} if recorded else {}
    inputs = {name: list_inputs(name, source, known) for name, source in config.sources.items()}
    settings |= {f"data.sources.{name}.paths": describe_inputs(files) for name, files in inputs.items()}
    plan = Plan(settings, inputs)
    if recorded is None:
        write_atomically(folder / "plan.json", to_json(plan.as_json()))
    elif lines := differing_settings(recorded.settings, settings):
        message = f"data.dir={folder} holds another preparation; name another folder, or move this one away:"
        raise DataError("\n".join([message, *lines]))
    return plan


def describe_inputs(files: list[InputFile]) -> str:
    """Number, size and hash of a source's inputs: of their bytes, wherever the files lie."""
    digest = hashlib.sha256("".join(file.sha256 for file in files).encode()).hexdigest()
    return f"{len(files)} files of {sum(file.bytes for file in files)} bytes (sha256 {digest[:12]})"


def _recorded(folder: Path) -> Plan | None:
    """The plan of a folder, finished or not; None for one without."""
    for path in (folder / "manifest.json", folder / "plan.json"):
        if path.exists():
            try:
                fields = json.loads(path.read_bytes())
                inputs = {
                    name: [InputFile(**file) for file in files] for name, files in fields["inputs"].items()
                }
                return Plan(fields["settings"], inputs)
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"{path} is damaged ({error}); move the folder away") from error
    return None
