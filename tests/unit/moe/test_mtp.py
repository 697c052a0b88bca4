"""Multi-token prediction against the formula of arXiv 2412.19437, section 2.2, document by document."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moe.config import ConfigError, ModelConfig
from moe.documents import Documents
from moe.hf import hub_tensors, load_hf, save_hf
from moe.inputs import LayerInputs
from moe.model import CausalLM
from moe.rope import rotary_tables

Build = Callable[..., CausalLM]
Pack = Callable[[list[list[int]]], dict[str, Tensor]]
ROWS = [[5, 1, 2, 8], [3, 13]]


@pytest.fixture
def ahead(config: ModelConfig) -> ModelConfig:
    """Each kind of model with multi-token prediction."""
    return replace(config, num_nextn_predict_layers=1)


def shifted(batch: dict[str, Tensor]) -> Tensor:
    """Next-token labels, also across the borders of documents; one of them is masked."""
    labels = batch["input_ids"].flatten().roll(-1).view_as(batch["input_ids"]).clone()
    labels[0, 9] = -100
    return labels


def slow_loss(model: CausalLM, batch: dict[str, Tensor], labels: Tensor) -> Tensor:
    """Summed cross entropy of the token after next, one document at a time; masked labels do not count."""
    mtp, total = model.mtp, torch.zeros((), dtype=torch.float64)
    documents = Documents(batch["cu_seqlens"])
    rotary = rotary_tables(batch["position_ids"].flatten(), model.config, torch.float64)
    embedded = model.model.embed_tokens(batch["input_ids"])
    hidden, _ = model.model(embedded, LayerInputs(rotary, documents))
    ids, targets, states = batch["input_ids"].flatten(), labels.flatten(), hidden.flatten(0, 1)
    for start, stop in pairwise(batch["cu_seqlens"].tolist()):
        following = torch.cat([ids[start + 1 : stop], ids[stop - 1 : stop]])  # the last entry is not used
        after = mtp.pre_fc_norm_embedding(model.model.embed_tokens.weight[following])
        both = torch.cat([after, mtp.pre_fc_norm_hidden(states[start:stop])], dim=-1)
        alone = Documents(torch.tensor([0, stop - start], dtype=torch.int32))
        rotary = rotary_tables(torch.arange(stop - start), model.config, hidden.dtype)
        out, _ = mtp.layers[0]((both @ mtp.fc.weight.T)[None], LayerInputs(rotary, alone))
        logits = mtp.norm(out)[0] @ model.lm_head.weight.T
        for place in range(stop - start - 2):
            if (target := targets[start + place + 1]) != -100:
                total = total - logits[place].log_softmax(-1)[target]
    return total


def test_loss_and_gradients(ahead: ModelConfig, build: Build, pack: Pack) -> None:
    batch, model = pack(ROWS), build(ahead).double()
    labels = shifted(batch)
    output, expected = model(**batch, labels=labels), slow_loss(model, batch, labels)
    torch.testing.assert_close(output.mtp_cross_entropy_sum, expected, rtol=1e-6, atol=0)
    parameters = dict(model.named_parameters())
    ours, slow = (
        torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
        for loss in (output.mtp_cross_entropy_sum, expected)
    )
    assert all(gradient.any() for name, gradient in zip(parameters, ours, strict=True) if "mtp." in name)
    for name, mine, other in zip(parameters, ours, slow, strict=True):
        assert (mine - other).abs().max() <= 1e-5 * other.abs().max(), name


def test_the_model_itself_stays_as_it_is(ahead: ModelConfig, build: Build, pack: Pack) -> None:
    """The next-token loss and routing stay the same; evaluation skips multi-token prediction."""
    batch = pack(ROWS)
    labels = shifted(batch)
    plain = build(replace(ahead, num_nextn_predict_layers=0))(**batch, labels=labels)
    model = build(ahead)
    train, evaluated = model(**batch, labels=labels), model.eval()(**batch, labels=labels)
    assert plain.mtp_cross_entropy_sum is evaluated.mtp_cross_entropy_sum is None
    assert torch.equal(train.cross_entropy_sum, plain.cross_entropy_sum)
    assert torch.equal(evaluated.cross_entropy_sum, plain.cross_entropy_sum)
    if ahead.num_experts:
        assert len(train.router.z_sums) == ahead.num_moe_layers == len(plain.router.z_sums) + 1
        for mine, other, third in zip(
            *(of.router.present() for of in (train, plain, evaluated)), strict=True
        ):
            assert torch.equal(mine[:-1], other)
            assert torch.equal(third, other)
        only = model.train()(**batch, routing_only=True)
        assert torch.equal(only.router.tokens_per_expert, train.router.tokens_per_expert)


def test_parameters_are_as_many_as_the_configuration_counts(ahead: ModelConfig) -> None:
    assert sum(parameter.numel() for parameter in CausalLM(ahead).parameters()) == ahead.num_parameters()


def test_folders(next_config: ModelConfig, build: Build, tmp_path: Path) -> None:
    """Tensors have the names of released folders; a model without multi-token prediction skips them."""
    ahead = replace(next_config, num_nextn_predict_layers=1)
    model = build(ahead)
    save_hf(model, tmp_path / "with")
    names = {name for name, _ in hub_tensors(model) if name.startswith("mtp.")}
    assert {"mtp.fc.weight", "mtp.norm.weight", "mtp.pre_fc_norm_hidden.weight"} <= names
    assert {"mtp.layers.0.self_attn.q_proj.weight", "mtp.layers.0.mlp.experts.7.up_proj.weight"} <= names
    assert ModelConfig.of_folder(tmp_path / "with") == ahead
    back, plain = CausalLM(ahead), CausalLM(next_config)
    load_hf(back, tmp_path / "with")
    load_hf(plain, tmp_path / "with")
    theirs = dict(model.named_parameters())
    for name, parameter in [*back.named_parameters(), *plain.named_parameters()]:
        assert torch.equal(parameter, theirs[name]), name
    save_hf(plain, tmp_path / "without")
    with pytest.raises(ConfigError, match=r"missing: mtp.pre_fc_norm_embedding.weight, .*mtp.fc.weight"):
        load_hf(back, tmp_path / "without")
