"""The whole model: documents, cache, recompute, statistics, and the tied head."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe.cache import Cache, CacheStep
from moe.config import ConfigError, ModelConfig
from moe.model import CausalLM

Build = Callable[..., CausalLM]
Pack = Callable[[list[list[int]]], dict[str, Tensor]]


def _error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def _gradients(model: CausalLM, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters, materialize_grads=True), strict=True))


@pytest.fixture(params=["dense", "next"])
def independent(request: pytest.FixtureRequest) -> ModelConfig:
    """Models without experts, whose sums over tokens of several documents are not equal bit for bit."""
    config = request.getfixturevalue(f"{request.param}_config")
    return replace(config, num_experts=0, shared_expert_intermediate_size=0, shared_expert_gate=False)


@pytest.mark.parametrize("changed", [0, 1, 2])
def test_a_document_knows_nothing_of_its_neighbours(
    independent: ModelConfig, build: Build, pack: Pack, changed: int
) -> None:
    """Other ids in one document change no bit of the logits and gradients of the other documents."""
    batch = pack([[5, 4, 7]])
    part = [slice(0, 5), slice(5, 9), slice(9, 16)][changed]
    other = dict(batch, input_ids=batch["input_ids"].clone())
    other["input_ids"][:, part] = (batch["input_ids"][:, part] + 1) % independent.vocab_size
    labels = batch["input_ids"].roll(-1, dims=1)
    labels[:, part] = -100
    model = build(independent)
    kept = torch.ones(16, dtype=torch.bool)
    kept[part] = False
    logits, logits_of_other = model(**batch).logits, model(**other).logits
    assert torch.equal(logits[:, kept], logits_of_other[:, kept])
    assert not torch.equal(logits[:, part], logits_of_other[:, part])
    gradients = _gradients(model, model(**batch, labels=labels).cross_entropy_sum)
    gradients_of_other = _gradients(model, model(**other, labels=labels).cross_entropy_sum)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, gradients_of_other[name]), name


def test_packed_equals_alone(config: ModelConfig, build: Build, pack: Pack) -> None:
    lengths = [5, 1, 4, 5]
    batch = pack([lengths])
    labels = batch["input_ids"].roll(-1, dims=1)
    model = build(config).double()  # so that the order of sums does not matter; routers stay fp32
    logits = model(**batch).logits.split(lengths, dim=1)
    gradients = _gradients(model, model(**batch, labels=labels).cross_entropy_sum)
    alone = {name: torch.zeros_like(gradient) for name, gradient in gradients.items()}
    ids = batch["input_ids"].split(lengths, dim=1)
    for document, packed, targets in zip(ids, logits, labels.split(lengths, dim=1), strict=True):
        single = dict(pack([[document.shape[1]]]), input_ids=document)
        assert _error(packed, model(**single).logits) < 1e-6
        for name, gradient in _gradients(model, model(**single, labels=targets).cross_entropy_sum).items():
            alone[name] += gradient
    for name, gradient in gradients.items():
        assert _error(gradient, alone[name]) < 1e-6, name


def test_rows_are_independent_of_their_place(config: ModelConfig, build: Build, pack: Pack) -> None:
    """Two rows of 8 tokens, and the same 16 tokens in one row, give the same logits."""
    rows, row = pack([[3, 5], [6, 2]]), pack([[3, 5, 6, 2]])
    model = build(config)
    assert _error(model(**rows).logits.flatten(0, 1), model(**row).logits[0]) < 1e-6


def test_loss_is_the_cross_entropy_of_the_logits(config: ModelConfig, build: Build, pack: Pack) -> None:
    batch = pack([[3, 5], [6, 2]])
    labels = batch["input_ids"].roll(-1, dims=1)
    labels[0, 2:5] = -100
    model = build(config)
    output, with_labels = model(**batch), model(**batch, labels=labels)
    assert output.cross_entropy_sum is None
    assert with_labels.logits is None
    expected = F.cross_entropy(output.logits.flatten(0, 1), labels.flatten(), reduction="sum")
    assert _error(with_labels.cross_entropy_sum, expected) < 1e-6
    ours, oracle = _gradients(model, with_labels.cross_entropy_sum), _gradients(model, expected)
    assert all(_error(ours[name], oracle[name]) < 1e-5 for name in ours)


def test_a_cache_continues_sequences_of_any_length(generating: ModelConfig, build: Build, pack: Pack) -> None:
    """Sequences begin, go on, end, and others take their rows: the logits are those of whole forwards."""
    model = build(generating).eval()
    lengths = [9, 2, 7, 9, 5]
    ids = pack([lengths])["input_ids"][0].split(lengths)
    cache = Cache(3)
    rows: list[list[int]] = []  # of each row of the cache: number of its sequence, tokens so far

    def check(step: CacheStep, new: list[list[int]]) -> None:
        tokens = torch.cat([ids[number][count - 1 : count] for number, count in new])
        if step.visible is None:
            tokens = torch.cat([ids[number][:count] for number, count in new])
        shape = (1, -1) if step.visible is None else (-1, 1)
        packed = tokens.view(shape), step.position.view(shape), step.documents.cu_seqlens
        logits = model(*packed, cache=step).logits
        assert len(logits) == len(new)
        for (number, count), found in zip(new, logits, strict=True):
            whole = dict(pack([[count]]), input_ids=ids[number][None, :count])
            assert _error(found, model(**whole).logits[0, -1]) < 1e-5, (number, count)

    def begin(*counts: tuple[int, int]) -> None:
        new = [list(one) for one in counts]
        rows.extend(new)
        check(cache.prefill([count for _, count in new]), new)

    def go_on(steps: int) -> None:
        for _ in range(steps):
            for row in rows:
                row[1] += 1
            check(cache.decode(), rows)

    def end(*places: int) -> None:
        rows[:] = [rows[place] for place in cache.drop(places)]
        assert cache.lengths == [count for _, count in rows]

    with torch.no_grad():
        begin((0, 5), (1, 1))  # shorter than the convolution of linear attention
        go_on(1)
        begin((2, 3))
        end(0, 1)
        begin((3, 6), (4, 2))
        go_on(2)
        end(0)
        assert [number for number, _ in rows] == [4, 3]
        begin((0, 7))
        go_on(1)
        end(2, 0)
        assert rows == [[3, 9]]


@pytest.mark.parametrize(
    ("recompute", "attention_runs", "dense_runs", "router_runs", "dispatch_runs"),
    [("none", 1, 1, 1, 1), ("experts", 1, 2, 1, 1), ("local", 2, 2, 2, 1), ("full", 2, 2, 2, 2)],
)
def test_recompute(
    config: ModelConfig,
    build: Build,
    pack: Pack,
    recompute: str,
    attention_runs: int,
    dense_runs: int,
    router_runs: int,
    dispatch_runs: int,
) -> None:
    """The same loss, gradients and statistics; and the configured parts run twice."""
    batch = pack([[3, 5], [6, 2]])
    labels = batch["input_ids"].roll(-1, dims=1)
    mixer = "linear_attn" if "linear_attention" in config.layer_types else "self_attn"
    expected_runs = {mixer: attention_runs, "mlp": dense_runs}
    if config.is_moe_layer(0):
        expected_runs = {mixer: attention_runs, "mlp.gate": router_runs, "mlp.experts": dispatch_runs}
    runs = dict.fromkeys(expected_runs, 0)

    def forward(model: CausalLM) -> tuple[Tensor, dict[str, Tensor], tuple[Tensor, ...]]:
        output = model(**batch, labels=labels)
        loss = output.cross_entropy_sum
        if output.router is not None:  # balance loss and z-loss go through the recomputed router
            loss = loss + output.router.probability_sums.square().sum() + output.router.z_sums.sum()
        return loss.detach(), _gradients(model, loss), output.router or ()

    def count(key: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            runs[key] += 1

        return hook

    expected = forward(build(config))
    model = build(config, recompute=recompute)
    for key in runs:
        model.model.layers[0].get_submodule(key).register_forward_pre_hook(count(key))
    actual = forward(model)
    assert runs == expected_runs
    assert torch.equal(actual[0], expected[0])
    for name in expected[1]:
        assert torch.equal(actual[1][name], expected[1][name]), name
    for mine, other in zip(actual[2][:5], expected[2][:5], strict=True):
        assert torch.equal(mine, other)


def test_router_statistics(moe_config: ModelConfig, build: Build, pack: Pack) -> None:
    """Stacked over the sparse layers; tokens outside token_mask are not counted, and no logit changes."""
    batch = pack([[3, 5], [6, 2]])
    token_mask = torch.ones(2, 8, dtype=torch.bool)
    token_mask[0, 3:] = False
    model = build(moe_config)
    everything, masked = model(**batch), model(**batch, token_mask=token_mask)
    assert torch.equal(everything.logits, masked.logits)
    assert masked.router.tokens_per_expert.shape == (2, 8)  # layers 0 and 2
    assert everything.router.tokens_per_expert.sum(1).tolist() == [16 * 2] * 2
    assert masked.router.tokens_per_expert.sum(1).tolist() == [11 * 2] * 2
    torch.testing.assert_close(masked.router.probability_sums.sum(1), torch.full((2,), 11.0))


def test_dense_model_has_no_router_statistics(dense_config: ModelConfig, build: Build, pack: Pack) -> None:
    assert build(dense_config)(**pack([[4]])).router is None


def test_tied_head_stays_tied(dense_config: ModelConfig) -> None:
    with torch.device("meta"):
        model = CausalLM(dense_config)
    model.to_empty(device="cpu")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.to(torch.bfloat16)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in dict(model.named_parameters())


def test_parameters_are_as_many_as_the_configuration_counts(config: ModelConfig) -> None:
    count = sum(parameter.numel() for parameter in CausalLM(config).parameters())
    assert count == config.num_parameters()
    config.attention_bias, config.tie_word_embeddings = not config.attention_bias, False
    count = sum(parameter.numel() for parameter in CausalLM(config).parameters())
    assert count == config.num_parameters()


def test_broken_configuration_is_refused(dense_config: ModelConfig) -> None:
    dense_config.head_dim = 7
    with pytest.raises(ConfigError) as error:
        CausalLM(dense_config, recompute="some")
    assert str(error.value).splitlines() == [
        "model.head_dim=7 must be even: rotary embeddings turn pairs",
        "recompute=some is unknown; use none, experts, local, full",
    ]
