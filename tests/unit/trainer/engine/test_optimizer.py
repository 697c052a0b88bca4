"""Which parameters decay, and the learning rate: a pure function of the step that ends where it should."""

from itertools import pairwise

import pytest

from moe.model import CausalLM
from trainer.engine.optimizer import KINDS, build_optimizer, learning_rate
from trainer.settings.config import ScheduleConfig

TOTAL = 100
ADAM = ("optimizer.betas=[0.8,0.7]", "optimizer.eps=1e-3")


def rates(kind: str, warmup: int, decay: float, minimum: float) -> list[float]:
    config = ScheduleConfig(kind=kind, warmup_steps=warmup, decay_fraction=decay, min_lr_ratio=minimum)
    return [learning_rate(config, 2.0, step, TOTAL) for step in range(TOTAL)]


def test_warmup_is_linear_and_starts_above_zero():
    assert rates("constant", 4, 0.0, 1.0)[:5] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])


def test_constant_never_decays():
    assert set(rates("constant", 4, 0.5, 0.0)[3:]) == {2.0}


def test_cosine_falls_from_the_peak_to_the_minimum():
    values = rates("cosine", 10, 1.0, 0.1)
    assert values[9] == 2.0
    assert values[-1] == pytest.approx(0.2)
    assert values[54] == pytest.approx((2.0 + 0.2) / 2)  # halfway through the 90 steps of decay
    assert all(a > b for a, b in pairwise(values[9:]))


def test_wsd_is_flat_and_then_a_line():
    values = rates("wsd", 10, 0.2, 0.0)
    assert set(values[9:80]) == {2.0}
    steps = [a - b for a, b in pairwise(values[79:])]
    assert steps == pytest.approx([2.0 / 20] * 20)
    assert values[-1] == 0.0


def test_a_decay_longer_than_the_run_starts_after_the_warmup():
    assert rates("wsd", 50, 0.9, 0.0)[50] == pytest.approx(2.0 * 49 / 50)


def decayed(model: CausalLM, optimizer) -> set[str]:
    """Names of the parameters on which weight decay acts, without their layer."""
    groups = [group for group in optimizer.param_groups if group["weight_decay"]]
    assert all(group["weight_decay"] == 0.1 for group in groups)
    found = {id(parameter) for group in groups for parameter in group["params"]}
    return {name for name, parameter in model.named_parameters() if id(parameter) in found}


@pytest.mark.parametrize("model", ["tiny_moe", "tiny_qwen2_moe", "tiny_qwen3_next"])
def test_decay_acts_on_matrices_except_embeddings_and_on_zero_centred_norms_of_heads(model, run_config):
    small = ("model.hidden_size=32", "model.vocab_size=64", "model.moe_intermediate_size=8")
    config = run_config(f"model={model}", *small, "optimizer.weight_decay=0.1")
    built = CausalLM(config.model)
    every = dict(built.named_parameters())
    matrices = {name for name, parameter in every.items() if parameter.ndim > 1}
    expected = matrices - {"model.embed_tokens.weight"}
    if model == "tiny_qwen3_next":
        expected |= {name for name in every if name.endswith(("q_norm.weight", "k_norm.weight"))}
    assert decayed(built, build_optimizer(built, config.optimizer)) == expected
    assert expected < set(every), "biases and norms do not decay"


def test_groups_hold_one_kind_and_experts_of_a_group_are_apart(run_config):
    small = ("model.hidden_size=32", "model.vocab_size=64", "model.moe_intermediate_size=8")
    config = run_config("model=tiny_qwen3_next", "model.tie_word_embeddings=false", *small, *ADAM)
    built = CausalLM(config.model)
    names = {id(parameter): name for name, parameter in built.named_parameters()}
    for name, parameter in built.named_parameters():
        if ".mlp.experts." in name:
            parameter.group_name = "ep_size_2"
    optimizer = build_optimizer(built, config.optimizer)
    assert (optimizer.defaults["betas"], optimizer.defaults["eps"]) == ((0.8, 0.7), 1e-3)
    kinds = {kind: set() for kind in KINDS}
    for group in optimizer.param_groups:
        assert group["lr"] == 0, "DeepSpeed takes a step during its set-up"
        kinds[group["kind"]] |= {names[id(parameter)] for parameter in group["params"]}
        assert (group.get("moe", False), group["name"] == "ep_size_2") == (group["kind"] == "experts",) * 2
    by_hand = {
        "experts": {name for name in names.values() if ".mlp.experts." in name},
        "router": {name for name in names.values() if name.endswith(".mlp.gate.weight")},
        "attention": {name for name in names.values() if ".self_attn." in name or ".linear_attn." in name},
        "embedding": {"model.embed_tokens.weight", "lm_head.weight"},
    }
    by_hand["other"] = set(names.values()) - set().union(*by_hand.values())
    assert kinds == by_hand
    assert all(kinds.values()), "the model has parameters of every kind"


def test_a_cosine_is_halfway_where_wsd_is_but_not_at_a_quarter():
    """After a quarter of the decay a cosine leaves (1 + cos(pi / 4)) / 2 of the rate, wsd three quarters."""
    cosine, linear = rates("cosine", 0, 1.0, 0.0), rates("wsd", 0, 1.0, 0.0)
    assert cosine[24] == pytest.approx(2.0 * 0.8535533905932737)
    assert linear[24] == pytest.approx(2.0 * 0.75)
    assert cosine[49] == pytest.approx(1.0)
