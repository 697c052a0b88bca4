"""Learning from a teacher against a slow version over the whole vocabulary, written for reading."""

import pytest
import torch
import torch.nn.functional as F
from recorder import Recorder
from torch import Tensor

from moe.cross_entropy import chunked_cross_entropy
from moe.distillation import Lesson, chunked_distillation, teach

T, H, V = 29, 8, 50
PER_LOGIT = 6 * 8  # bytes: six tensors in fp64
CHUNK = PER_LOGIT * (4 * V + 3)  # at most 4 tokens per chunk


def _inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states and head of a student, labels, and logits of a teacher."""
    generator = torch.Generator().manual_seed(0)
    hidden = 2 * torch.randn(T, H, generator=generator)
    weight = torch.randn(V, H, generator=generator)
    labels = torch.randint(0, V, (T,), generator=generator)
    labels[8:12] = -100  # a whole chunk
    labels[[0, 5, 28]] = -100
    teacher = 3 * torch.randn(T, V, generator=generator)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels, teacher.to(dtype)


def _lesson(teacher: Tensor, k: int, temperature: float, reverse: bool, weight: float) -> Lesson:
    """`teach` of given logits: hidden states that the unit matrix turns into them."""
    ids, log_probs = teach(teacher, torch.eye(V, dtype=teacher.dtype), k, temperature, CHUNK)
    return Lesson(ids, log_probs, temperature, reverse, weight)


def _slow(hidden: Tensor, weight: Tensor, labels: Tensor, teacher: Tensor, lesson: Lesson) -> list[Tensor]:
    """Token by token: the loss, the cross entropy of the label, the divergence over the outcomes."""
    sums = [hidden.new_zeros(()) for _ in range(3)]
    for t in range(T):
        if labels[t] == -100:
            continue
        logits = weight @ hidden[t]
        p, q = ((x / lesson.temperature).softmax(-1) for x in (teacher[t], logits))
        top = teacher[t].topk(lesson.ids.shape[1]).indices.tolist()
        others = [i for i in range(V) if i not in top]
        outcomes = [[i] for i in top] + ([others] if others else [])
        p, q = (torch.stack([x[of].sum() for of in outcomes]) for x in (p, q))
        divergence = (q * (q / p).log()).sum() if lesson.reverse else (p * (p / q).log()).sum()
        cross_entropy = F.cross_entropy(logits, labels[t])
        share = lesson.weight
        sums[0] = sums[0] + (1 - share) * cross_entropy + share * lesson.temperature**2 * divergence
        sums[1], sums[2] = sums[1] + cross_entropy, sums[2] + divergence
    return sums


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize(("k", "temperature", "weight"), [(1, 1.0, 1.0), (5, 2.0, 0.7), (V, 0.5, 0.4)])
@pytest.mark.parametrize("chunk_bytes", [1, CHUNK, 10**9])
def test_equals_the_slow_version(reverse, k, temperature, weight, chunk_bytes):
    hidden, head, labels, teacher = _inputs()
    lesson = _lesson(teacher, k, temperature, reverse, weight)
    found = chunked_distillation(hidden, head, labels, lesson, chunk_bytes)
    expected = _slow(hidden, head, labels, teacher, lesson)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=0)
    gradients = torch.autograd.grad(0.37 * found[0], (hidden, head))
    oracle = torch.autograd.grad(0.37 * expected[0], (hidden, head))
    for one, other in zip(gradients, oracle, strict=True):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-13)
    assert (gradients[0][labels == -100] == 0).all()
    assert not found[1].requires_grad
    assert not found[2].requires_grad


def test_all_tokens_give_the_divergence_over_the_vocabulary():
    hidden, head, labels, teacher = _inputs()
    _, _, divergence = chunked_distillation(hidden, head, labels, _lesson(teacher, V, 1.0, False, 1.0))
    learned = labels != -100
    student = (hidden @ head.T).log_softmax(-1)[learned]
    whole = F.kl_div(student, teacher.log_softmax(-1)[learned], reduction="sum", log_target=True)
    assert torch.allclose(divergence, whole, rtol=1e-12)
    few = [
        chunked_distillation(hidden, head, labels, _lesson(teacher, k, 1.0, False, 1.0))[2] for k in (1, 9)
    ]
    assert 0 < few[0] < few[1] < whole


def test_without_weight_it_is_the_cross_entropy():
    hidden, head, labels, teacher = _inputs()
    loss, cross_entropy, _ = chunked_distillation(hidden, head, labels, _lesson(teacher, 5, 1.0, False, 0.0))
    expected = chunked_cross_entropy(hidden, head, labels)
    assert torch.allclose(loss, expected, rtol=1e-13)
    assert torch.allclose(cross_entropy, expected, rtol=1e-13)
    pairs = zip(*(torch.autograd.grad(x, (hidden, head)) for x in (loss, expected)), strict=True)
    assert all(torch.allclose(one, other, rtol=1e-10, atol=1e-13) for one, other in pairs)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_student_that_agrees_learns_nothing(reverse):
    hidden, head, labels, _ = _inputs()
    lesson = _lesson((hidden @ head.T).detach(), 5, 1.0, reverse, 1.0)
    loss, _, divergence = chunked_distillation(hidden, head, labels, lesson)
    assert abs(divergence) < 1e-12
    assert all(gradient.abs().max() < 1e-12 for gradient in torch.autograd.grad(loss, (hidden, head)))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("certain", ["both", "student"])
def test_distributions_that_are_far_apart_give_finite_numbers(reverse, certain):
    student = torch.full((2, V), -200.0)
    student[:, 3] = 200.0
    teacher = student.flip(1) if certain == "both" else student / 200
    hidden, head, labels = student.requires_grad_(), torch.eye(V, requires_grad=True), torch.tensor([3, 4])
    for k in (1, V - 1, V):
        lesson = Lesson(*teach(teacher, torch.eye(V), k, 1.0), 1.0, reverse, 1.0)
        found = chunked_distillation(hidden, head, labels, lesson)
        assert all(
            value.isfinite().all() for value in (*found, *torch.autograd.grad(found[0], (hidden, head)))
        )
        assert found[2] > 1


def test_bf16_sums_in_fp32():
    hidden, head, labels, teacher = (x.bfloat16() if x.is_floating_point() else x for x in _inputs())
    lesson = _lesson(teacher, 5, 2.0, False, 0.5)
    assert lesson.log_probs.dtype == torch.float32
    found = chunked_distillation(hidden, head, labels, lesson, 1)
    precise = chunked_distillation(hidden.double(), head.double(), labels, lesson)
    assert found[0].dtype == torch.float32
    assert abs(found[0] / precise[0] - 1) < 0.01  # logits are rounded to 16 bits, sums of 22 tokens are not
    of_sum = torch.autograd.grad(found[0], head)[0]
    assert of_sum.dtype == torch.bfloat16


def test_a_teacher_of_equal_logits_keeps_k_and_the_rest():
    ids, log_probs = teach(torch.zeros(3, V), torch.eye(V), 4, 1.0)
    assert ids.dtype == torch.int32
    assert all(len(set(row)) == 4 for row in ids.tolist())
    assert torch.allclose(log_probs.exp(), torch.tensor([*(4 * [1 / V]), 1 - 4 / V]).expand(3, 5))


def test_never_holds_all_logits_and_computes_no_more_than_asked():
    """Three tensors of a chunk's logits exist at once in teaching, six in learning; here in fp32."""
    tokens, vocabulary, chunk = 512, 1000, 16
    hidden, weight = (torch.randn(n, 4, requires_grad=True) for n in (tokens, vocabulary))
    with Recorder() as taught:
        ids, log_probs = teach(hidden, weight, 3, 2.0, 3 * 4 * chunk * vocabulary)
    lesson = Lesson(ids, log_probs, 2.0, False, 0.5)
    with Recorder() as learned:
        labels = torch.zeros(tokens, dtype=torch.int64)
        loss, *_ = chunked_distillation(hidden, weight, labels, lesson, 6 * 4 * chunk * vocabulary)
        loss.backward()
    for recorder, products in ((taught, 1), (learned, 3)):
        assert recorder.largest == chunk * vocabulary
        assert recorder.products == products * tokens // chunk
