"""Text is generated with the selection bias and the dtype of the trained model."""

import pytest
import torch

from moe.hf import save_hf
from moe.init import init_weights
from moe.model import CausalLM
from trainer.checkpoints.weights import load_model, selection_bias
from trainer.generate import generate


def test_a_run_that_was_balanced_by_a_bias_generates_with_it(run_config, tmp_path):
    config = run_config("model=tiny_moe", "model.vocab_size=64", "model.num_hidden_layers=2").model
    model = CausalLM(config).eval()
    init_weights(model, 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(20 if ".experts." in name else 1)  # so that it matters which experts are chosen
    torch.manual_seed(0)
    bias = 10 * torch.randn(config.num_moe_layers, config.num_experts)
    cpu, prompt = torch.device("cpu"), [1, 2, 3]
    assert selection_bias(tmp_path / "hf", cpu) is None, "a hub folder has no bias"
    torch.save({"prior": bias, "bias": bias}, tmp_path / "balance.pt")
    found = selection_bias(tmp_path / "hf", cpu)
    rows = torch.tensor([prompt]), torch.arange(3)[None], torch.tensor([0, 3], dtype=torch.int32)
    with torch.no_grad():
        expected, other = (model(*rows, selection_bias=b).logits[0, -1].argmax().item() for b in (bias, None))
    assert next(generate(model, prompt, 1, 0.0, None, found)) == expected
    assert next(generate(model, prompt, 1, 0.0, None, None)) == other != expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_is_loaded_in_the_dtype_of_its_folder(run_config, tmp_path, monkeypatch, dtype):
    model = CausalLM(run_config("model=tiny_moe", "model.vocab_size=64").model).to(dtype)
    init_weights(model, 0)
    save_hf(model, tmp_path)
    taken = set()
    to_empty = CausalLM.to_empty

    def recording(self, **keywords):
        taken.update(parameter.dtype for parameter in self.parameters())
        return to_empty(self, **keywords)

    monkeypatch.setattr(CausalLM, "to_empty", recording)
    back = load_model(tmp_path, torch.device("cpu"))
    assert taken == {dtype}
    assert all(torch.equal(*pair) for pair in zip(back.parameters(), model.parameters(), strict=True))
