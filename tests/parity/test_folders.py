"""Loading folders: what each rank reads, and upcycling of dense models without a change of the output."""

from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import Tensor

import moe.hf
from moe.config import ModelConfig
from moe.dispatch import LocalDispatcher
from moe.hf import hub_tensors, load_hf, save_hf
from moe.init import init_weights, upcycle_weights
from moe.model import CausalLM
from moe.parallelize import apply_expert_parallel
from moe.upcycle import upcycle_problems

from .conftest import CASES

DENSE = ModelConfig(**CASES["dense-tied-bias"])  # intermediate_size 80
MIXTURES = {
    "copy": {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 80},
    "split-2": {"num_experts": 12, "num_experts_per_tok": 4, "moe_intermediate_size": 40},
    "split-5": {"num_experts": 20, "num_experts_per_tok": 5, "moe_intermediate_size": 16},
    "split-4-all": {"num_experts": 4, "num_experts_per_tok": 4, "moe_intermediate_size": 20},
    "split-2-sparse": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 40,
        "mlp_only_layers": [1],
    },
}


def _part(config: ModelConfig, ep_rank: int, ep_size: int) -> CausalLM:
    model = CausalLM(config)
    apply_expert_parallel(model, ep_rank=ep_rank, ep_size=ep_size, dispatcher=LocalDispatcher())
    return model


@pytest.fixture
def dense(tmp_path: Path) -> tuple[CausalLM, Path]:
    """A dense model with weights so large that it is clearly nonlinear, and its folder."""
    model = CausalLM(DENSE)
    init_weights(model, seed=3)
    save_hf(model, tmp_path / "dense")
    return model, tmp_path / "dense"


def _upcycled(folder: Path, mixture: str, noise: float = 0.0, seed: int = 5) -> CausalLM:
    config = replace(DENSE, **MIXTURES[mixture])
    how = mixture.split("-")[0]
    assert upcycle_problems(DENSE, config, how) == []
    model = CausalLM(config)
    upcycle_weights(model, folder, seed=seed, noise=noise)
    return model


@pytest.mark.parametrize("mixture", MIXTURES)
def test_an_upcycled_model_computes_what_the_dense_one_does(
    dense: tuple[CausalLM, Path], rows: Mapping[str, Tensor], mixture: str
) -> None:
    model, folder = dense
    labels = rows["input_ids"].roll(-1, dims=1)
    expected = model(**rows, labels=labels).cross_entropy_sum
    upcycled = _upcycled(folder, mixture)
    output = upcycled(**rows, labels=labels)
    assert output.cross_entropy_sum.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(upcycled(**rows).logits, model(**rows).logits, rtol=1e-5, atol=1e-4)
    counts = output.router.tokens_per_expert
    if "all" not in mixture:
        assert (counts.std(dim=1) > 0).all(), "tokens must choose different experts"
    slices = DENSE.intermediate_size // upcycled.config.moe_intermediate_size
    assert torch.equal(counts[:, ::slices].repeat_interleave(slices, dim=1), counts), "chosen in groups"


def test_upcycled_experts_learn_apart(dense: tuple[CausalLM, Path], rows: Mapping[str, Tensor]) -> None:
    """Copies of one slice, and the router rows of one group, get different gradients."""
    upcycled = _upcycled(dense[1], "split-2")
    upcycled(**rows, labels=rows["input_ids"].roll(-1, dims=1)).cross_entropy_sum.backward()
    block = upcycled.model.layers[0].mlp
    for gradient in (block.experts.gate_up_proj.grad, block.experts.down_proj.grad, block.gate.weight.grad):
        gradients = gradient.flatten(1)
        distances = torch.cdist(gradients, gradients) / gradients.norm(dim=1).mean()
        assert distances[~torch.eye(12, dtype=torch.bool)].min() > 1e-2


