"""What only a GPU can show, on one of them, within two minutes: `make test-gpu`.

GPU_TESTS_ON=cpu runs the same bodies on the CPU, where that makes sense: a rehearsal, not a proof.
"""

import gc
import json
import os
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

PLACE = os.environ.get("GPU_TESTS_ON", "cuda")
ON_GPU = PLACE == "cuda"
if ON_GPU and not torch.cuda.is_available():
    pytest.skip("needs a GPU that torch can use", allow_module_level=True)

from commands import SMALL, prepare_corpus
from layouts import DENSE, ROWS, SmallRun, deviation, micro_batches, train_small

from moe.attention import Documents, attend_per_document, attend_varlen, varlen_obstacle
from moe.cross_entropy import chunked_cross_entropy
from moe.dispatch import AllToAllDispatcher, DeduplicatedAllToAllDispatcher, LocalDispatcher
from moe.experts import Experts, supports
from trainer.checkpoint import Checkpoints
from trainer.device import use_deterministic_algorithms
from trainer.loss import agree_on_totals
from trainer.models import bytes_per_rank
from trainer.optimizer import KINDS
from trainer.train import train_step

ROOT = Path(__file__).parents[2]
NO_SPLIT = ["balance.mode=micro_batch"]  # one forward for each micro-batch
GROUPED = "experts.backend=grouped"
DENSE_MODEL = ["model=tiny_dense", *DENSE]
STAGES = [f"deepspeed=zero{stage}" for stage in range(4)]


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    """This process is a group of one rank, with NCCL on a GPU."""
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ.update(place | {"MASTER_PORT": "29651"})
    dist.init_process_group("cpu:gloo,cuda:nccl" if ON_GPU else "gloo")
    yield
    dist.destroy_process_group()


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference, relative to that of what is expected."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm().clamp(min=1e-30))


# --- kernels against fp32

TOKENS, HIDDEN, WIDTH, EXPERTS, TOP_K = 512, 256, 128, 16, 4
ROUNDING = 2e-2  # of bf16 products in another order; a wrong row or weight is off by a hundred per cent


def routing(case: str) -> torch.Tensor:
    """[T,K] experts; EXPERTS means that the slot is elsewhere."""
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
    """Output, and gradients of x, routing weights, w1, w3, w2, from bf16 values."""
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
        assert not gradient[idle].any(), "an expert without rows has a zero gradient"


@pytest.mark.parametrize(
    "lengths", [[512], [1] * 64, [5, 200, 1, 37, 1, 256], [128] * 4], ids=lambda lengths: f"{len(lengths)}"
)
def test_attention(lengths):
    if obstacle := varlen_obstacle(torch.device(PLACE), torch.bfloat16):
        pytest.skip(f"no attention over all documents at once: {obstacle}")
    torch.manual_seed(0)
    borders = torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32)
    documents = Documents(borders.to(PLACE), tuple(lengths))
    shapes = [(sum(lengths), heads, 128) for heads in (8, 2, 2)]
    inputs = [torch.randn(shape).bfloat16().to(PLACE).requires_grad_() for shape in shapes]
    precise = [x.detach().float().requires_grad_() for x in inputs]
    direction = torch.randn(shapes[0]).bfloat16().to(PLACE)
    expected = attend_per_document(*precise, documents)
    gradients = torch.autograd.grad(expected, precise, direction.float())
    for attend in (attend_varlen, attend_per_document):
        mixed = attend(*inputs, documents)
        assert relative(mixed, expected) < ROUNDING
        for mine, right in zip(torch.autograd.grad(mixed, inputs, direction), gradients, strict=True):
            # of a document of one token query and key have no gradient but rounding
            assert relative(mine, right) < ROUNDING or right.abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cross_entropy(dtype):
    torch.manual_seed(0)
    hidden = torch.randn(300, 128).to(PLACE, dtype).requires_grad_()
    weight = torch.randn(1000, 128).mul_(0.1).to(PLACE, dtype).requires_grad_()
    labels = torch.randint(-1, 1000, (300,)).to(PLACE)
    labels[labels < 0] = -100
    precise = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    right = F.cross_entropy(precise[0] @ precise[1].T, labels, ignore_index=-100, reduction="sum")
    mine = chunked_cross_entropy(hidden, weight, labels, logits_per_chunk=70_000)
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


# --- training

_fp32: dict[str, Any] = {}


def in_fp32(*model: str) -> Any:
    """What three steps of a model make in fp32 without ZeRO."""
    key = " ".join(model)
    if key not in _fp32:
        _fp32[key] = train_small(*model, "deepspeed=zero0", "micro_batch_size=4", device=PLACE)
    return _fp32[key]


