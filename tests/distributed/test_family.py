"""Every architecture under expert parallelism and ZeRO: equal to one process, and its golden losses."""

import pytest
from harness import run_ranks
from layouts import deviation, run_many, train_oracle

TOLERANCE = 1e-5
DENSE = ["model.num_experts=0", "model.router_aux_loss_coef=0", "balance.z_loss_coef=0"]
SHARED = "model.shared_expert_intermediate_size=24"
FAMILY = {
    "qwen2": ["model=tiny_qwen2", *DENSE],
    "qwen3": ["model=tiny_dense", *DENSE],
    "qwen2_moe": ["model=tiny_qwen2_moe", SHARED],
    "qwen3_moe": ["model=tiny_moe", "model.num_hidden_layers=3", "model.mlp_only_layers=[1]"],
    "shared_without_gate": ["model=tiny_moe", SHARED, "model.decoder_sparse_step=2"],
    "qwen3_next": [
        "model=tiny_qwen3_next",
        "model.layer_types=[linear_attention,full_attention]",
        "model.linear_key_head_dim=8",
        "model.linear_value_head_dim=12",
        SHARED,
    ],
}


@pytest.mark.parametrize("name", FAMILY)
def test_two_ranks_equal_the_oracle(name):
    """Against autograd in fp64 in one process, which knows nothing of DeepSpeed."""
    model = FAMILY[name]
    ep_size = 1 if DENSE[0] in model else 2
    layouts = [
        [
            f"deepspeed=zero{stage}",
            f"parallel.ep_size={ep_size}",
            "micro_batch_size=4",
            f"recompute={recompute}",
        ]
        for stage, recompute in [(2, "none"), (3, "full")]
    ]
    oracle = train_oracle(*model)
    for layout, outcome in zip(
        layouts, run_ranks(run_many, 2, [[*model, *one] for one in layouts])[0], strict=True
    ):
        worst = deviation(outcome, oracle)
        assert max(worst.values()) < TOLERANCE, (layout, worst)
