"""Logits and every gradient against transformers in fp32; weights go through folders in both directions."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe.config import ModelConfig
from moe.formats import RopeScaling
from moe.hf import from_hub, load_hf, save_hf
from moe.init import init_weights
from moe.model import CausalLM
from moe.rope import rotary_tables

from .conftest import CASES

Check = Callable[[Tensor, Tensor, str], None]


@pytest.fixture
def ours(config: ModelConfig) -> CausalLM:
    return _random_model(config)


def _random_model(config: ModelConfig) -> CausalLM:
    """A model whose norms and biases are random too: their initial values would hide many mistakes."""
    model = CausalLM(config)
    init_weights(model, seed=0)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", "bias")):
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
            elif name.endswith("A_log"):
                parameter -= 5  # transformers loses digits in fp32 sums of strong decays; our sums are fp64
    return model


def _load_theirs(folder: Path) -> transformers.PreTrainedModel:
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    return model.train()


def test_logits_loss_and_gradients(
    ours: CausalLM, rows: Mapping[str, Tensor], tmp_path: Path, assert_close: Check
) -> None:
    save_hf(ours, tmp_path)
    theirs = _load_theirs(tmp_path)
    labels = rows["input_ids"].roll(-1, dims=1)
    labels[:, -1] = -100
    labels[1, :5] = -100

    logits = theirs(input_ids=rows["input_ids"]).logits
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    expected.backward()
    assert_close(ours(**rows).logits, logits, "logits")
    actual = ours(**rows, labels=labels).cross_entropy_sum
    actual.backward()
    assert_close(actual, expected, "cross entropy")

    parameters = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert_close(parameter.grad, parameters[name].grad, name)


def test_gradients_through_logits(
    ours: CausalLM, rows: Mapping[str, Tensor], tmp_path: Path, assert_close: Check
) -> None:
    save_hf(ours, tmp_path)
    theirs = _load_theirs(tmp_path)
    direction = torch.randn(*rows["input_ids"].shape, 97, generator=torch.Generator().manual_seed(3))
    (theirs(input_ids=rows["input_ids"]).logits * direction).sum().backward()
    (ours(**rows).logits * direction).sum().backward()
    parameters = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert_close(parameter.grad, parameters[name].grad, name)


def test_their_folder_loads(
    ours: CausalLM, config: ModelConfig, rows: Mapping[str, Tensor], tmp_path: Path, assert_close: Check
) -> None:
    save_hf(ours, tmp_path / "ours")
    theirs = _load_theirs(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    back = CausalLM(ModelConfig.from_hf(json.loads((tmp_path / "theirs" / "config.json").read_text())))
    load_hf(back, tmp_path / "theirs")
    assert back.config == _as_they_keep_it(config)
    for (name, mine), other in zip(ours.named_parameters(), back.parameters(), strict=True):
        assert torch.equal(mine, other), name
    assert torch.equal(ours(**rows).logits, back(**rows).logits)
    assert_close(back(**rows).logits, theirs(input_ids=rows["input_ids"]).logits, "logits")


def _as_they_keep_it(config: ModelConfig) -> ModelConfig:
    """The config as transformers keeps it: a dense config.json has no balance coefficient."""
    return config if config.num_experts else ModelConfig(**{**vars(config), "router_aux_loss_coef": 0.0})


def test_fused_and_sharded_folders_load(
    moe_or_dense: ModelConfig, rows: Mapping[str, Tensor], tmp_path: Path
) -> None:
    ours = _random_model(moe_or_dense)
    save_hf(ours, tmp_path / "shards", max_shard_bytes=30_000)
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    theirs = _load_theirs(tmp_path / "shards")
    in_memory = {
        name: tensor.contiguous()
        for name, tensor in theirs.state_dict().items()
        if not (moe_or_dense.tie_word_embeddings and name == "lm_head.weight")
    }
    (tmp_path / "fused").mkdir()
    save_file(in_memory, tmp_path / "fused" / "model.safetensors")
    assert any("gate_up_proj" in name for name in in_memory) == bool(moe_or_dense.num_experts)
    for kind in ("shards", "fused"):
        back = CausalLM(moe_or_dense)
        load_hf(back, tmp_path / kind)
        assert torch.equal(ours(**rows).logits, back(**rows).logits), kind


def test_we_name_tensors_as_they_do(moe_or_dense: ModelConfig, tmp_path: Path) -> None:
    save_hf(_random_model(moe_or_dense), tmp_path / "ours")
    _load_theirs(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    mine, their = (load_file(tmp_path / side / "model.safetensors") for side in ("ours", "theirs"))
    assert mine.keys() == their.keys()
    assert all(torch.equal(mine[name], their[name]) for name in mine)
    assert any(from_hub(name)[1] is not None for name in mine) == bool(moe_or_dense.num_experts)


@pytest.mark.parametrize("theta", [1e4, 1e6])
@pytest.mark.parametrize("factor", [None, 1.0, 4.0, 32.0])
def test_rotary_tables_of_long_contexts(theta: float, factor: float | None) -> None:
    """Equal bit for bit at positions up to a million, for several bases and YaRN factors."""
    scaling = None if factor is None else RopeScaling("yarn", factor, 32768)
    values = {**CASES["dense"], "head_dim": 128, "max_position_embeddings": 2**20}
    config = ModelConfig(**{**values, "rope_theta": theta, "rope_scaling": scaling})
    theirs = transformers.AutoConfig.for_model(**config.to_hf())
    rotary = transformers.models.qwen3.modeling_qwen3.Qwen3RotaryEmbedding(theirs)
    positions = torch.tensor([0, 1, 100, 4095, 32768, 131071, 2**20 - 1])
    expected = rotary(torch.zeros(1), positions.unsqueeze(0))
    for ours, table in zip(rotary_tables(positions, config, torch.float32), expected, strict=True):
        assert torch.equal(ours[:, 0], table[0, :, :64])
