"""The mixture-of-experts block, which replaces the MLP of a dense layer."""

from torch import Tensor, nn

from moe.config import ModelConfig
from moe.dispatch import Dispatcher, LocalDispatcher
from moe.experts import Experts
from moe.mlp import MLP
from moe.recompute import call
from moe.router import PLAIN, Router, RouterStatistics, RoutingInputs, jittered, within_capacity

# B rows, S positions, H hidden


class MoEBlock(nn.Module):
    """Router, dispatcher, experts, and a shared expert (arXiv 2401.06066) if the configuration has one.

    It is built with all experts; `apply_expert_parallel` keeps those of one rank and the whole shared expert.
    `recompute` (`moe.recompute`): the backward computes experts and shared expert again ("experts"), or also
    the router ("local"); the tokens that reached the experts are kept.
    """

    def __init__(self, config: ModelConfig, backend: str, recompute: str = "none") -> None:
        super().__init__()
        self.recompute = recompute
        self.gate = Router(
            config.hidden_size, config.num_experts, config.num_experts_per_tok, config.norm_topk_prob
        )
        sizes = (config.num_experts, config.hidden_size, config.moe_intermediate_size)
        self.experts = Experts(*sizes, backend, recompute=recompute in ("experts", "local"))
        self.dispatcher: Dispatcher = LocalDispatcher()
        shared = config.shared_expert_intermediate_size
        self.shared_expert = MLP(config.hidden_size, shared) if shared else None
        self.shared_expert_gate = (
            nn.Linear(config.hidden_size, 1, bias=False) if config.shared_expert_gate else None
        )

    def forward(self, hidden: Tensor, routing: RoutingInputs = PLAIN) -> tuple[Tensor, RouterStatistics]:
        """hidden [B,S,H] and the routing inputs of this layer -> [B,S,H] and the router's statistics."""
        x, training = hidden.flatten(0, 1), routing.training
        mask = None if routing.token_mask is None else routing.token_mask.flatten()
        seen = x
        if training is not None and training.jitter_noise:
            seen = jittered(hidden, training.jitter_noise, training.keys).flatten(0, 1)
        inputs = (seen, mask, routing.selection_bias, routing.sampled)
        routing_weights, expert_indices, statistics = call(
            self.gate, *inputs, recompute=self.recompute == "local"
        )
        if routing.keep_experts:
            statistics = statistics._replace(expert_indices=expert_indices)
        factor = None if training is None else training.capacity_factor
        if factor is not None:
            num_experts = len(statistics.tokens_per_expert)
            expert_indices = within_capacity(routing_weights, expert_indices, num_experts, factor, mask)
        y = self.dispatcher(x, routing_weights, expert_indices, self.experts, drops=factor is not None)
        y = y.view_as(hidden)
        if self.shared_expert is not None:
            shared = call(self.shared_expert, hidden, recompute=self.experts.recompute)
            gate = self.shared_expert_gate
            y = y + (shared if gate is None else gate(hidden).sigmoid() * shared)
        return y, statistics
