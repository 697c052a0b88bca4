"""A dense model becomes a mixture of experts that computes the same (arXiv 2410.07524); torch-free laws.

Expert e is slice e % G of the dense MLP's intermediate dimension: G = 1 copies the MLP, more slices make
fine-grained experts. Routers are drawn anew, a row for each virtual group of G consecutive experts, which are
thus chosen together and weigh the same: 1 / G of what their group weighs. With down projections times G, the
groups add up to the dense MLP whatever the router says. `moe.init.upcycle_weights` does it.
"""

from moe.config import ModelConfig


def upcycle_problems(dense: ModelConfig, model: ModelConfig, how: str) -> list[str]:
    """What keeps a dense model from becoming `model` with the same output."""
    if dense.num_experts or not model.num_experts or model.moe_intermediate_size <= 0:
        return [
            f"init.upcycle={how} makes a mixture of a dense model, but stage.init_from has num_experts="
            f"{dense.num_experts} and model.num_experts={model.num_experts}; use init.upcycle=none"
        ]
    found = []
    width, size = dense.intermediate_size, model.moe_intermediate_size
    if not model.norm_topk_prob:
        found.append(
            f"init.upcycle={how} needs model.norm_topk_prob=true; only weights that sum to 1 keep the output"
        )
    if how == "copy" and size != width:
        found.append(
            f"init.upcycle=copy needs model.moe_intermediate_size={size} to equal intermediate_size={width} "
            f"of stage.init_from; set it so, or use init.upcycle=split"
        )
    elif how == "split" and (width % size or width == size):
        found.append(
            f"init.upcycle=split needs model.moe_intermediate_size={size} to be a proper divisor of "
            f"intermediate_size={width} of stage.init_from, such as {width // 2}"
        )
    elif how == "split":
        found += [
            f"init.upcycle=split cuts the dense MLP into {width // size} slices (intermediate_size={width} / "
            f"model.moe_intermediate_size={size}), which does not divide model.{key}={getattr(model, key)}; "
            f"use a multiple of {width // size}"
            for key in ("num_experts", "num_experts_per_tok")
            if getattr(model, key) % (width // size)
        ]
    return found