@pytest.mark.parametrize("mixture", ["copy", "split-2"])
def test_upcycling_is_the_same_for_every_ep_size(dense: tuple[CausalLM, Path], mixture: str) -> None:
    whole = dict(_upcycled(dense[1], mixture, noise=0.1).named_parameters())
    config = replace(DENSE, **MIXTURES[mixture])
    for ep_size in (2, 3):
        for ep_rank in range(ep_size):
            part = _part(config, ep_rank, ep_size)
            upcycle_weights(part, dense[1], seed=5, noise=0.1, ep_rank=ep_rank)
            for name, parameter in part.named_parameters():
                expected = whole[name].chunk(ep_size)[ep_rank] if ".experts." in name else whole[name]
                assert torch.equal(parameter, expected), name


def test_noise_is_relative_and_on_experts_only(dense: tuple[CausalLM, Path]) -> None:
    clean, noisy = (dict(hub_tensors(_upcycled(dense[1], "split-2", noise))) for noise in (0.0, 0.1))
    for name, tensor in clean.items():
        if ".experts." in name:
            assert ((noisy[name] - tensor).std() / tensor.std()).item() == pytest.approx(0.1, rel=0.15), name
        else:
            assert torch.equal(noisy[name], tensor), name
    other = dict(hub_tensors(_upcycled(dense[1], "split-2", seed=6)))
    differing = {name for name in clean if not torch.equal(clean[name], other[name])}
    assert differing == {name for name in clean if name.endswith(".mlp.gate.weight")}


@pytest.mark.parametrize("fused", [False, True])
def test_a_rank_reads_its_slices_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fused: bool) -> None:
    """Each of two ranks reads the shared tensors and half of the experts from the files, and nothing else."""
    config = ModelConfig(**CASES["moe"])
    whole = CausalLM(config)
    init_weights(whole, seed=0)
    save_hf(whole, tmp_path, max_shard_bytes=30_000)
    if fused:
        _fuse(tmp_path)
    read: list[int] = []

    class Slice:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        def __getitem__(self, part: Any) -> Tensor:
            tensor = self.inner[part]
            read.append(tensor.nbytes)
            return tensor

    class Reader:
        def __init__(self, *arguments: Any, **options: Any) -> None:
            self.inner = safe_open(*arguments, **options)

        def __enter__(self) -> "Reader":
            self.inner.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self.inner.__exit__(*error)

        def keys(self) -> list[str]:
            return self.inner.keys()

        def get_slice(self, name: str) -> Slice:
            return Slice(self.inner.get_slice(name))

    monkeypatch.setattr(moe.hf, "safe_open", Reader)
    for ep_rank in range(2):
        read.clear()
        part = _part(config, ep_rank, 2)
        load_hf(part, tmp_path, ep_rank=ep_rank)
        assert sum(read) == sum(parameter.nbytes for parameter in part.parameters())
        experts = sum(parameter.nbytes for name, parameter in whole.named_parameters() if ".experts." in name)
        assert sum(read) == sum(parameter.nbytes for parameter in whole.parameters()) - experts // 2


def _fuse(folder: Path) -> None:
    """Rewrite the folder with the tensor names that transformers 5 uses in memory."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for path in (*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"):
        path.unlink()
    tensors = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}  # copies of tied weights
    assert any(name.endswith("experts.gate_up_proj") for name in tensors)
    moe.hf.save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("tied", "layout"), product([False, True], ["single", "sharded", "fused"]), ids=lambda value: str(value)
)
def test_every_kind_of_folder(rows: Mapping[str, Tensor], tmp_path: Path, tied: bool, layout: str) -> None:
    """Saved by transformers 5 with its own config.json keys, by us in shards, or with fused experts."""
    config = ModelConfig(**{**CASES["moe"], "tie_word_embeddings": tied})
    whole = CausalLM(config)
    init_weights(whole, seed=0)
    save_hf(whole, tmp_path / "ours", max_shard_bytes=30_000)
    folder = tmp_path / "ours"
    if layout == "single":
        folder = tmp_path / "theirs"
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
        theirs.save_pretrained(folder)
        assert "rope_parameters" in (folder / "config.json").read_text()
        assert not (folder / "model.safetensors.index.json").exists()
    elif layout == "fused":
        _fuse(folder)
    back = CausalLM(ModelConfig.of_folder(folder))
    load_hf(back, folder)
    assert back.config == config
    assert torch.equal(back(**rows).logits, whole(**rows).logits)
