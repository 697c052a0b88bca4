"""Weights in FP8 blocks: the format of the released folders, read whole, in part, and by name refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe import fp8
from moe.config import ConfigError, ModelConfig
from moe.hf import load_hf, save_hf
from moe.model import CausalLM


def slow_dequantise(numbers: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """One number after the other."""
    out = torch.empty(numbers.shape)
    for i in range(numbers.shape[0]):
        for j in range(numbers.shape[1]):
            out[i, j] = float(numbers[i, j]) * float(scales[i // 128, j // 128])
    return out


@pytest.mark.parametrize("size", [1.0, 1e-6])
@pytest.mark.parametrize("shape", [(128, 128), (200, 130), (3, 300), (256, 1)])
def test_blocks_and_their_scales(shape: tuple[int, int], size: float) -> None:
    torch.manual_seed(0)
    weight = size * torch.randn(shape) * torch.logspace(-4, 4, shape[0])[:, None]
    weight[:1] = 0.0
    numbers, scales = fp8.quantise(weight)
    assert numbers.dtype == torch.float8_e4m3fn
    assert scales.shape == fp8.scale_shape(shape)
    assert scales.dtype == torch.float32
    back = fp8.dequantise(numbers, scales, (slice(None),), shape)
    assert torch.equal(back, slow_dequantise(numbers, scales))
    limit = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[: shape[0], : shape[1]]
    assert ((back - weight).abs() <= torch.maximum(weight.abs() / 16, limit * 2**-10)).all()
    blocks = [part for rows in numbers.float().split(128) for part in rows.split(128, dim=1)]
    assert {float(block.abs().max()) for block in blocks} == {448.0}, "each block uses the whole range"
    for cut in ((slice(1, 3),), (slice(None), slice(0, 1)), (slice(2, 200), slice(100, 129))):
        part = fp8.dequantise(numbers[cut], scales, cut, shape)
        assert torch.equal(part, back[cut])


def test_a_block_of_zeros_stays_zero() -> None:
    numbers, scales = fp8.quantise(torch.zeros(130, 5))
    assert (scales == 1).all()
    assert (numbers.float() == 0).all()


@pytest.fixture
def released(moe_config: ModelConfig, build: Callable[..., CausalLM], tmp_path: Path) -> tuple[Path, dict]:
    """A folder as released in FP8, written by hand, and what its weights are worth."""
    folder = tmp_path / "fp8"
    save_hf(build(moe_config).bfloat16(), folder)
    stored, worth = {}, {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        worth[name] = stored[name] = tensor
        if "_proj.weight" in name:
            numbers, scales = fp8.quantise(tensor)
            scales = scales.bfloat16()  # as Qwen stores them
            stored |= {name: numbers, f"{name}_scale_inv": scales}
            worth[name] = slow_dequantise(numbers, scales)
    save_file(stored, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    quantised = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8"}
    config["quantization_config"] = {**quantised, "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, worth


def test_a_released_folder_is_read_block_by_block(released: tuple[Path, dict]) -> None:
    folder, worth = released
    config = ModelConfig.of_folder(folder)
    model, plain = CausalLM(config), CausalLM(config)
    load_hf(model, folder)
    (folder / "plain").mkdir()
    save_file({name: tensor.float() for name, tensor in worth.items()}, folder / "plain/model.safetensors")
    load_hf(plain, folder / "plain")
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)


def test_scales_that_are_missing_or_misshapen_are_named(released: tuple[Path, dict]) -> None:
    folder, _ = released
    config, stored = ModelConfig.of_folder(folder), load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight_scale_inv"
    others = {key: tensor for key, tensor in stored.items() if key != name}
    wrong = {f"1 missing: {name}": {}, f"1 misshapen: {name} [7, 1] instead": {name: torch.ones(7, 1)}}
    for message, instead in wrong.items():
        save_file(others | instead, folder / "model.safetensors")
        with pytest.raises(ConfigError, match="1 mis") as told:
            load_hf(CausalLM(config), folder)
        assert message in str(told.value)


@pytest.mark.parametrize(
    ("quantised", "named"),
    [
        ({"quant_method": "awq", "bits": 4}, "quantised (awq)"),
        ({"quant_method": "fp8"}, "only fp8 with blocks of 128 x 128"),
        ({"quant_method": "fp8", "weight_block_size": [64, 64]}, "only fp8 with blocks of 128 x 128"),
        ("nf4", "quantised (nf4)"),
    ],
)
def test_another_quantisation_is_refused_by_its_name(released, quantised: object, named: str) -> None:
    folder, _ = released
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantised}))
    with pytest.raises(ConfigError) as told:
        ModelConfig.of_folder(folder)
    assert named in str(told.value)
    assert "name the folder of the weights that were quantised" in str(told.value)


def test_an_adapter_is_refused_as_one(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match="holds an adapter, which is no model; merge it"):
        ModelConfig.of_folder(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_all_named(moe_config, build, tmp_path, value) -> None:
    save_hf(build(moe_config), tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    names = ["model.layers.0.mlp.experts.1.up_proj.weight", "model.norm.weight"]
    for name in names:
        stored[name].view(-1)[-1] = value
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="2 not finite: ") as told:
        load_hf(CausalLM(moe_config), tmp_path)
    assert all(name in str(told.value) for name in names)


def test_tables_of_old_exporters_are_no_weights(moe_config, build, tmp_path) -> None:
    save_hf(build(moe_config), tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    stored["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(stored, tmp_path / "model.safetensors")
    load_hf(CausalLM(moe_config), tmp_path)