@pytest.mark.parametrize("recompute", ["none", "experts", "full"])
@pytest.mark.parametrize("stage", STAGES)
def test_layouts_agree_in_fp32(stage, recompute):
    outcome = train_small(stage, f"recompute={recompute}", "micro_batch_size=4", device=PLACE)
    found = deviation(outcome, in_fp32())
    assert max(found.values()) < 1e-5, found


@pytest.mark.parametrize("stage", STAGES)
def test_dense_models(stage):
    outcome = train_small(*DENSE_MODEL, stage, "micro_batch_size=4", device=PLACE)
    assert max(deviation(outcome, in_fp32(*DENSE_MODEL)).values()) < 1e-5


@pytest.mark.parametrize(
    ("stage", "recompute"), zip(STAGES, ["none", "experts", "full", "full"], strict=True)
)
def test_bf16_learns(stage, recompute):
    keys = [stage, f"recompute={recompute}", "dtype=bf16", GROUPED, "micro_batch_size=4"]
    outcome = train_small(*keys, steps=12, same_rows=True, device=PLACE)
    first, last = outcome["losses"][0], outcome["losses"][-1]
    assert last < 0.8 * first, (first, last)


@pytest.mark.parametrize("stage", STAGES)
def test_sums_of_bf16_gradients_are_exact(stage):
    """As tests/distributed/test_gradient_sums.py: 256 and seven times 1 are no number of bf16."""
    keys = ["dtype=bf16", "micro_batch_size=2", "optimizer.max_grad_norm=0", GROUPED, *NO_SPLIT]
    run = SmallRun(stage, *keys, device=PLACE)
    forwards, found = [0], {kind: set() for kind in KINDS}

    def look(optimizer: torch.optim.Optimizer, *_: object) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    found[group["kind"]] |= set(parameter.grad.unique().tolist())

    def count(*_: object) -> None:
        forwards[0] += 1

    for parameter in run.engine.module.parameters():
        parameter.register_hook(lambda g: torch.full_like(g, 256 if forwards[0] == 1 else 1))
    run.engine.module.register_forward_pre_hook(count)
    run.engine._engine.basic_optimizer.register_step_pre_hook(look)
    run.train(range(1))
    run.engine.close()
    assert {kind: values - {0.0} for kind, values in found.items()} == {
        kind: {256.0 + ROWS // 2 - 1} for kind in KINDS
    }


@pytest.mark.parametrize("stage", STAGES[1:])
def test_offloaded_optimizer(stage):
    offload = "+deepspeed.zero_optimization.offload_optimizer.device=cpu"
    outcome = train_small(stage, offload, "micro_batch_size=4", device=PLACE)
    found = deviation(outcome, in_fp32())
    assert max(found.values()) < 1e-5, found


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    prepare_corpus(folder)
    return folder


@pytest.fixture
def deterministic() -> Iterator[None]:
    use_deterministic_algorithms()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("stage", STAGES[1:])
def test_resume_goes_on_bit_for_bit(stage, data, tmp_path):
    keys = [stage, "dtype=bf16", GROUPED, "micro_batch_size=4", f"data.dir={data}/prepared"]
    straight = SmallRun(*keys, device=PLACE)
    straight.train(range(2))
    folder = [tmp_path, 1, straight.config, straight.plan, straight.ranks, print]
    saver = Checkpoints(*folder)
    saver.save(straight.engine, straight.balance, 2)
    expected = straight.train(range(2, 4))
    saver.finish()
    straight.engine.close()
    resumed = SmallRun(*keys, "model.initializer_range=0.5", device=PLACE)
    assert Checkpoints(*folder).load_latest(resumed.engine, resumed.balance) == 2
    found = deviation(resumed.train(range(2, 4)), expected)
    resumed.engine.close()
    assert max(found.values()) == 0, found


@pytest.mark.usefixtures("deterministic")
def test_two_equal_runs_are_equal_bit_for_bit():
    keys = ["dtype=bf16", GROUPED, "micro_batch_size=4", "recompute=full"]
    one, other = (train_small(*keys, steps=20, device=PLACE) for _ in range(2))
    assert max(deviation(one, other).values()) == 0


def test_how_far_two_runs_differ_otherwise():
    """Told, not judged: flash attention's backward adds in no fixed order."""
    keys = ["dtype=bf16", GROUPED, "micro_batch_size=4"]
    one, other = (train_small(*keys, steps=20, device=PLACE) for _ in range(2))
    print(f"\nwithout deterministic, 20 steps in bf16: {deviation(one, other)}")


# --- memory, waits, and a run as a user types it

BIG = ["model.hidden_size=512", "model.num_attention_heads=8", "model.num_key_value_heads=2"]
BIG += ["model.head_dim=64", "model.num_experts=32", "model.moe_intermediate_size=256"]
ZERO = "++deepspeed.zero_optimization"
NO_BUFFERS = [f"{ZERO}.reduce_bucket_size=10000", f"{ZERO}.sub_group_size=10000"]
NO_BUFFERS += [f"{ZERO}.stage3_param_persistence_threshold=1000"]


@pytest.mark.skipif(not ON_GPU, reason="reads the allocator of CUDA")
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("stage", STAGES)
def test_memory_is_what_the_table_says(stage, dtype):
    gc.collect()  # engines before this one
    before, seen = torch.cuda.memory_allocated(), []
    buffers = [] if stage.endswith("0") else NO_BUFFERS
    run = SmallRun(*BIG, stage, f"dtype={dtype}", "micro_batch_size=4", *buffers, device=PLACE)
    step = run.engine._engine.step

    def look_and_step() -> None:
        seen.append(torch.cuda.memory_allocated() - before)
        step()

    run.engine._engine.step = look_and_step
    run.train(range(1))
    seen.clear()
    run.train(range(1, 2))
    said = sum(
        bytes_per_rank(run.config.model, zero_stage=int(stage[-1]), ep_size=1, world_size=1, dtype=dtype)
    )
    run.engine.close()
    assert abs(max(seen) / said - 1) < 0.02, (max(seen), said)


# where the host must know the norm: it decides whether the weights move
NORMS = {("trainer/gradients.py", "step"), ("trainer/gradients.py", "reduce_and_clip")}


@pytest.mark.skipif(not ON_GPU, reason="asks CUDA for the waits")
@pytest.mark.parametrize(
    "keys", [["deepspeed=zero1"], ["deepspeed=zero0"], [*DENSE_MODEL, "deepspeed=zero1"]]
)
def test_a_step_waits_for_its_norm_alone(keys):
    run = SmallRun(*keys, "dtype=bf16", "micro_batch_size=4", device=PLACE)
    run.train(range(2))
    batches = micro_batches(run.plan, 0, 2)
    totals = agree_on_totals(batches, False)
    batches = [batch.to(PLACE) for batch in batches]
    waits: list[tuple[str, str]] = []

    def listen(*_: object, **__: object) -> None:
        frames = [frame for frame in traceback.extract_stack() if str(ROOT) in frame.filename]
        ours = [frame for frame in frames if "/tests/" not in frame.filename]
        waits.append((str(Path(ours[-1].filename).relative_to(ROOT)), ours[-1].name))

    with warnings.catch_warnings():
        torch.cuda.set_sync_debug_mode("warn")  # itself it warns of being a prototype
        warnings.simplefilter("always")
        warnings.showwarning = listen
        train_step(run.engine, batches, totals, run.balance, run.config, 1e-3)
        torch.cuda.set_sync_debug_mode("default")
    run.engine.close()
    assert set(waits) <= NORMS, waits


def test_a_run_as_a_user_types_it(data):
    overrides = [
        *(*SMALL, "name=t", f"output_dir={data}/runs", "data=jsonl", f"data.dir={data}/prepared"),
        *("data.tokenizer_vocab_size=512", "data.validation_fraction=0.1"),
        f"data.sources.text.paths=[{data}/text.jsonl]",
        f"+data.sources.second={{kind:jsonl,paths:[{data}/second.jsonl],text_key:text,weight:0.5,max_epochs:null}}",
        *("parallel.nproc_per_node=1", "parallel.ep_size=1", "dtype=bf16", f"device={PLACE}"),
        "tracker.wandb=disabled",
    ]

    def command(*words: str) -> str:
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
        done = subprocess.run(
            [sys.executable, "-m", *words],
            cwd=data,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    began = time.monotonic()
    said = command("trainer", *overrides)
    print(f"\n{said}\n{time.monotonic() - began:.0f} s")
    name = torch.cuda.get_device_name() if ON_GPU else "the CPU"
    assert f"on {'1 ' if ON_GPU else ''}{name} (experts {'grouped' if ON_GPU else 'loop'}" in said
    run_dir = data / "runs" / "t"
    command("trainer.resume", str(run_dir), "checkpoint.keep=1")
    assert "The" in command("trainer.generate", str(run_dir), "The", "--tokens", "5")
    assert "loss/validation" in command("trainer.evaluate", str(run_dir))
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0]
