"""Laws for turning a dense model into a mixture of experts with the same output (arXiv 2410.07524).

Expert e is slice e % G of the dense MLP's intermediate dimension: G = 1 copies the MLP, more slices make
fine-grained experts. Routers are drawn at random, one row for each virtual group of G consecutive experts:
the experts of a group are selected together, each with 1 / G of the group's weight. Because down projections
are multiplied by G, the selected groups add up to the dense MLP whatever the router selects.
`moe.init.upcycle_weights` fills the weights.
"""

from moe.config import ModelConfig


def upcycle_problems(dense: ModelConfig, model: ModelConfig, how: str) -> list[str]:
    """Why `dense` cannot become `model` with the same output, one line per law; `how` is copy or split."""
    width, size = dense.intermediate_size, model.moe_intermediate_size
    slices = max(width // max(size, 1), 1)
    fits = size == width if how == "copy" else 0 < size < width and width % size == 0
    to_be = f"to be {'' if how == 'copy' else 'a proper divisor of '}intermediate_size={width}"
    laws = [
        (dense.num_experts == 0, f"a dense stage.init_from, but it has num_experts={dense.num_experts}"),
        (model.num_experts > 0, f"model.num_experts={model.num_experts} to be above 0"),
        (model.norm_topk_prob, "model.norm_topk_prob=true; only weights that sum to 1 keep the output"),
        (fits, f"model.moe_intermediate_size={size} {to_be} of stage.init_from"),
    ]
    for key in ("num_experts", "num_experts_per_tok"):
        law = f"model.{key}={getattr(model, key)} to be a multiple of {slices}, the slices of the dense MLP"
        law += f" at model.moe_intermediate_size={size}"
        laws.append((not fits or getattr(model, key) % slices == 0, law))
    return [f"init.upcycle={how} needs {law}" for holds, law in laws if not holds]
