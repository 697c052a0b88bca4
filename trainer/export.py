"""`python -m trainer.export RUN_DIR|CHECKPOINT OUT`: the weights as a folder for the Hugging Face hub.

Bytes stream from the shards of `hf/` into shards of the wanted size, each written under a temporary name and
renamed when it is on the disk; every one is read back and compared. What a kill leaves behind, the next start
goes on with. config.json comes last: a folder without it is not whole.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from data_pipeline.config import DataError
from data_pipeline.manifest import sync_folder, to_json, write_atomically
from data_pipeline.tokenizer import END_OF_TEXT, load_tokenizer
from moe.config import ConfigError, ModelConfig
from moe.hf import INDEX, SINGLE, Place, locate, write_config
from trainer.run_folder import hf_folder
from trainer.terminal import duration

_TORCH = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
_DTYPES = {"fp32": "F32", "bf16": "BF16"}
_PIECE = 1 << 20  # values that are held at a time
_ORIGIN = "exported_from"  # key of a shard's metadata
_BESIDES = {INDEX, "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
_TEMPLATE = Path(__file__).with_name("chat_template.jinja")
IM_END = "<|im_end|>"


@dataclass(frozen=True)
class Shard:
    """A file to be: the header of safetensors, and where its tensors come from."""

    name: str
    header: bytes
    places: dict[str, Place]  # their dtype is the one that is written
    nbytes: int  # of the tensors

    def is_whole(self, folder: Path) -> bool:
        """Whether the file is there: it was renamed when all of it was on the disk."""
        path = folder / self.name
        if not path.exists() or path.stat().st_size != len(self.header) + self.nbytes:
            return False
        with path.open("rb") as file:
            return file.read(len(self.header)) == self.header

    def pieces(self) -> Iterator[bytes]:
        """The bytes of the file, in order. Sources are open, and their pages in memory, only meanwhile."""
        yield self.header
        with ExitStack() as stack:
            files = {
                path: stack.enter_context(safe_open(path, framework="pt"))
                for path in {place.file for place in self.places.values()}
            }
            for place in self.places.values():
                values = files[place.file].get_slice(place.stored)[place.part].flatten()
                for piece in values.split(_PIECE):
                    yield piece.to(_TORCH[place.dtype]).view(torch.uint8).numpy().tobytes()

    def write(self, folder: Path) -> None:
        """Make the file, or leave what there was."""
        partial = folder / f".{self.name}.partial"
        with partial.open("wb") as file:
            for piece in self.pieces():
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # `differs` reads the disk
        os.replace(partial, folder / self.name)
        sync_folder(folder)

    def differs(self, folder: Path) -> bool:
        """Whether the file does not hold the bytes of the source."""
        with (folder / self.name).open("rb") as file:
            return any(file.read(len(piece)) != piece for piece in self.pieces()) or file.read(1) != b""


def plan_shards(places: dict[str, Place], max_bytes: int, origin: str) -> list[Shard]:
    """Tensors in the order of the model, in shards of at most `max_bytes` (or one larger tensor)."""
    groups: list[dict[str, Any]] = []
    room = 0
    for name, place in places.items():
        size = prod(place.shape) * _TORCH[place.dtype].itemsize
        if size > room:
            groups.append({})
            room = max_bytes
        start = max_bytes - room
        offsets = [start, start + size]
        groups[-1][name] = {"dtype": place.dtype, "shape": place.shape, "data_offsets": offsets}
        room -= size
    shards = []
    for number, fields in enumerate(groups, start=1):
        file = SINGLE if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        metadata = {"__metadata__": {"format": "pt", _ORIGIN: origin}}
        header = json.dumps({**metadata, **fields}, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        nbytes = list(fields.values())[-1]["data_offsets"][1]
        group = {name: places[name] for name in fields}
        shards.append(Shard(file, len(header).to_bytes(8, "little") + header, group, nbytes))
    return shards


def check_out(out: Path, shards: list[Shard], origin: str) -> None:
    """Raises ConfigError for an OUT that is neither new nor this export begun, or that has no room for it."""
    if out.exists() and not out.is_dir():
        raise ConfigError([f"{out} is a file; name a new folder"])
    present = {path.name for path in out.glob("[!.]*")} - {"README.md"}
    for name in sorted(present):
        if name.endswith(".safetensors") and (theirs := _origin(out / name)) != origin:
            raise ConfigError([f"{out} holds weights of {theirs}, not of {origin}; choose another folder"])
    left = [shard for shard in shards if not shard.is_whole(out)]
    whole = {shard.name for shard in shards} - {shard.name for shard in left}
    if strange := sorted(present - whole - (_BESIDES if whole else set())):
        raise ConfigError(
            [
                f"{out} holds {', '.join(strange[:8])}, no part of this export; choose a new folder, "
                "or, to go on, the --max-shard-size and --dtype of before"
            ]
        )
    out.mkdir(parents=True, exist_ok=True)
    needed, free = sum(shard.nbytes for shard in left), shutil.disk_usage(out).free
    if needed > free:
        raise ConfigError([f"{out} has {free / 1e9:.1f} GB free, the export needs {needed / 1e9:.1f}"])


def _origin(path: Path) -> str:
    """The checkpoint that a shard was exported from."""
    try:
        with safe_open(path, framework="pt") as reader:
            return (reader.metadata() or {}).get(_ORIGIN, f"another program ({path.name})")
    except SafetensorError:
        return f"nobody knows what ({path.name} is damaged)"


def write_tokenizer(folder: Path, out: Path, config: ModelConfig) -> list[int]:
    """tokenizer.json as it is, and tokenizer_config.json with Qwen3's chat template; the ids that stop."""
    tokenizer = load_tokenizer(folder)
    serialized = (folder / "tokenizer.json").read_bytes()
    vocabulary = tokenizer.vocabulary()
    chat = {"<|im_start|>", IM_END} <= vocabulary.keys()
    added = json.loads(serialized)["added_tokens"]
    fields = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # takes tokenizer.json as it is
        "model_max_length": config.max_position_embeddings,
        "bos_token": None,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": {str(token.pop("id")): token for token in added},
        **({"chat_template": _TEMPLATE.read_text()} if chat else {}),
    }
    write_atomically(out / "tokenizer.json", serialized)
    write_atomically(out / "tokenizer_config.json", to_json(fields))
    return [vocabulary[IM_END], tokenizer.end_of_text] if chat else [tokenizer.end_of_text]


