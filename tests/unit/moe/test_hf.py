"""Hugging Face folders: the mapping of names, slices for expert parallelism, and refused folders."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe.config import ConfigError, ModelConfig
from moe.dispatch import LocalDispatcher
from moe.hf import from_hub, hub_tensors, load_hf, save_hf, stored_dtype
from moe.model import CausalLM
from moe.parallelize import apply_expert_parallel

Build = Callable[..., CausalLM]
EXPERTS = "model.layers.2.mlp.experts"


def _saved(model: CausalLM, folder: Path) -> dict[str, Tensor]:
    save_hf(model, folder)
    return load_file(folder / "model.safetensors")


def _fused(tensors: dict[str, Tensor], experts: int) -> dict[str, Tensor]:
    """The same tensors under the names that transformers 5 uses in memory, built by hand."""
    fused = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for prefix in {name.split(".experts.")[0] + ".experts" for name in tensors if ".experts." in name}:
        stacks = {
            projection: torch.stack([tensors[f"{prefix}.{e}.{projection}.weight"] for e in range(experts)])
            for projection in ("gate_proj", "up_proj", "down_proj")
        }
        fused[f"{prefix}.gate_up_proj"] = torch.cat((stacks["gate_proj"], stacks["up_proj"]), dim=1)
        fused[f"{prefix}.down_proj"] = stacks["down_proj"]
    return fused


def _load_error(model: CausalLM, folder: Path) -> list[str]:
    with pytest.raises(ConfigError) as error:
        load_hf(model, folder)
    return error.value.problems


@pytest.mark.parametrize(
    ("hub", "parameter", "expert"),
    [
        (f"{EXPERTS}.7.gate_proj.weight", f"{EXPERTS}.gate_up_proj", 7),
        (f"{EXPERTS}.0.up_proj.weight", f"{EXPERTS}.gate_up_proj", 0),
        (f"{EXPERTS}.127.down_proj.weight", f"{EXPERTS}.down_proj", 127),
        ("model.layers.2.mlp.gate.weight", "model.layers.2.mlp.gate.weight", None),
        ("model.layers.1.mlp.gate_proj.weight", "model.layers.1.mlp.gate_proj.weight", None),
        ("model.embed_tokens.weight", "model.embed_tokens.weight", None),
    ],
)
def test_the_parameter_of_a_hub_name(hub: str, parameter: str, expert: int | None) -> None:
    assert from_hub(hub) == (parameter, expert)


def test_the_hub_tensors_of_a_model_are_its_parameters_cut_up(config: ModelConfig, build: Build) -> None:
    model = build(config)
    tensors = list(hub_tensors(model))
    assert len({name for name, _ in tensors}) == len(tensors)
    parameters = dict(model.named_parameters())
    assert {from_hub(name)[0] for name, _ in tensors} == parameters.keys()
    assert sum(tensor.numel() for _, tensor in tensors) == sum(x.numel() for x in parameters.values())
    for name, tensor in tensors:
        parameter, expert = from_hub(name)
        whole = parameters[parameter] if expert is None else parameters[parameter][expert]
        if name.endswith(("gate_proj.weight", "up_proj.weight")) and expert is not None:
            whole = whole.chunk(2)["up_proj" in name]
        assert torch.equal(tensor, whole)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("ep_size", [2, 4])
def test_each_rank_loads_its_experts(
    moe_config: ModelConfig, build: Build, tmp_path: Path, ep_size: int, fused: bool
) -> None:
    whole = build(moe_config)
    tensors = _saved(whole, tmp_path)
    if fused:
        save_file(_fused(tensors, moe_config.num_experts), tmp_path / "model.safetensors")
    parameters = dict(whole.named_parameters())
    for ep_rank in range(ep_size):
        part = CausalLM(moe_config)
        apply_expert_parallel(part, ep_rank=ep_rank, ep_size=ep_size, dispatcher=LocalDispatcher())
        load_hf(part, tmp_path, ep_rank=ep_rank)
        for name, parameter in part.named_parameters():
            expected = parameters[name]
            if ".experts." in name:
                expected = expected.chunk(ep_size)[ep_rank]
            assert torch.equal(parameter, expected), name


@pytest.mark.parametrize(("stored", "held"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_dtypes_are_cast_on_load(
    config: ModelConfig, build: Build, tmp_path: Path, stored: str, held: str
) -> None:
    model = build(config).to(getattr(torch, stored))
    save_hf(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == stored
    assert stored_dtype(tmp_path) == getattr(torch, stored)
    back = CausalLM(config).to(getattr(torch, held))
    load_hf(back, tmp_path)
    for ours, original in zip(back.parameters(), model.parameters(), strict=True):
        assert ours.dtype == getattr(torch, held)
        assert torch.equal(ours, original.to(ours.dtype))


def test_shards_and_their_index(config: ModelConfig, build: Build, tmp_path: Path) -> None:
    model = build(config)
    save_hf(model, tmp_path, max_shard_bytes=10_000)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 1
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    names = {name: file.name for file in files for name in load_file(file)}
    assert index["weight_map"] == names
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for _, tensor in hub_tensors(model))
    back = CausalLM(config)
    load_hf(back, tmp_path)
    assert all(torch.equal(*pair) for pair in zip(back.parameters(), model.parameters(), strict=True))


def test_shards_keep_to_the_limit(config: ModelConfig, build: Build, tmp_path: Path) -> None:
    """Each shard is within the limit or one tensor; the first tensor of the next shard would not fit."""
    limit = 5_000
    model = build(config)
    save_hf(model, tmp_path, max_shard_bytes=limit)
    weight_map = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    shards: dict[str, list[int]] = {}
    for name, tensor in hub_tensors(model):
        shards.setdefault(weight_map[name], []).append(tensor.nbytes)
    assert all(sum(sizes) <= limit or len(sizes) == 1 for sizes in shards.values())
    assert any(len(sizes) > 1 for sizes in shards.values())
    assert all(sum(sizes) + after[0] > limit for sizes, after in pairwise(shards.values()))


def test_config_json_is_the_config(config: ModelConfig, build: Build, tmp_path: Path) -> None:
    save_hf(build(config), tmp_path)
    assert ModelConfig.from_hf(json.loads((tmp_path / "config.json").read_text())) == config


def test_all_wrong_tensors_are_named_at_once_and_nothing_is_loaded(
    moe_config: ModelConfig, build: Build, tmp_path: Path
) -> None:
    tensors = _saved(build(moe_config), tmp_path)
    del tensors["model.norm.weight"], tensors[f"{EXPERTS}.3.up_proj.weight"]
    tensors["visual.weight"] = torch.zeros(1)
    tensors[f"{EXPERTS}.8.up_proj.weight"] = torch.zeros(12, 24)  # experts run from 0 to 7
    tensors["lm_head.weight"] = torch.zeros(60, 24)
    save_file(tensors, tmp_path / "model.safetensors")
    model = CausalLM(moe_config)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    assert _load_error(model, tmp_path) == [
        f"{tmp_path}: 2 missing: {EXPERTS}.3.up_proj.weight, model.norm.weight",
        f"{tmp_path}: 2 extra: {EXPERTS}.8.up_proj.weight, visual.weight",
        f"{tmp_path}: 1 misshapen: lm_head.weight [60, 24] instead of [61, 24]",
    ]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.nan_to_num(), before[name].nan_to_num()), name


def test_misshapen_fused_experts(moe_config: ModelConfig, build: Build, tmp_path: Path) -> None:
    tensors = _fused(_saved(build(moe_config), tmp_path), moe_config.num_experts)
    tensors[f"{EXPERTS}.gate_up_proj"] = torch.zeros(4, 24, 24)
    save_file(tensors, tmp_path / "model.safetensors")
    assert _load_error(CausalLM(moe_config), tmp_path) == [
        f"{tmp_path}: 1 misshapen: {EXPERTS}.gate_up_proj [4, 24, 24] instead of [8, 24, 24]"
    ]


def test_every_missing_name_is_said_in_short(moe_config: ModelConfig, build: Build, tmp_path: Path) -> None:
    """Experts 0 to 7 in layers 0 and 2: names that differ only in numbers are joined, and only those."""
    tensors = _saved(build(moe_config), tmp_path)
    kept = {name: tensor for name, tensor in tensors.items() if "up_proj" not in name}
    for expert in (3, 6):
        name = f"{EXPERTS}.{expert}.up_proj.weight"
        kept[name] = tensors[name]
    save_file(kept, tmp_path / "model.safetensors")
    assert _load_error(CausalLM(moe_config), tmp_path) == [
        f"{tmp_path}: 15 missing: model.layers.0.mlp.experts.{{0-7}}.up_proj.weight, "
        f"model.layers.1.mlp.up_proj.weight, {EXPERTS}.{{0-2,4-5,7}}.up_proj.weight"
    ]
    save_file({"model.norm.weight": tensors["model.norm.weight"]}, tmp_path / "model.safetensors")
    (missing,) = _load_error(CausalLM(moe_config), tmp_path)
    assert "model.layers.{0,2}.mlp.experts.{0-7}.up_proj.weight" in missing
    assert "model.layers.{0-2}.self_attn.q_proj.weight" in missing
    assert len(missing) < 1000


def test_tied_folder_may_repeat_the_embedding(
    dense_config: ModelConfig, build: Build, tmp_path: Path
) -> None:
    tensors = _saved(build(dense_config), tmp_path)
    assert "lm_head.weight" not in tensors
    save_file(
        {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()},
        tmp_path / "model.safetensors",
    )
    model = CausalLM(dense_config)
    load_hf(model, tmp_path)
    assert torch.equal(model.lm_head.weight, tensors["model.embed_tokens.weight"])


def test_a_head_for_multi_token_prediction_is_passed_over(
    next_config: ModelConfig, build: Build, tmp_path: Path
) -> None:
    """Released Qwen3-Next folders hold one; transformers does not read it either."""
    model = build(next_config)
    tensors = {**_saved(model, tmp_path), "mtp.fc.weight": torch.zeros(3)}
    save_file(tensors, tmp_path / "model.safetensors")
    back = CausalLM(next_config)
    load_hf(back, tmp_path)
    assert all(torch.equal(*pair) for pair in zip(back.parameters(), model.parameters(), strict=True))


def test_folders_that_cannot_be_read(dense_config: ModelConfig, build: Build, tmp_path: Path) -> None:
    model = build(dense_config)
    assert _load_error(model, tmp_path) == [f"{tmp_path}: 1 missing: model.safetensors"]
    save_hf(model, tmp_path, max_shard_bytes=10_000)
    shards = sorted(tmp_path.glob("*.safetensors"))
    shards[0].write_bytes(shards[0].read_bytes()[:-1])
    assert _load_error(model, tmp_path)[0].startswith(f"{shards[0]} cannot be read: ")
    shards[0].unlink()
    assert _load_error(model, tmp_path) == [f"{tmp_path}: 1 missing: {shards[0].name}"]


def test_a_folder_with_weights_is_not_overwritten(
    dense_config: ModelConfig, build: Build, tmp_path: Path
) -> None:
    model = build(dense_config)
    save_hf(model, tmp_path)
    with pytest.raises(ConfigError, match="already holds weights; choose an empty folder"):
        save_hf(model, tmp_path)


def test_a_share_of_the_experts_is_not_saved(moe_config: ModelConfig, build: Build, tmp_path: Path) -> None:
    model = build(moe_config)
    apply_expert_parallel(model, ep_rank=0, ep_size=2, dispatcher=LocalDispatcher())
    with pytest.raises(AssertionError, match="expert-parallel"):
        save_hf(model, tmp_path)
