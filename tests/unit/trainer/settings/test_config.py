"""All broken laws of a run are reported at once, with key, value and remedy."""

import json

import pytest
from omegaconf import OmegaConf

from moe.config import ConfigError
from trainer.settings.config import RunConfig


def broken(config: RunConfig, world_size: int = 1) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        config.check(world_size)
    return caught.value.problems


def test_a_sound_run_passes(run_config):
    config = run_config("experiment=demo")
    config.check(2)


def test_unknown_missing_and_mistyped_keys_come_together(composed):
    cfg = composed()
    OmegaConf.set_struct(cfg, False)
    cfg.optimizer.learning_rate = 1
    cfg.stage.seq_len = "long"
    cfg.seed = "???"
    with pytest.raises(ConfigError) as caught:
        RunConfig.load(cfg)
    text = str(caught.value)
    assert "optimizer.learning_rate is unknown" in text
    assert "stage.seq_len=long must be of type int" in text
    assert "seed has no value" in text


def test_an_unknown_key_names_its_neighbour(composed):
    cfg = composed()
    OmegaConf.set_struct(cfg, False)
    cfg.balance.z_loss_coeff = 0.1
    with pytest.raises(ConfigError, match=r"balance.z_loss_coeff is unknown \(did you mean z_loss_coef\?\)"):
        RunConfig.load(cfg)


def test_laws_come_together(run_config):
    config = run_config(
        "dtype=fp8",
        "schedule.kind=linear",
        "optimizer.lr=-1",
        "parallel.ep_size=3",
        "optimizer.betas=[0.9,1.5]",
    )
    found = "\n".join(broken(config, world_size=4))
    assert "dtype=fp8 is unknown; use fp32, bf16" in found
    assert "schedule.kind=linear" in found
    assert "optimizer.lr=-1.0 must be above 0" in found
    assert "parallel.ep_size=3 does not divide the 4 ranks; use 1, 2, 4" in found
    assert "parallel.ep_size=3 does not divide model.num_experts=128; use 1, 2, 4, 8, 16" in found
    assert "optimizer.betas[1]=1.5" in found


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "stage.global_batch_size=6",
            "stage.global_batch_size=6 is not a multiple of 4 ranks x micro_batch_size=1",
        ),
        ("stage.seq_len=8192", "stage.seq_len=8192 exceeds model.max_position_embeddings=4096"),
        ("stage.init_from=/no/such", "stage.init_from=/no/such is not a folder"),
        ("name=../elsewhere", "name='../elsewhere' must be a relative path"),
        ("+deepspeed.gradient_clipping=1.0", "deepspeed.gradient_clipping is set by optimizer.max_grad_norm"),
        ("+deepspeed.zero_optimisation={}", r"(did you mean zero_optimization?)"),
        ("deepspeed.zero_optimization.stage=4", "deepspeed.zero_optimization.stage=4 is unknown"),
        (
            ["experts.backend=grouped", "model.hidden_size=100"],
            "model.hidden_size=100 is not a multiple of 8",
        ),
        ("checkpoint.keep_every_steps=-1", "checkpoint.keep_every_steps=-1 is below 0"),
        (
            "+deepspeed.zero_optimization.offload_optimizer.device=nvme",
            "offload_optimizer: checkpoints need optimizer states in memory",
        ),
        (
            ["deepspeed=zero0", "+deepspeed.zero_optimization.offload_optimizer.device=cpu"],
            "offload_optimizer.device=cpu needs ZeRO 1, 2 or 3",
        ),
        (
            ["+deepspeed.zero_optimization.offload_optimizer={device:cpu,nvme_path:/scratch}"],
            "offload_optimizer.nvme_path=/scratch contradicts device=cpu",
        ),
        (
            [
                "+deepspeed.zero_optimization.offload_optimizer.device=cpu",
                "+deepspeed.zero_force_ds_cpu_optimizer=true",
            ],
            "zero_force_ds_cpu_optimizer=true contradicts offload_optimizer",
        ),
        (
            ["deepspeed=zero3", "+deepspeed.zero_optimization.offload_param.device=cpu"],
            "offload_param is not supported",
        ),
        ("+deepspeed.communication_data_type=bf16", "communication_data_type=bf16 has an effect only with"),
        ("experts.capacity_factor=0", "experts.capacity_factor=0.0 must be above 0; null drops nothing"),
        ("experts.router_jitter_noise=-0.1", "experts.router_jitter_noise=-0.1 is outside 0 to 1"),
        ("init.router_scale=-1", "init.router_scale=-1.0 is below 0"),
        ("mtp_loss_scaling_factor=-1", "mtp_loss_scaling_factor=-1.0 is below 0"),
        ("parallel.dispatch_chunks=0", "parallel.dispatch_chunks=0"),
        ("device=cuda:1", "device=cuda:1 is unknown; use auto, cuda, cpu"),
        (
            ["experts.backend=liger", "deterministic=true"],
            "experts.backend=liger: its kernels promise no equal bits, as deterministic=true wants; use auto",
        ),
        (
            ["experts.backend=megablocks", "device=cpu"],
            "experts.backend=megablocks: its Triton kernels need a CUDA device, not device=cpu; use auto",
        ),
        ("parallel.dispatcher=magic", "parallel.dispatcher=magic is unknown"),
    ],
)
def test_each_law(run_config, override, message):
    overrides = [override] if isinstance(override, str) else override
    found = broken(run_config("stage.global_batch_size=8", *overrides), world_size=4)
    assert any(message in line for line in found), found
    assert len(found) == 1, "one mistake must give one line"