def export(source: Path, out: Path, max_shard_bytes: int, dtype: str | None) -> None:
    """Write OUT, telling how it goes. Raises ConfigError, DataError (what the user gave), OSError (disks)."""
    folder = hf_folder(source)
    config = ModelConfig.of_folder(folder)
    load_tokenizer(folder)  # what is wrong with it shows before the weights are written
    origin = "/".join(folder.resolve().parts[-4:])  # RUN/checkpoints/step-.../hf
    places = {
        name: place._replace(dtype=dtype or place.dtype) for name, place in locate(config, folder).items()
    }
    shards = plan_shards(places, max_shard_bytes, origin)
    check_out(out, shards, origin)
    done, total, started = 0, sum(shard.nbytes for shard in shards), time.monotonic()
    for shard in shards:
        kept = shard.is_whole(out)
        if not kept:
            shard.write(out)
        if shard.differs(out):
            raise OSError(f"{out / shard.name} differs from {folder}; delete it and export again")
        done += shard.nbytes
        speed = done / (time.monotonic() - started)
        print(
            f"{shard.name} {'kept' if kept else 'written'} and read back, {done / 1e9:.2f} of "
            f"{total / 1e9:.2f} GB, {speed / 1e6:,.0f} MB/s, ETA {duration((total - done) / speed)}",
            flush=True,
        )
    if len(shards) > 1:
        weight_map = {name: shard.name for shard in shards for name in shard.places}
        write_atomically(out / INDEX, to_json({"metadata": {"total_size": total}, "weight_map": weight_map}))
    stops = write_tokenizer(folder, out, config)
    kind = str(_TORCH[next(iter(places.values())).dtype]).removeprefix("torch.")
    write_config(config, kind, out, stops)
    locate(config, out)  # the folder reads as one
    balance = folder.parent / "balance.pt"
    if balance.is_file() and "bias" in torch.load(balance, weights_only=True, map_location="cpu"):
        print(
            "warning: the run chose experts with a selection bias (balance.bias_update_rate); "
            "the format has no place for it, so the exported model routes without"
        )
    print(
        f"{out}: {config.num_parameters() / 1e6:,.1f}M parameters, {kind}, from {origin}\n"
        f'  load    AutoModelForCausalLM.from_pretrained("{out}", dtype="auto")\n'
        f"  upload  hf upload YOUR_NAME/{out.resolve().name} {shlex.quote(str(out))}"
    )


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(KB|MB|GB)", text)
    if match is None or not float(match[1]):
        raise argparse.ArgumentTypeError(f"{text} is no size; write 5GB or 300MB")
    return int(float(match[1]) * 10 ** {"KB": 3, "MB": 6, "GB": 9}[match[2]])


def main(arguments: list[str]) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m trainer.export", description=__doc__)
    parser.add_argument(
        "source", type=Path, help="run folder (its newest checkpoint), checkpoint, or HF folder"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="new folder, or one that this export has begun")
    parser.add_argument("--max-shard-size", type=_size, default="5GB", metavar="SIZE", help="KB, MB or GB")
    parser.add_argument(
        "--dtype", choices=_DTYPES, help="of the weights; as they are in the checkpoint if not given"
    )
    options = parser.parse_args(arguments)
    try:
        export(options.source, options.out, options.max_shard_size, _DTYPES.get(options.dtype))
    except (ConfigError, DataError) as error:
        print(error, file=sys.stderr)
        return 2
    except (OSError, SafetensorError) as error:
        print(f"the export is not whole: {error}; the same command goes on where it stopped", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
