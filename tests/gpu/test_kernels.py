"""Every kernel of a layer on one GPU, compared with fp32 or fp64: `make test-gpu`."""

import os
from itertools import accumulate

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from one_gpu import ON_GPU, PLACE, USABLE, relative

if not USABLE:
    pytest.skip("needs a GPU that torch can use", allow_module_level=True)

from moe.attention import (
    HeadNorm,
    ZeroCenteredHeadNorm,
    attend_per_document,
    attend_varlen,
    varlen_obstacle,
)
from moe.cross_entropy import chunked_cross_entropy
from moe.dispatch import AllToAllDispatcher, DeduplicatedAllToAllDispatcher, LocalDispatcher
from moe.documents import Documents
from moe.experts import Experts, supports
from moe.gated_delta_net import (
    DeltaInputs,
    chunked_delta_rule,
    fused_delta_rule,
    kernel_obstacle,
    recurrent_delta_rule,
)
from moe.inputs import LayerInputs
from moe.router import Router

TOKENS, HIDDEN, WIDTH, EXPERTS, TOP_K = 512, 256, 128, 16, 4
ROUNDING = 2e-2  # bf16 products in a different order; a wrong row or weight gives an error of 100 %


def routing(case: str) -> torch.Tensor:
    """[T,K] expert ids; the id EXPERTS marks a slot of another rank."""
    torch.manual_seed(0)
    ids = torch.rand(TOKENS, EXPERTS).argsort(-1)[:, :TOP_K]
    if case == "experts without rows":
        return ids // 4 * 4 + torch.arange(TOP_K).remainder(2)
    if case == "one hot expert":
        return torch.full((TOKENS, 1), 5)
    if case == "slots elsewhere":
        return torch.where(torch.rand(TOKENS, TOP_K) < 0.3, EXPERTS, ids)
    return ids[:0] if case == "no tokens" else ids


def experts_results(backend: str, ids: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    """Output, and gradients of x, routing weights and both weights; all inputs are bf16 values."""
    torch.manual_seed(1)
    experts = Experts(EXPERTS, HIDDEN, WIDTH, backend).to(PLACE)
    for weight in experts.parameters():
        weight.data = torch.randn(weight.shape).mul_(0.05).bfloat16().to(PLACE, dtype)
    x = torch.randn(len(ids), HIDDEN).bfloat16().to(PLACE, dtype).requires_grad_()
    weights = torch.rand(ids.shape).bfloat16().to(PLACE, dtype).requires_grad_()
    y = experts(x, weights, ids.to(PLACE))
    direction = torch.randn(y.shape).bfloat16().to(PLACE, dtype)
    return [y, *torch.autograd.grad(y, [x, weights, *experts.parameters()], direction)]


@pytest.mark.parametrize(
    "case", ["all", "experts without rows", "one hot expert", "slots elsewhere", "no tokens"]
)
@pytest.mark.parametrize("backend", ["loop", "grouped", "megablocks", "liger"])
def test_experts(backend, case):
    slow = "liger" if not os.environ.get("GPU_TESTS_LIGER") else ""
    if backend == slow:
        pytest.skip("liger's autotuning takes minutes; GPU_TESTS_LIGER=1 runs it")
    if obstacle := supports(backend, torch.device(PLACE), torch.bfloat16):
        pytest.skip(obstacle)
    ids = routing(case)
    expected = experts_results("reference", ids, torch.float32)
    actual = experts_results(backend, ids, torch.bfloat16)
    for mine, right in zip(actual, expected, strict=True):
        assert mine.isfinite().all()
        assert relative(mine, right) < ROUNDING or not right.any()
    idle = [expert for expert in range(EXPERTS) if not (ids == expert).any()]
    for gradient in actual[3:]:
        assert not gradient[idle].any(), "the gradient of an expert without rows must be zero"


@pytest.mark.parametrize(
    "lengths", [[512], [1] * 64, [5, 200, 1, 37, 1, 256], [128] * 4], ids=lambda lengths: f"{len(lengths)}"
)
def test_attention(lengths):
    paths = [attend_per_document]
    if varlen_obstacle(torch.device(PLACE), torch.bfloat16) is None:
        paths.append(attend_varlen)
    torch.manual_seed(0)
    borders = torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32)
    documents = Documents(borders.to(PLACE), tuple(lengths))
    shapes = [(sum(lengths), heads, 128) for heads in (8, 2, 2)]
    inputs = [torch.randn(shape).bfloat16().to(PLACE).requires_grad_() for shape in shapes]
    precise = [x.detach().float().requires_grad_() for x in inputs]
    direction = torch.randn(shapes[0]).bfloat16().to(PLACE)
    expected = attend_per_document(*precise, documents)
    gradients = torch.autograd.grad(expected, precise, direction.float())
    for attend in paths:
        mixed = attend(*inputs, documents)
        assert relative(mixed, expected) < ROUNDING
        for mine, right in zip(torch.autograd.grad(mixed, inputs, direction), gradients, strict=True):
            # in a document of one token, the gradients of query and key are zero up to rounding
            assert relative(mine, right) < ROUNDING or right.abs().max() < 1e-4