def test_a_dense_model_routes_nothing(run_config):
    found = broken(
        run_config(
            *("model=tiny_dense", "parallel.ep_size=1", "balance.z_loss_coef=0.1"),
            *("experts.capacity_factor=1.5", "experts.router_jitter_noise=0.1"),
        )
    )
    needs = "needs experts, but model.num_experts=0; use"
    assert found == [
        f"balance.z_loss_coef=0.1 {needs} 0",
        f"experts.router_jitter_noise=0.1 {needs} 0",
        f"experts.capacity_factor=1.5 {needs} null",
    ]


def test_equal_values_have_remedies_of_their_own(run_config):
    equal = ("balance.z_loss_coef=1.5", "experts.capacity_factor=1.5")
    found = broken(run_config("model=tiny_dense", "parallel.ep_size=1", *equal))
    assert [line.rsplit(maxsplit=1)[1] for line in found] == ["0", "null"]


def test_steps_cover_the_token_budget(run_config):
    stage = run_config("stage.seq_len=100", "stage.global_batch_size=10", "stage.train_tokens=2001").stage
    assert (stage.step_tokens, stage.total_steps) == (1000, 3)


def test_dense_models_have_no_expert_parallelism(run_config):
    found = broken(run_config("model=tiny_dense", "parallel.ep_size=2"), world_size=2)
    assert any("needs experts" in line for line in found)


def test_expert_groups_across_nodes_are_found(run_config):
    plan = run_config("parallel.ep_size=4", "stage.global_batch_size=8").plan(8)
    assert plan.groups_across_nodes(["a"] * 4 + ["b"] * 4) == []
    assert plan.groups_across_nodes(["a"] * 6 + ["b"] * 2) == ["ranks 4-7 on a, b"]
    assert [plan.ep_rank(rank) for rank in range(8)] == [0, 1, 2, 3, 0, 1, 2, 3], (
        "groups are consecutive ranks"
    )


UPCYCLE = {
    "model.num_experts": 8,
    "model.num_experts_per_tok": 4,
    "model.moe_intermediate_size": 192,
    "init.upcycle": "split",
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        ({"init.upcycle": "copy", "model.moe_intermediate_size": 384}, None),
        ({"init.upcycle": "clone"}, "init.upcycle=clone is unknown; use none, copy, split"),
        (
            {"init.upcycle": "none"},
            "num_experts=0, but model.num_experts=8; set the same (a dense model becomes",
        ),
        ({"init.upcycle_noise": -0.1}, "init.upcycle_noise=-0.1 is below 0"),
        ({"model.norm_topk_prob": "false"}, "init.upcycle=split needs model.norm_topk_prob=true"),
        (
            {"init.upcycle": "copy"},
            "needs model.moe_intermediate_size=192 to be intermediate_size=384 of stage",
        ),
        ({"model.moe_intermediate_size": 384}, "=384 to be a proper divisor of intermediate_size=384"),
        ({"model.moe_intermediate_size": 100}, "=100 to be a proper divisor of intermediate_size=384"),
        (
            {"model.num_experts_per_tok": 3},
            "needs model.num_experts_per_tok=3 to be a multiple of 2, the slices",
        ),
        ({"model.num_experts": 9}, "needs model.num_experts=9 to be a multiple of 2, the slices"),
        ({"model.intermediate_size": 100}, None),  # no layer uses it
        (
            {"model.mlp_only_layers": "[0]", "model.intermediate_size": 100},
            "has intermediate_size=384, but model.intermediate_size=100; set the same",
        ),
        ({"model.hidden_size": 64}, "has hidden_size=128, but model.hidden_size=64; set the same"),
        ({"stage.init_from": "null"}, "init.upcycle=split needs stage.init_from, a dense folder"),
        ({"model": "tiny_dense", "model.num_experts": 0}, "needs model.num_experts=0 to be above 0"),
    ],
)
def test_laws_of_upcycling(run_config, tmp_path, changes, message):
    dense = run_config("model=tiny_dense").model
    (tmp_path / "config.json").write_text(json.dumps(dense.to_hf()))
    values = {"stage.init_from": str(tmp_path), **UPCYCLE, **changes}
    config = run_config(*(f"{key}={value}" for key, value in values.items()))
    if message is None:
        config.check(1)
    else:
        assert message in "\n".join(broken(config))


def test_a_run_may_be_called_nan(composed):
    """The command line takes the word for a number, which the key's type turns back into text."""
    assert RunConfig.load(composed("name=nan", "tracker.project=.inf")).name == "nan"
