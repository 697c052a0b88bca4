"""Weights in and out of Hugging Face folders: config.json and safetensors, experts one by one."""
# E experts, H hidden, I intermediate

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moe.config import ConfigError, ModelConfig
from moe.model import CausalLM

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 * 10**9
WriteError = SafetensorError  # what a full disk raises in `write_shards`

# our stacked tensor -> the projection of one expert on the hub
_PROJECTIONS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_PARAMETERS = {projection: weight for weight, projection in _PROJECTIONS.items()}
_PARAMETER = re.compile(r"(.+\.mlp\.experts)\.(w1|w2|w3)")
_HUB = re.compile(r"(.+\.mlp\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")
# our stacked tensor -> transformers' tensor over all experts, and the half of its dimension 1 if it has two
# (gate_up_proj [E, 2I, H], down_proj [E, H, I])
_FUSED = {"w1": ("gate_up_proj", 0), "w3": ("gate_up_proj", 1), "w2": ("down_proj", None)}


def is_expert(parameter: str) -> bool:
    """Whether a parameter of our model stacks experts in its first dimension."""
    return _PARAMETER.fullmatch(parameter) is not None


def to_hub(parameter: str, expert: int | None = None) -> str:
    """The hub's name of our parameter; of one expert of it (its global number) where it stacks experts."""
    match = _PARAMETER.fullmatch(parameter)
    if match is None:
        return parameter
    return f"{match[1]}.{expert}.{_PROJECTIONS[match[2]]}.weight"


def from_hub(name: str) -> tuple[str, int | None]:
    """The inverse of `to_hub`: our parameter, and the expert's global number where there is one."""
    match = _HUB.fullmatch(name)
    if match is None:
        return name, None
    return f"{match[1]}.{_PARAMETERS[match[3]]}", int(match[2])


