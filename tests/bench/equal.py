"""Prints how far our loss and gradients are from transformers' on the reference work."""

import json
import tempfile
from pathlib import Path

import torch
from transformers import Qwen3MoeForCausalLM
from work import Work

from moe.balance import balance_loss_share, expert_frequencies
from moe.config import ModelConfig
from moe.hf import hub_tensors, save_hf
from moe.init import init_weights
from moe.model import CausalLM
from trainer.engine.cpu_products import fast_products

BATCHES = 8


def main() -> None:
    """Cross entropy + 0.001 x balance loss per layer; transformers' router logits give the peer's balance."""
    work = Work(dtype="fp32")
    model = CausalLM(ModelConfig.from_hf({"model_type": "qwen3_moe", **work.model_keys()}))
    init_weights(model, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        save_hf(model, Path(folder))
        peer = Qwen3MoeForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for number in range(BATCHES):
        loss, peer_loss, same_choices = losses(model, peer, work, number)
        if same_choices:
            break
    assert same_choices, f"in each of {BATCHES} batches some token goes to other experts"
    loss.backward()
    peer_loss.backward()

    gradients = CausalLM(model.config)  # names our gradients
    for target, source in zip(gradients.parameters(), model.parameters(), strict=True):
        target.data = source.grad
    ours = dict(hub_tensors(gradients))
    worst = 0.0
    for name, gradient in peer_gradients(peer).items():
        worst = max(worst, float((ours[name] - gradient).norm() / gradient.norm()))
    difference = abs(float(loss.detach()) / float(peer_loss.detach()) - 1)
    assert difference < 1e-5, f"losses differ by {difference:.1e}"
    assert worst < 1e-5, f"gradients differ by {worst:.1e} of their norm"
    print(
        json.dumps(
            {"loss": float(loss.detach()), "loss difference": difference, "gradient difference": worst}
        )
    )


def losses(
    model: CausalLM, peer: Qwen3MoeForCausalLM, work: Work, number: int
) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """Our loss and the peer's on batch `number`, and whether both chose the same experts for its tokens.

    A token whose eighth and ninth expert have equal scores, up to rounding, has two right gradients.
    """
    tokens = (work.tokens(0, 1) + number) % work.vocab
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    size = inputs.numel()
    positions = torch.arange(work.seq_len).repeat(work.rows, 1)
    borders = torch.arange(0, size + 1, work.seq_len, dtype=torch.int32)
    with fast_products(torch.device("cpu"), torch.float32):
        output = model(inputs, positions, borders, labels=labels)
    counts = output.router.tokens_per_expert
    balance = balance_loss_share(expert_frequencies(counts), output.router.probability_sums, size).sum()
    loss = output.cross_entropy_sum / size + 0.001 * balance

    answer = peer(input_ids=inputs, labels=labels, shift_labels=labels, output_router_logits=True)
    peer_loss = torch.nn.functional.cross_entropy(answer.logits.flatten(0, 1), labels.flatten())
    peer_counts = []
    for logits in answer.router_logits:  # E sum f_e P_e of each layer, with autograd's own operations
        probabilities = logits.softmax(-1)
        chosen = torch.zeros_like(probabilities).scatter_(1, probabilities.topk(work.top_k).indices, 1.0)
        share = chosen.mean(0) / work.top_k
        peer_loss = peer_loss + 0.001 * work.experts * (share * probabilities.mean(0)).sum()
        peer_counts.append(chosen.sum(0))
    return loss, peer_loss, torch.equal(counts, torch.stack(peer_counts))


def peer_gradients(peer: Qwen3MoeForCausalLM) -> dict[str, torch.Tensor]:
    """Gradients by the names in a Hugging Face folder, where each expert has its own three matrices."""
    result = {}
    for name, parameter in peer.named_parameters():
        if name.endswith("experts.gate_up_proj"):
            stem = name.removesuffix("gate_up_proj")
            for expert, both in enumerate(parameter.grad):
                result[f"{stem}{expert}.gate_proj.weight"], result[f"{stem}{expert}.up_proj.weight"] = (
                    both.chunk(2)
                )
        elif name.endswith("experts.down_proj"):
            for expert, down in enumerate(parameter.grad):
                result[f"{name.removesuffix('down_proj')}{expert}.down_proj.weight"] = down
        else:
            result[name] = parameter.grad
    return result


if __name__ == "__main__":
    main()
