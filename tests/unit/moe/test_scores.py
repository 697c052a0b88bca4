"""Scores of given next tokens, in chunks and at some places, against those from all logits."""

from collections.abc import Callable

import pytest
import torch
from recorder import Recorder

from moe.config import ModelConfig
from moe.model import CausalLM
from moe.scores import label_scores

T, H, V = 29, 8, 50


@pytest.mark.parametrize("chunk_bytes", [1, 12 * 4 * V + 3, 10**9])
def test_chunks_change_nothing(chunk_bytes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(T, H, generator=generator, requires_grad=True)
    weight = torch.randn(V, H, generator=generator)
    all_of_them = (hidden.detach().double() @ weight.double().T).log_softmax(-1)
    labels = all_of_them.argmax(-1)
    labels[::3] = (labels[::3] + 1) % V
    log_probs, best = label_scores(hidden, weight, labels, chunk_bytes)
    assert not log_probs.requires_grad
    assert log_probs.dtype == torch.float32
    expected = all_of_them.gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(log_probs.double(), expected, rtol=2e-6, atol=2e-6)
    assert best.tolist() == [n % 3 != 0 for n in range(T)]


def test_a_chunk_has_as_many_logits_as_its_bytes_allow() -> None:
    """bf16 logits and what is computed of them in fp32: six bytes."""
    tokens, vocabulary, chunk = 512, 1000, 16
    hidden, weight = (
        torch.randn(n, 4, dtype=torch.bfloat16, requires_grad=True) for n in (tokens, vocabulary)
    )
    with Recorder() as recorder:
        label_scores(hidden, weight, torch.zeros(tokens, dtype=torch.int64), 6 * chunk * vocabulary)
    assert recorder.largest == chunk * vocabulary
    assert recorder.products == tokens // chunk


def test_bf16_is_summed_in_fp32() -> None:
    hidden, weight = torch.zeros(2, H, dtype=torch.bfloat16), torch.zeros(V, H, dtype=torch.bfloat16)
    log_probs, _ = label_scores(hidden, weight, torch.tensor([0, 1]))
    assert log_probs.dtype == torch.float32
    assert log_probs.tolist() == pytest.approx([-3.912023] * 2, abs=1e-6)


def test_places_of_a_packed_batch(config: ModelConfig, build: Callable[..., CausalLM]) -> None:
    """Several labels at one place, and none at others; documents do not see each other."""
    model = build(config).eval()
    ids = torch.randint(0, config.vocab_size, (1, 9), generator=torch.Generator().manual_seed(1))
    packed = ids, torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]]), torch.tensor([0, 5, 9], dtype=torch.int32)
    logits = model(*packed).logits[0].log_softmax(-1)
    places, labels = torch.tensor([8, 3, 3, 0]), torch.tensor([7, 1, int(logits[3].argmax()), 0])
    output = model(*packed, labels=labels, how=places, lengths=[5, 4])
    torch.testing.assert_close(output.log_probs, logits[places, labels].detach())
    assert output.best.tolist() == (logits[places].argmax(-1) == labels).tolist()
    assert output.best[2]
    assert output.logits is output.cross_entropy_sum is None
