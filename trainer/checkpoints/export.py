"""The weights of a checkpoint as a folder for the Hugging Face hub.

Only one shard is in memory at a time; it is written under a temporary name, renamed when it is on the disk,
read back and compared. If an export is killed, the same command continues it. config.json is written
after the weights: a folder without it is incomplete.
"""

import hashlib
import json
import os
import re
import shlex
import time
from dataclasses import replace
from datetime import timedelta
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from data_pipeline.manifest import sync, to_json, write_atomically
from data_pipeline.templated import template_of
from data_pipeline.tokenizer import END_OF_TEXT, load_tokenizer
from moe import fp8
from moe.config import ConfigError, ModelConfig
from moe.formats import FP8, MTP_FORMATS
from moe.hf import (
    INDEX,
    SINGLE,
    TORCH,
    Place,
    Reader,
    SafetensorError,
    locate,
    safe_open,
    save_file,
    write_config,
)
from trainer.checkpoints.weights import selection_bias
from trainer.settings.run_folder import pasted

DTYPES = {"fp32": "F32", "bf16": "BF16", "fp8": fp8.STORED}
# the weights that are quantised in the folders released in FP8
_QUANTISED = re.compile(r".+\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)\.weight")
IM_END = "<|im_end|>"
SUMS = "SHA256SUMS"
_DESCRIPTIONS = {".json", ".jinja"}

_TYPES = {**TORCH, fp8.STORED: torch.float8_e4m3fn}

Shard = dict[str, Place]  # the dtype of a place is the dtype to write


def plan_shards(places: Shard, max_bytes: int) -> dict[str, Shard]:
    """File name -> its tensors, in the order of the model: at most `max_bytes` each, or one larger tensor."""
    shards: list[Shard] = []
    room = 0
    for name, place in places.items():
        if nbytes({name: place}) > room:
            shards.append({})
            room = max_bytes
        shards[-1][name] = place
        room -= nbytes({name: place})
    if len(shards) == 1:
        return {SINGLE: places}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def nbytes(shard: Shard) -> int:
    """Bytes of the tensors of a shard."""
    of_scales = sum(4 * prod(fp8.scale_shape(of.shape)) for of in shard.values() if of.dtype == fp8.STORED)
    return of_scales + sum(prod(of.shape) * _TYPES[of.dtype].itemsize for of in shard.values())


def names_in(shard: Shard) -> list[str]:
    """The tensors in the file of a shard."""
    scales = [name + fp8.SCALES for name, place in shard.items() if place.dtype == fp8.STORED]
    return [*shard, *scales]


def check_out(out: Path, ours: str) -> None:
    """Raises ConfigError if `out` is neither new nor started by this export (`ours`); makes a new one."""
    present = sorted(path.name for path in out.glob("[!.]*") if path.name != "README.md")
    files = [name for name in present if name.endswith(".safetensors")]
    for name in files:
        try:
            with safe_open(out / name, framework="pt") as reader:
                theirs = (reader.metadata() or {}).get("export", "another program")
        except SafetensorError:
            theirs = "an unknown source (it is damaged)"
        if theirs != ours:
            raise ConfigError(f"{out / name} is from {theirs}, not from {ours}; choose another folder")
    if present and not files:
        raise ConfigError(f"{out} holds {', '.join(present[:8])}; choose a new folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{out} cannot be made ({error.strerror}); choose another folder") from error


def write_shard(path: Path, shard: Shard, mark: str) -> None:
    """Write the file unless it exists; then compare the bytes on the disk with the sources.

    An existing file is complete, so it is only compared. Raises OSError if a byte differs.
    """
    with Reader() as reader:

        def read(name: str, place: Place) -> dict[str, Tensor]:
            tensor = reader.read(place)
            if place.dtype == fp8.STORED:
                return dict(zip((name, name + fp8.SCALES), fp8.quantise(tensor), strict=True))
            return {name: tensor.to(TORCH[place.dtype]).contiguous()}

        if not path.exists():
            partial = path.with_name(f".{path.name}.partial")
            metadata = {"format": "pt", "export": mark}
            tensors = {key: one for place in shard.items() for key, one in read(*place).items()}
            save_file(tensors, partial, metadata)
            del tensors
            with partial.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # read back from the disk
            partial.replace(path)
            sync(path.parent)
        written = reader.enter_context(safe_open(path, framework="pt", backend="pread"))
        if set(written.keys()) != set(names_in(shard)) or not all(
            torch.equal(written.get_tensor(key).view(torch.uint8), one.view(torch.uint8))
            for place in shard.items()
            for key, one in read(*place).items()
        ):
            raise OSError(f"{path} differs from its checkpoint; delete it")


