"""What a folder is prepared from. It is written down first, so that nobody else's folder is touched."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.config import DataConfig, DataError
from data_pipeline.inputs import InputFile, list_inputs
from data_pipeline.manifest import differing_settings, to_json, write_atomically


@dataclass
class Plan:
    """What a folder is prepared from: written before the first slice, so that a restart works on the same."""

    settings: dict[str, Any]
    inputs: dict[str, list[InputFile]]

    def to_json(self) -> bytes:
        """As plan.json holds it."""
        return to_json({"settings": self.settings, "inputs": self.inputs_as_json()})

    def inputs_as_json(self) -> dict[str, list[dict[str, Any]]]:
        """The inputs as plan.json and manifest.json hold them."""
        return {name: [file._asdict() for file in files] for name, files in self.inputs.items()}

    @staticmethod
    def load(folder: Path) -> "Plan | None":
        """The plan of a folder, finished or not; None for one without."""
        for name in ("manifest.json", "plan.json"):
            if (folder / name).exists():
                try:
                    fields = json.loads((folder / name).read_bytes())
                    inputs = {
                        key: [InputFile(**file) for file in files] for key, files in fields["inputs"].items()
                    }
                    return Plan(fields["settings"], inputs)
                except (ValueError, KeyError, TypeError) as error:
                    raise DataError(f"{folder / name} is damaged ({error}); move the folder away") from error
        return None


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
    recorded = Plan.load(folder)
    if recorded is None and any(not entry.name.endswith(".partial") for entry in folder.iterdir()):
        raise DataError(f"data.dir={folder} holds other files; name a new or an empty folder")
    known = {file.path: file for files in recorded.inputs.values() for file in files} if recorded else {}
    inputs = {name: list_inputs(name, source, known) for name, source in config.sources.items()}
    plan = Plan(settings, inputs)
    if recorded is None:
        write_atomically(folder / "plan.json", plan.to_json())
        return plan
    lines = differing_settings(recorded.settings, settings)
    for name in sorted(inputs.keys() & recorded.inputs.keys()):
        if _contents(inputs[name]) != _contents(recorded.inputs[name]):
            before, now = describe_inputs(recorded.inputs[name]), describe_inputs(inputs[name])
            lines.append(f"  data.sources.{name}.paths: prepared from {before}, now {now}")
    if lines:
        message = f"data.dir={folder} holds another preparation; name another folder, or move this one away:"
        raise DataError("\n".join([message, *lines]))
    return plan


def describe_inputs(files: list[InputFile]) -> str:
    """Number, size and hash of a source's inputs."""
    digest = hashlib.sha256("".join(_contents(files)).encode()).hexdigest()
    return f"{len(files)} files of {sum(file.bytes for file in files)} bytes (sha256 {digest[:12]})"


def _contents(files: list[InputFile]) -> list[str]:
    """What makes inputs the same: their bytes, wherever the files lie."""
    return [file.sha256 for file in files]
