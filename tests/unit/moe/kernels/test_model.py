"""Whole models with the kernels and without them."""

from dataclasses import replace

import pytest
import torch

from moe.kernels import support


def results(model, batch):
    """Loss, statistics and gradients."""
    output = model(**batch)
    loss, more = output.cross_entropy_sum, []
    if output.router is not None:
        more = [x.detach() for x in output.router.present()]
        experts = output.router.probability_sums.shape[1]
        direction = torch.linspace(-1, 1, experts, device=loss.device)
        loss = loss + (output.router.probability_sums * direction).sum() + output.router.z_sums.sum()
    if output.mtp_cross_entropy_sum is not None:
        loss = loss + output.mtp_cross_entropy_sum
    return [loss.detach(), *more, *torch.autograd.grad(loss, list(model.parameters()))]


@pytest.mark.parametrize("recompute", ["none", "experts", "local", "full"])
@pytest.mark.parametrize("kind", ["dense", "moe", "next", "mtp"])
def test_a_model_is_equal_with_and_without_kernels(device, kind, recompute, request, build, pack):
    if kind == "mtp":
        config = replace(request.getfixturevalue("moe_config"), num_nextn_predict_layers=1)
    else:
        config = request.getfixturevalue(f"{kind}_config")
    model = build(config, recompute=recompute).to(device)
    batch = {key: value.to(device) for key, value in pack([[5, 1, 6], [12]]).items()}
    labels = batch["input_ids"].roll(-1, 1).clone()
    labels[:, ::4] = -100
    mask = torch.ones_like(labels, dtype=torch.bool)
    mask[1, 9:] = False  # padding
    batch |= {"labels": labels, "token_mask": mask}
    fused = results(model, batch)
    with support.turned_off():
        expected = results(model, batch)
    for one, other in zip(fused, expected, strict=True):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()