def write_tokenizer(folder: Path, out: Path, config: ModelConfig) -> list[int]:
    """Copy tokenizer.json, write tokenizer_config.json and the chat template of the folder; returns the stop
    ids."""
    tokenizer = load_tokenizer(folder)
    serialized = (folder / "tokenizer.json").read_bytes()
    vocabulary = tokenizer.vocabulary()
    chat = {"<|im_start|>", IM_END} <= vocabulary.keys()
    added = json.loads(serialized).get("added_tokens") or []
    fields = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # loads tokenizer.json unchanged
        "model_max_length": config.max_position_embeddings,
        "bos_token": None,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": {str(token.pop("id")): token for token in added},
    }
    if chat:
        fields["chat_template"] = text = template_of(folder).text  # newer tools read it in a file of its own
        write_atomically(out / "chat_template.jinja", text.encode())
    write_atomically(out / "tokenizer.json", serialized)
    write_atomically(out / "tokenizer_config.json", to_json(fields))
    return [vocabulary[IM_END], tokenizer.end_of_text] if chat else [tokenizer.end_of_text]


def _normalises(out: Path) -> bool:
    return json.loads((out / "tokenizer.json").read_bytes()).get("normalizer") is not None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def export(folder: Path, out: Path, max_shard_bytes: int, dtype: str | None) -> None:
    """Write `out`, printing progress. Raises ConfigError or DataError for wrong input, OSError for disks."""
    config = ModelConfig.of_folder(folder)
    if config.num_nextn_predict_layers and config.to_hf()["model_type"] not in MTP_FORMATS:
        print("multi-token prediction is not exported: the format has no place for it")
        config = replace(config, num_nextn_predict_layers=0)
    load_tokenizer(folder)  # both raise their errors before the weights are written
    template_of(folder)
    places = locate(config, folder)
    quantization = None
    if dtype == fp8.STORED:
        small = {name for name in places if _QUANTISED.fullmatch(name)}
        places = {name: of._replace(dtype=dtype if name in small else "BF16") for name, of in places.items()}
        kept = [name.removesuffix(".weight") for name in places if name not in small]
        quantization = {**FP8, "fmt": "e4m3", "activation_scheme": "dynamic", "modules_to_not_convert": kept}
    elif dtype:
        places = {name: place._replace(dtype=dtype) for name, place in places.items()}
    shards, total = plan_shards(places, max_shard_bytes), nbytes(places)
    written_as = TORCH[next(iter(places.values())).dtype]
    kind = "fp8" if quantization else str(written_as).removeprefix("torch.")
    origin = "/".join(folder.resolve().parts[-4:])  # RUN/checkpoints/step-.../hf
    mark = f"{origin} ({kind}, {len(shards)} of at most {max_shard_bytes:,} B)"
    check_out(out, mark)
    done, started, sums = 0, time.monotonic(), dict[str, str]()
    for name, shard in shards.items():
        how = "kept" if (out / name).exists() else "written"
        write_shard(out / name, shard, mark)
        sums[name] = _sha256(out / name)  # while the system still has it in memory
        done += nbytes(shard)
        speed = done / (time.monotonic() - started)
        progress = f"{done / 1e9:.2f} of {total / 1e9:.2f} GB, {speed / 1e6:,.0f} MB/s"
        left = timedelta(seconds=int((total - done) / speed))
        print(f"{name} {how} and read back, {progress}, ETA {left}", flush=True)
    if len(shards) > 1:
        weight_map = {name: file for file, shard in shards.items() for name in names_in(shard)}
        write_atomically(out / INDEX, to_json({"metadata": {"total_size": total}, "weight_map": weight_map}))
    write_config(config, written_as, out, write_tokenizer(folder, out, config), quantization)
    sums |= {path.name: _sha256(path) for path in out.iterdir() if path.suffix in _DESCRIPTIONS}
    lines = (f"{sums[name]}  {name}\n" for name in sorted(sums))  # as `sha256sum --check` reads them
    write_atomically(out / SUMS, "".join(lines).encode())
    if config.to_hf()["model_type"] == "qwen2" and not _normalises(out):
        what = "for a model of type qwen2, AutoTokenizer composes the characters of each text (NFC)"
        print(f"warning: {what}, which this tokenizer does not; read it with PreTrainedTokenizerFast")
    if selection_bias(folder, torch.device("cpu")) is not None:
        what = "the run chose experts with a selection bias (balance.bias_update_rate)"
        print(f"warning: {what}; the format has no place for it, so the exported model routes without it")
    print(
        f"{out}: {config.num_parameters() / 1e6:,.1f}M parameters, {kind}, from {origin}\n"
        f'  load    AutoModelForCausalLM.from_pretrained({json.dumps(str(out))}, dtype="auto")\n'
        f"  upload  hf upload {shlex.quote(f'YOUR_NAME/{out.resolve().name}')} {pasted(out)}"
    )