@pytest.mark.parametrize(("heads", "head_dim", "rotated"), [(32, 128, 128), (4, 128, 128), (16, 256, 64)])
@pytest.mark.parametrize("kind", [HeadNorm, ZeroCenteredHeadNorm])
def test_qk_norm_and_rotary(kind, heads, head_dim, rotated):
    """The Triton kernel in bf16 and fp32, of a strided query, against torch's operations in fp64."""
    torch.manual_seed(0)
    x = torch.randn(TOKENS, heads, 2 * head_dim).bfloat16().to(PLACE)[..., :head_dim]  # beside it the gate
    weight, direction = torch.randn(head_dim).bfloat16(), torch.randn(x.shape).bfloat16().to(PLACE)
    angles = 6 * torch.rand(TOKENS, 1, rotated // 2)
    tables = angles.cos().bfloat16().to(PLACE), angles.sin().bfloat16().to(PLACE)
    documents = Documents(torch.tensor([0, TOKENS], dtype=torch.int32))

    def results(dtype: torch.dtype) -> list[torch.Tensor]:
        norm = kind(head_dim, eps=1e-6).to(PLACE, dtype)
        norm.weight.data = weight.to(PLACE, dtype)
        given = x.to(dtype).detach().requires_grad_()
        cos, sin = (table.to(dtype) for table in tables)
        out = norm(given, LayerInputs((cos, sin), documents))
        return [out, *torch.autograd.grad(out, (given, norm.weight), direction.to(dtype))]

    expected = results(torch.float64)
    for dtype, within in ((torch.bfloat16, ROUNDING), (torch.float32, 1e-5)):
        errors = [relative(mine, right) for mine, right in zip(results(dtype), expected, strict=True)]
        assert max(errors) < within, (dtype, errors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cross_entropy(dtype):
    torch.manual_seed(0)
    hidden = torch.randn(300, 128).to(PLACE, dtype).requires_grad_()
    weight = torch.randn(1000, 128).mul_(0.1).to(PLACE, dtype).requires_grad_()
    labels = torch.randint(-1, 1000, (300,)).to(PLACE)
    labels[labels < 0] = -100
    precise = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    right = F.cross_entropy(precise[0] @ precise[1].T, labels, ignore_index=-100, reduction="sum")
    mine = chunked_cross_entropy(hidden, weight, labels, chunk_bytes=140_000)
    within = 1e-5 if dtype == torch.float32 else ROUNDING
    assert relative(mine, right) < (within if dtype == torch.float32 else 1e-3)
    gradients = torch.autograd.grad(mine, [hidden, weight]), torch.autograd.grad(right, precise)
    assert all(relative(*pair) < within for pair in zip(*gradients, strict=True))


@pytest.mark.parametrize("kind", [AllToAllDispatcher, DeduplicatedAllToAllDispatcher])
@pytest.mark.parametrize("chunks", [1, 2])
def test_all_to_all_of_one_rank(kind, chunks):
    torch.manual_seed(0)
    experts = Experts(EXPERTS, HIDDEN, WIDTH, "loop").to(PLACE)
    for weight in experts.parameters():
        torch.nn.init.normal_(weight, std=0.05)
    ids, x = routing("all").to(PLACE), torch.randn(TOKENS, HIDDEN, device=PLACE, requires_grad=True)
    weights = torch.rand(ids.shape, device=PLACE, requires_grad=True)
    found = []
    for dispatcher in (LocalDispatcher(), kind(dist.group.WORLD, chunks=chunks)):
        y = dispatcher(x, weights, ids, experts, drops=False)
        found.append([y, *torch.autograd.grad(y, [x, weights, *experts.parameters()], torch.ones_like(y))])
    assert all(relative(mine, right) < 1e-5 for right, mine in zip(*found, strict=True))


@pytest.mark.parametrize("bias", [None, 0.05], ids=["", "selection bias"])
def test_router(bias):
    """Chosen experts, weights, sums and the gradients of the sums, from bf16 hidden states, against fp64."""
    torch.manual_seed(0)
    router = Router(HIDDEN, EXPERTS, TOP_K, norm_topk_prob=True)
    torch.nn.init.normal_(router.weight, std=0.05)
    router.to(PLACE, torch.bfloat16)
    hidden = torch.randn(TOKENS, HIDDEN).bfloat16().to(PLACE).requires_grad_()
    moved = None if bias is None else bias * torch.randn(EXPERTS).to(PLACE)
    mask = (torch.rand(TOKENS) < 0.9).to(PLACE)
    weights, chosen, statistics = router(hidden, mask, moved)

    precise = [x.detach().double().requires_grad_() for x in (hidden, router.weight)]
    probabilities = (precise[0] @ precise[1].T).softmax(-1)
    order = probabilities if moved is None else probabilities + moved
    right_chosen = order.topk(TOP_K, dim=-1).indices
    right = probabilities.gather(-1, right_chosen)
    right = right / right.sum(-1, keepdim=True)
    sums = (probabilities * mask.unsqueeze(1)).sum(0)
    assert torch.equal(chosen, right_chosen)
    assert relative(weights, right) < 4e-3, "the weights are rounded to bf16"
    assert relative(statistics.probability_sums, sums) < 1e-5
    counted = chosen[mask].flatten().bincount(minlength=EXPERTS)
    assert torch.equal(statistics.tokens_per_expert, counted.float())
    direction = torch.randn(EXPERTS, device=PLACE)
    mine = torch.autograd.grad(statistics.probability_sums @ direction, [hidden, router.weight])
    right = torch.autograd.grad(sums @ direction.double(), precise)
    assert all(relative(*pair) < 4e-3 for pair in zip(mine, right, strict=True))


def test_gated_delta_rule():
    """The chunked rule, and the flash-linear-attention kernel if usable, against the recurrence in fp64."""
    torch.manual_seed(0)
    lengths = (70, 1, 129, 5)
    borders = torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32)
    documents = Documents(borders.to(PLACE), lengths)
    unit = [F.normalize(torch.randn(sum(lengths), 2, 64), dim=-1) for _ in range(2)]
    value, decay = torch.randn(sum(lengths), 2, 64), -torch.rand(sum(lengths), 2)
    x = [part.to(PLACE) for part in (*unit, value, decay, torch.rand(sum(lengths), 2))]
    rules = {recurrent_delta_rule: (torch.float64, 0), chunked_delta_rule: (torch.float32, 1e-5)}
    obstacle = kernel_obstacle(torch.device(PLACE), torch.bfloat16, 64, 64)
    if obstacle is None:
        rules[fused_delta_rule] = (torch.bfloat16, ROUNDING)
    found = {}
    for rule, (dtype, _) in rules.items():
        given = DeltaInputs(*(part.to(dtype) for part in x))
        if rule is fused_delta_rule:
            given = given._replace(log_decay=given.log_decay.float())
        given = DeltaInputs(*(part.detach().requires_grad_() for part in given))
        state = torch.zeros(len(lengths), 2, 64, 64, device=PLACE, dtype=given.log_decay.dtype)
        mixed, _ = rule(given, documents, state)
        found[rule] = [mixed.detach(), *torch.autograd.grad(mixed.sum(), [*given])]
    expected = found.pop(recurrent_delta_rule)
    for rule, results in found.items():
        errors = [relative(mine, right) for mine, right in zip(results, expected, strict=True)]
        assert max(errors) < rules[rule][1], (rule.__name__, errors)
    print(f"\nkernel of linear attention: {obstacle or 'taken'}")


@pytest.mark.skipif(not ON_GPU, reason="flash attention's backward adds in no fixed order only on CUDA")
def test_attention_backward_repeats_where_it_must(deterministic):
    if obstacle := varlen_obstacle(torch.device(PLACE), torch.bfloat16):
        pytest.skip(obstacle)
    torch.manual_seed(0)
    lengths = (4096, 1024)
    borders = torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32)
    documents = Documents(borders.to(PLACE), lengths)
    inputs = [torch.randn(sum(lengths), heads, 128, device=PLACE).bfloat16() for heads in (8, 2, 2)]

    def gradients() -> list[torch.Tensor]:
        wanted = [x.detach().requires_grad_() for x in inputs]
        return [*torch.autograd.grad(attend_varlen(*wanted, documents).float().square().sum(), wanted)]

    assert all(torch.equal(*pair) for pair in zip(gradients(), gradients(), strict=True))
    torch.use_deterministic_algorithms(False)
    differences = [relative(*pair) for pair in zip(gradients(), gradients(), strict=True)]
    print(f"\nflash attention twice without deterministic, relative difference of gradients: {differences}")
