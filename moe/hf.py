"""Read and write Hugging Face folders: config.json and safetensors, with separate tensors for each expert."""
# E experts, H hidden, I intermediate

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moe import fp8
from moe.config import ConfigError, ModelConfig
from moe.model import CausalLM

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SUFFIX = ".safetensors"
ROUTER = ".mlp.gate.weight"  # the end of a router's hub name
MAX_SHARD_BYTES = 5 * 10**9
# dtypes as safetensors names them
TORCH = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}

# our tensor of all experts, [E, 2I, H] or [E, H, I], as in transformers -> the projections of each expert on
# the hub, side by side in its dimension 1
_PROJECTIONS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
_STACKED = re.compile(r"(.+\.mlp\.experts)\.(gate_up_proj|down_proj)")
_HUB = re.compile(r"(.+\.mlp\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")


def from_hub(name: str) -> tuple[str, int | None]:
    """The parameter that holds a hub tensor and, if it stacks experts, the expert's global number."""
    match = _HUB.fullmatch(name)
    if match is None:
        return name, None
    stacked = next(ours for ours, projections in _PROJECTIONS.items() if match[3] in projections)
    return f"{match[1]}.{stacked}", int(match[2])


def hub_tensors(model: CausalLM, ep_rank: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Hub name and detached view of every tensor this rank holds; a tied head does not appear."""
    return _per_expert(model.named_parameters(), ep_rank)


def _per_expert(parameters: Iterable[tuple[str, Tensor]], ep_rank: int) -> Iterator[tuple[str, Tensor]]:
    for parameter, tensor in parameters:
        match = _STACKED.fullmatch(parameter)
        if match is None:
            yield parameter, tensor.detach()
            continue
        projections = _PROJECTIONS[match[2]]
        parts = tensor.detach().chunk(len(projections), dim=1)
        for part, projection in zip(parts, projections, strict=True):
            for expert, view in enumerate(part.unbind(0), start=ep_rank * len(tensor)):
                yield f"{match[1]}.{expert}.{projection}.weight", view


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
    """Stream (our name, tensor) pairs into shards of `folder`; hub name -> where it was written.

    Any number of ranks may write their tensors into one folder: file names contain `rank`. Stacked tensors
    hold the experts of `ep_rank`. At most `max_shard_bytes` (or one larger tensor) are in memory at a time.
    """
    written: dict[str, Written] = {}
    shard: dict[str, Tensor] = {}
    number = room = 0
    file = ""

    def flush() -> None:
        if shard:
            save_file(shard, folder / file, metadata={"format": "pt"})
            shard.clear()

    for name, tensor in _per_expert(parameters, ep_rank):
        if tensor.nbytes > room:
            flush()
            number, room = number + 1, max_shard_bytes
            file = f"model-{rank:05d}-{number:05d}.safetensors"
        shard[name] = tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)
        room -= tensor.nbytes
        written[name] = Written(file, tensor.nbytes)
    flush()
    return written


def write_index(written: Mapping[str, Written], folder: Path) -> None:
    """Write the index of all tensors that `write_shards` wrote into `folder`, by all ranks."""
    sizes = {"total_size": sum(place.nbytes for place in written.values())}
    files = {name: place.file for name, place in written.items()}
    _write_json(folder / INDEX, {"metadata": sizes, "weight_map": files})


def write_config(
    config: ModelConfig,
    dtype: torch.dtype,
    folder: Path,
    stops: Sequence[int] = (),
    quantization: Mapping[str, Any] | None = None,
) -> None:
    """Write config.json and generation_config.json, with the keys of the released models.

    `stops` are the ids at which generation stops. The last one ends a document and is also used as padding.
    """
    special = {key: stops[-1] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if stops}
    kind = {"torch_dtype": str(dtype).removeprefix("torch.")}
    more = {} if quantization is None else {"quantization_config": quantization}
    _write_json(folder / "config.json", {**config.to_hf(), **kind, **special, **more})
    if stops:
        ends = stops[0] if len(stops) == 1 else list(stops)
        _write_json(folder / "generation_config.json", {**special, "eos_token_id": ends})


def save_hf(model: CausalLM, folder: Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write a model of which this process holds all tensors to a folder that transformers can load.

    Raises ConfigError if the folder already holds weights: old shards would be read as part of this model.
    """
    if any(folder.glob("*.safetensors")):
        raise ConfigError(f"{folder} already holds weights; choose an empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    written = write_shards(model.named_parameters(), folder, max_shard_bytes=max_shard_bytes)
    held = sum(from_hub(name)[1] is not None for name in written)
    assert held == 3 * model.config.num_moe_layers * model.config.num_experts, "the model is expert-parallel"
    files = list(folder.glob("*.safetensors"))
    if len(files) == 1:
        files[0].rename(folder / SINGLE)
    else:
        write_index(written, folder)
    write_config(model.config, model.lm_head.weight.dtype, folder)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


class Place(NamedTuple):
    """Where a folder holds a hub tensor: the part `part` of the tensor `stored` in `file`."""

    file: Path
    stored: str
    dtype: str  # as safetensors names it: F32, BF16, ...; in `locate` BF16 for a weight with scales
    part: tuple[int | slice, ...]
    shape: tuple[int, ...]  # of the part
    scales: "Place | None" = None  # of a weight in FP8


class Reader(ExitStack):
    """Reads tensors at their places; keeps the files open. Raises what safetensors does for damaged files."""

    def __init__(self) -> None:
        super().__init__()
        self._files: dict[Path, Any] = {}

    def read(self, place: Place) -> Tensor:
        """The tensor at a place, on the host; a weight in FP8 becomes fp32."""
        view = self._view(place)
        part = view[place.part]
        if place.scales is None:
            return part
        shape = tuple(view.get_shape())
        return fp8.dequantise(part, self._view(place.scales)[:], place.part, shape)

    def _view(self, place: Place) -> Any:
        if place.file not in self._files:
            opened = safe_open(place.file, framework="pt", backend="pread")
            self._files[place.file] = self.enter_context(opened)
        return self._files[place.file].get_slice(place.stored)


@torch.no_grad()
def load_hf(model: CausalLM, folder: Path, *, ep_rank: int = 0, dense_slices: int = 0) -> None:
    """Fill the model from a folder, cast to the dtypes of its parameters, in place.

    Reads one file or shards, with per-expert or fused expert tensors (the form of transformers 5 in memory).
    For an expert-parallel model only the experts of `ep_rank` are read. `dense_slices`: see `locate`.
    Raises ConfigError as `locate` does, when the model is unchanged, and for weights that are not finite.
    """
    places = locate(model.config, folder, dense_slices)
    wanted = {name: tensor for name, tensor in hub_tensors(model, ep_rank) if name in places}
    broken = []
    with Reader() as reader:
        for name in sorted(wanted, key=lambda name: places[name].file):
            wanted[name].copy_(found := reader.read(places[name]))
            broken += [] if found.isfinite().all() else [name]
    if broken:
        raise ConfigError(f"{folder}: {_listed('not finite', broken)}; name a folder of sound weights")


def locate(config: ModelConfig, folder: Path, dense_slices: int = 0) -> dict[str, Place]:
    """Hub name -> place of every tensor of a model of `config`, in the order of the model.

    `dense_slices` > 0: the folder holds a dense model; expert e is slice e % dense_slices of the intermediate
    dimension of its MLP, and routers are left out.
    Raises ConfigError that lists all missing, extra and misshapen tensors; the same on every rank.
    """
    found, places = _headers(folder), {}
    missing, misshapen, known = [], [], {"lm_head.weight"}  # some folders of tied models repeat the embedding
    known |= {
        name for name in found if name.endswith(".rotary_emb.inv_freq")
    }  # of old exporters; not weights
    with torch.device("meta"):
        whole = CausalLM(config)
    for name, tensor in hub_tensors(whole):
        shape, expert = tuple(tensor.shape), from_hub(name)[1]
        if dense_slices and name.endswith(ROUTER):
            continue
        if expert is not None and dense_slices:
            stored, part, stored_shape = _dense_part(name, shape, dense_slices)
        elif expert is not None and name not in found:
            stored, part, stored_shape = _fused_part(name, shape, config.num_experts)
        else:
            stored, part, stored_shape = name, (slice(None),), shape
        known.add(stored)
        if stored not in found:
            missing.append(stored if dense_slices else name)
        elif found[stored].shape != stored_shape:
            misshapen.append(f"{stored} {list(found[stored].shape)} instead of {list(stored_shape)}")
        elif found[stored].dtype == fp8.STORED and len(stored_shape) == 2:
            scales, wanted = found.get(stored + fp8.SCALES), fp8.scale_shape(stored_shape)
            known.add(stored + fp8.SCALES)
            if scales is None:
                missing.append(stored + fp8.SCALES)
            elif scales.shape != wanted:
                misshapen.append(f"{scales.stored} {list(scales.shape)} instead of {list(wanted)}")
            else:
                places[name] = found[stored]._replace(dtype="BF16", part=part, shape=shape, scales=scales)
        elif found[stored].dtype not in TORCH:
            misshapen.append(f"{stored} {found[stored].dtype} instead of {', '.join(TORCH)}")
        else:
            places[name] = found[stored]._replace(part=part, shape=shape)
    # a folder may hold a layer of multi-token prediction that the model does not have
    extra = sorted(name for name in found.keys() - known if not name.startswith("mtp."))
    kinds = {"missing": missing, "extra": extra, "misshapen": misshapen}
    if problems := [f"{folder}: {_listed(kind, names)}" for kind, names in kinds.items() if names]:
        raise ConfigError(problems)
    return places


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype of a folder's token embedding; fp32 if the embedding is missing or its dtype not in TORCH."""
    place = _headers(folder).get("model.embed_tokens.weight")
    return torch.float32 if place is None else TORCH.get(place.dtype, torch.float32)


def _headers(folder: Path) -> dict[str, Place]:
    """Every tensor of the folder's weight files, by name; reads only the headers."""
    files = [SINGLE]
    if (folder / INDEX).exists():
        try:
            files = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
            if wrong := [name for name in files if Path(name).name != name or Path(name).suffix != _SUFFIX]:
                raise ValueError(f"{wrong[0]!r} is not the name of a {_SUFFIX} file in this folder")
        except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise ConfigError(f"{folder / INDEX} cannot be read ({error!r}); fetch it again") from error
    if absent := [file for file in files if not (folder / file).exists()]:
        raise ConfigError(f"{folder}: {_listed('missing', absent)}")
    stored = {}
    for file in files:
        try:
            with safe_open(folder / file, framework="pt") as reader:
                for name in reader.keys():  # noqa: SIM118, the reader is not a mapping
                    view = reader.get_slice(name)
                    shape = tuple(view.get_shape())
                    stored[name] = Place(folder / file, name, view.get_dtype(), (slice(None),), shape)
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{folder / file} cannot be read: {error}; fetch it again") from error
    return stored


_Part = tuple[str, tuple[int | slice, ...], tuple[int, ...]]  # stored name, part of it, whole stored shape


def _fused_part(name: str, shape: tuple[int, ...], experts: int) -> _Part:
    """Where a folder with fused experts holds one expert's tensor of this shape."""
    stored, expert = from_hub(name)
    assert expert is not None
    projections = _PROJECTIONS[stored.rpartition(".")[2]]
    place = projections.index(name.split(".")[-2])
    rows, columns = shape
    cut = slice(place * rows, (place + 1) * rows)
    return stored, (expert, cut), (experts, len(projections) * rows, columns)


def _dense_part(name: str, shape: tuple[int, ...], slices: int) -> _Part:
    """Where a dense folder holds the slice that becomes one expert's tensor of this shape."""
    prefix, expert, projection, _ = name.rsplit(".", 3)
    stored = f"{prefix.removesuffix('.experts')}.{projection}.weight"
    rows, columns = shape
    width = columns if projection == "down_proj" else rows
    cut = slice(int(expert) % slices * width, (int(expert) % slices + 1) * width)
    if projection == "down_proj":
        return stored, (slice(None), cut), (rows, slices * columns)
    return stored, (cut,), (slices * rows, columns)


def _listed(kind: str, names: Sequence[str]) -> str:
    """`3 missing: model.layers.{0-1,5}.mlp.gate.weight`: all names, with numbers that differ as ranges."""
    lines = list(dict.fromkeys(names))
    count = len(lines)
    for number in (r"(.*\.)(\d+)(\..*)", r"(.*?\.)(\d+)(\..*)"):  # expert (last), then layer (first)
        alike: dict[tuple[str, str], list[int]] = defaultdict(list)
        for line in lines:
            match = re.fullmatch(number, line)
            alike[(match[1], match[3]) if match else (line, "")] += [int(match[2])] if match else []
        lines = [f"{before}{_ranges(numbers)}{after}" for (before, after), numbers in alike.items()]
    return f"{count} {kind}: {', '.join(lines)}"


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> `{0-2,5}`, [5] -> `5`, [] -> nothing."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][-1] + 1:
            spans[-1][1:] = [number]
        else:
            spans.append([number])
    text = ",".join("-".join(map(str, span)) for span in spans)
    return f"{{{text}}}" if len(numbers) > 1 else text
