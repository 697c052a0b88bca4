"""A dense model becomes a mixture of experts that computes the same (arXiv 2410.07524); torch-free laws.

Expert e is slice e % G of the dense MLP's intermediate dimension: G = 1 copies the MLP, more slices make
fine-grained experts. Routers are drawn anew, a row for each virtual group of G consecutive experts, which are
thus chosen together and weigh the same: 1 / G of what their group weighs. With down projections times G, the
groups add up to the dense MLP whatever the router says. `moe.init.upcycle_weights` does it.
"""

from moe.config import ModelConfig


def upcycle_problems(dense: ModelConfig, model: ModelConfig, how: str) -> list[str]:
    """What keeps a dense model from becoming `model` with the same output; `how` is copy or split."""
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
        laws.append((not fits or getattr(model, key) % slices == 0, law))
    return [f"init.upcycle={how} needs {law}" for holds, law in laws if not holds]