def hub_tensors(model: CausalLM, ep_rank: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Hub name and detached view of every tensor this rank holds; a tied head does not appear."""
    return _per_expert(model.named_parameters(), ep_rank)


def _per_expert(parameters: Iterable[tuple[str, Tensor]], ep_rank: int) -> Iterator[tuple[str, Tensor]]:
    for parameter, tensor in parameters:
        if is_expert(parameter):
            first = ep_rank * tensor.shape[0]
            for expert, view in enumerate(tensor.detach().unbind(0), start=first):
                yield to_hub(parameter, expert), view
        else:
            yield parameter, tensor.detach()


class Written(NamedTuple):
    """Where a tensor has been written."""

    file: str
    nbytes: int


def write_shards(
    parameters: Iterable[tuple[str, Tensor]],
    folder: Path,
    *,
    rank: int = 0,
    ep_rank: int = 0,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> dict[str, Written]:
    """Stream (our name, tensor) pairs into shards of `folder`; hub name -> where it went.

    Any number of ranks may write into one folder, each what it holds: file names carry `rank`, an expert
    tensor is the slice of `ep_rank`. At most `max_shard_bytes` (or one larger tensor) are held at a time.
    """
    written: dict[str, Written] = {}
    shard: dict[str, Tensor] = {}
    number = room = 0

    def flush() -> None:
        if shard:
            save_file(shard, folder / _shard_name(rank, number), metadata={"format": "pt"})
            shard.clear()

    for name, tensor in _per_expert(parameters, ep_rank):
        if tensor.nbytes > room:
            flush()
            number, room = number + 1, max_shard_bytes
        shard[name] = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        room -= tensor.nbytes
        written[name] = Written(_shard_name(rank, number), tensor.nbytes)
    flush()
    return written


def finish_folder(
    config: ModelConfig,
    dtype: torch.dtype,
    written: Mapping[str, Written],
    folder: Path,
    end_of_text: int | None = None,
) -> None:
    """Write config.json and the index over all that `write_shards` wrote into `folder`, on every rank.

    `end_of_text` is the token id at which generation stops.
    """
    files = {name: place.file for name, place in written.items()}
    if len(set(files.values())) == 1:
        (folder / next(iter(files.values()))).rename(folder / SINGLE)
    else:
        total = sum(place.nbytes for place in written.values())
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": files})
    ends = {} if end_of_text is None else {"eos_token_id": end_of_text, "pad_token_id": end_of_text}
    name = str(dtype).removeprefix("torch.")
    _write_json(folder / CONFIG, {**config.to_hf(), "torch_dtype": name, **ends})
    if ends:
        _write_json(folder / "generation_config.json", ends)


def save_hf(model: CausalLM, folder: str | Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write a model that this process holds whole as a folder that transformers loads.

    Raises ConfigError if the folder holds weights already: leftover shards would be taken for this model's.
    """
    folder = Path(folder)
    if any(folder.glob("*.safetensors")):
        raise ConfigError([f"{folder} already holds weights; choose an empty folder"])
    folder.mkdir(parents=True, exist_ok=True)
    written = write_shards(model.named_parameters(), folder, max_shard_bytes=max_shard_bytes)
    held = sum(from_hub(name)[1] is not None for name in written)
    assert held == 3 * len(model.config.moe_layers) * model.config.num_experts, "the model is expert-parallel"
    finish_folder(model.config, model.lm_head.weight.dtype, written, folder)


def _shard_name(rank: int, number: int) -> str:
    return f"model-{rank:05d}-{number:05d}.safetensors"


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


_Index = tuple[int | slice, ...]


class _Stored(NamedTuple):
    """A tensor in a folder."""

    file: Path
    shape: tuple[int, ...]


@torch.no_grad()
def load_hf(model: CausalLM, folder: str | Path, *, ep_rank: int = 0) -> None:
    """Fill the model from a folder, cast to the dtypes of its parameters, in place.

    One file or shards, per-expert or fused expert tensors (transformers 5 in memory). Of an expert-parallel
    model only the slices of `ep_rank`'s experts are read.
    Raises ConfigError that lists all missing, extra and misshapen tensors; the model is untouched then.
    """
    stored = _stored_tensors(Path(folder))
    experts = model.config.num_experts
    missing, misshapen = [], []
    reads: dict[Path, list[tuple[str, _Index, Tensor]]] = defaultdict(list)
    for name, tensor in hub_tensors(model, ep_rank):
        source, shape = name, tuple(tensor.shape)
        index: _Index = (slice(None),)
        if name not in stored and from_hub(name)[1] is not None:
            source, index, shape = _fused_source(name, shape, experts)
        if source not in stored:
            missing.append(name)
        elif stored[source].shape != shape:
            misshapen.append(f"{source} {list(stored[source].shape)} instead of {list(shape)}")
        else:
            reads[stored[source].file].append((source, index, tensor))
    extra = sorted(stored.keys() - _known_names(model))
    kinds = {"missing": missing, "extra": extra, "misshapen": list(dict.fromkeys(misshapen))}
    found = [f"{folder}: {_listed(kind, names)}" for kind, names in kinds.items() if names]
    if found:
        raise ConfigError(found)
    for file, tensors in reads.items():
        with safe_open(file, framework="pt") as reader:
            for source, index, tensor in tensors:
                tensor.copy_(reader.get_slice(source)[index])


def _stored_tensors(folder: Path) -> dict[str, _Stored]:
    """Every tensor of the folder's weights, from the headers alone."""
    files = [SINGLE]
    if (folder / INDEX).exists():
        files = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
    absent = [file for file in files if not (folder / file).exists()]
    if absent:
        raise ConfigError([f"{folder}: {_listed('missing', absent)}"])
    stored = {}
    for file in files:
        try:
            with safe_open(folder / file, framework="pt") as reader:
                for name in reader.keys():  # noqa: SIM118, the reader is no mapping
                    stored[name] = _Stored(folder / file, tuple(reader.get_slice(name).get_shape()))
        except SafetensorError as error:
            raise ConfigError([f"{folder / file} cannot be read: {error}; fetch it again"]) from error
    return stored


def _fused_source(name: str, shape: tuple[int, ...], experts: int) -> tuple[str, _Index, tuple[int, ...]]:
    """Where a fused folder has one expert's tensor: (tensor name, index into it, shape of all of it)."""
    parameter, expert = from_hub(name)
    assert expert is not None
    fused, half = _FUSED[parameter.rpartition(".")[2]]
    rows, columns = shape
    first, parts = (0, 1) if half is None else (half * rows, 2)
    source = f"{parameter.rpartition('.')[0]}.{fused}"
    return source, (expert, slice(first, first + rows)), (experts, parts * rows, columns)


def _known_names(model: CausalLM) -> set[str]:
    """Every name that a folder of this model may hold, whatever share of the experts this rank holds."""
    known = {"lm_head.weight"}  # some folders of tied models repeat the embedding
    for parameter, _ in model.named_parameters():
        if is_expert(parameter):
            prefix, _, weight = parameter.rpartition(".")
            known.update(to_hub(parameter, expert) for expert in range(model.config.num_experts))
            known.add(f"{prefix}.{_FUSED[weight][0]}")
        else:
            known.add(parameter)
    return known


def _listed(kind: str, names: list[str], limit: int = 8) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{len(names)} {kind}: {', '.join(names[:limit])}{more}"
