"""Saving and restoring on real ranks is exact, agreed on by all ranks, and safe from other attempts."""

import json
import os
import resource
import shutil
import sys
import threading
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from commands import prepare_corpus
from harness import run_ranks
from layouts import ROWS, SmallRun

import trainer.checkpoints.saving
from data_pipeline.config import read_template
from moe.config import ConfigError
from moe.hf import write_shards
from trainer.checkpoints.folder import damage, reading
from trainer.checkpoints.saving import Checkpoints
from trainer.engine.engine import Engine
from trainer.ranks.runtime import TrainingError
from trainer.settings.run_folder import latest_checkpoint, read_manifest

# ZeRO stage, ep_size, micro-batches per step, dtype
EVERY = list(product((0, 1, 2, 3), (1, 2), (1, 4), ("fp32", "bf16")))
PAIRWISE = [  # has every pair of values of any two settings
    *[(0, 1, 1, "fp32"), (0, 2, 4, "bf16"), (1, 2, 1, "bf16"), (1, 1, 4, "fp32")],
    *[(2, 2, 4, "fp32"), (2, 1, 1, "bf16"), (3, 1, 4, "bf16"), (3, 2, 1, "fp32")],
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A prepared data folder, because a checkpoint copies its tokenizer."""
    folder = tmp_path_factory.mktemp("data")
    prepare_corpus(folder)
    return f"{folder}/prepared"


def state_of(engine: Engine) -> dict[str, Any]:
    """All optimizer state and weights of this rank, as DeepSpeed holds them."""
    optimizer = engine._engine.basic_optimizer
    fragments = {
        f"{part.parameter}:{part.start}:{field}": view.clone()
        for part in engine.fragments()
        for field, view in part.state.items()
    }
    groups = [
        {key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups
    ]
    steps = [float(state["step"]) for state in optimizer.state.values()]
    weights = {name: tensor.clone() for name, tensor in engine.owned_parameters()}
    return {"fragments": fragments, "groups": groups, "steps": steps, "weights": weights}


def interrupt_and_compare(case: tuple, folder: str, data: str) -> None:
    """Train four steps and save after two; a new engine that restores this must repeat the last two."""
    stage, ep_size, count, dtype = case
    overrides = [
        *(f"deepspeed=zero{stage}", f"parallel.ep_size={ep_size}", f"dtype={dtype}", f"data.dir={data}"),
        *(f"micro_batch_size={ROWS // (2 * count)}", "balance.mode=prior_buffer"),
        *("balance.bias_update_rate=0.01", f"checkpoint.background={'true' if count == 1 else 'false'}"),
        *(["model.num_nextn_predict_layers=1", "experts.capacity_factor=1.0"] if count == 4 else []),
        *(["experts.router_jitter_noise=0.1"] if count == 4 else []),
    ]
    straight = SmallRun(*overrides)
    straight.train(range(2))
    saver, release = checkpoints_of(straight, Path(folder)), threading.Event()
    if count == 1:  # in the background: the writer is held back and writes step 2 after step 4 is done
        saver._writer.submit(release.wait)
    saver.save(straight.engine, straight.balance, 2, {})
    noise = torch.rand(3)
    expected = straight.train(range(2, 4)), state_of(straight.engine)
    release.set()
    saver.finish()
    straight.engine.close()

    resumed = SmallRun(*overrides, "model.initializer_range=0.5")
    assert checkpoints_of(resumed, Path(folder)).load_latest(resumed.engine, resumed.balance) == (2, {})
    assert torch.equal(torch.rand(3), noise)
    actual = resumed.train(range(2, 4)), state_of(resumed.engine)
    resumed.engine.close()
    assert_identical(actual, expected, str(case))
    assert set(expected[1]["steps"]) == {4.0}
    assert {group["weight_decay"] for group in expected[1]["groups"]} == {0.0, 0.1}


def assert_identical(actual: Any, expected: Any, path: str) -> None:
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys(), path
        for key in expected:
            assert_identical(actual[key], expected[key], f"{path} {key}")
    elif isinstance(expected, list | tuple):
        for position, pair in enumerate(zip(actual, expected, strict=True)):
            assert_identical(*pair, f"{path}[{position}]")
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(actual, expected), path
    else:
        assert actual == expected, path


def interrupt_each(cases: list[tuple], root: str, data: str) -> None:
    for number, case in enumerate(cases):
        interrupt_and_compare(case, f"{root}/{number}", data)


def test_interrupted_is_exact(tmp_path, data):
    run_ranks(interrupt_each, 2, PAIRWISE, str(tmp_path), data, timeout=240)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_interrupted_is_exact_in_every_combination(tmp_path, data):
    run_ranks(interrupt_each, 2, EVERY, str(tmp_path), data, timeout=800)


def checkpoints_of(run: SmallRun, run_dir: Path, attempt: int = 1) -> Checkpoints:
    return Checkpoints(run_dir, attempt, run.config, run.plan, run.ranks, print)


def small_run(data: str, *overrides: str) -> SmallRun:
    return SmallRun(
        "deepspeed=zero3", "parallel.ep_size=2", "micro_batch_size=8", f"data.dir={data}", *overrides
    )


def run_out_of_space(run_dir: Path, data: str, background: str) -> str:
    """Only rank 1 can no longer write, under ZeRO-3, where ranks gather weights together while they write."""
    trainer.checkpoints.saving.write_shards = partial(write_shards, max_shard_bytes=4_000)
    run = small_run(data, f"checkpoint.background={background}")
    run.train(range(1))
    checkpoints = checkpoints_of(run, run_dir)
    checkpoints.save(run.engine, run.balance, 1, {})
    checkpoints.finish()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if run.ranks.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3_000, limits[1]))

    def save() -> None:
        checkpoints.save(run.engine, run.balance, 2, {})
        checkpoints.finish()

    with pytest.raises(TrainingError) as caught:
        save()
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    trainer.checkpoints.saving.write_shards = write_shards
    run.train(range(1, 2))  # works only if all ranks have run the same collectives
    dist.barrier()
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step-00000001"]
    assert damage(run_dir / "checkpoints/step-00000001") == []
    return str(caught.value)


def come_back_late(run_dir: Path, data: str) -> None:
    """Attempt 1 is cut off but not dead, and attempt 2 continues the run in the meantime."""
    run = small_run(data, "checkpoint.keep=1")
    old, new = checkpoints_of(run, run_dir, 1), checkpoints_of(run, run_dir, 2)
    old.save(run.engine, run.balance, 1, {})
    old.finish()
    old.save(run.engine, run.balance, 2, {})  # being written when the second attempt starts
    dist.barrier()
    if run.ranks.is_main:
        (run_dir / "state").write_text(json.dumps({"state": "running", "attempt": 2}))
    dist.barrier()
    with pytest.raises(TrainingError, match="attempt 2 has taken over"):
        old.finish()
    with pytest.raises(TrainingError, match="attempt 2 has taken over"):
        old.save(run.engine, run.balance, 4, {})
    new.save(run.engine, run.balance, 3, {})
    new.finish()
    dist.barrier()
    assert (run_dir / "latest").read_text() == "step-00000003\n"
    assert damage(run_dir / "checkpoints/step-00000003") == []


def save_many(run_dir: Path, data: str) -> list[list[str]]:
    """The checkpoints after steps 1 to 3, after steps 4 to 9, and after step 7 is saved again."""
    run = small_run(data, "checkpoint.keep=2", "checkpoint.keep_every_steps=4")
    checkpoints = checkpoints_of(run, run_dir)
    copy = run_dir / "checkpoints/step-00000001-of-a-user"
    copy.mkdir(parents=True, exist_ok=True)
    seen = []
    for steps in (range(1, 4), range(4, 10), [7]):
        for step in steps:
            checkpoints.save(run.engine, run.balance, step, {})
        checkpoints.finish()
        dist.barrier()
        there = set((run_dir / "checkpoints").glob("step-*"))
        seen.append(sorted(path.name[-1] for path in there - {copy}))
        assert copy in there, "the copy of a user must stay"
        if seen[-1] == ["2", "3"]:
            reader = reading(run_dir / "checkpoints/step-00000002/hf")
            reader.__enter__()
    return seen


def save_once(run_dir: Path, data: str, experts: int) -> list[str]:
    """The files of a checkpoint of 4 layers."""
    run = small_run(data, f"model.num_experts={experts}", "model.num_hidden_layers=4")
    checkpoints = checkpoints_of(run, run_dir)
    checkpoints.save(run.engine, run.balance, 1, {})
    checkpoints.finish()
    dist.barrier()
    folder = run_dir / "checkpoints/step-00000001"
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def go_on_from_a_whole_one(run_dir: Path, data: str) -> dict[str, Any]:
    """Steps 1 and 2 are saved, and a byte of what rank 1 wrote of step 2 is changed: step 1 is restored, with
    the random generators that each rank had."""
    run, said = small_run(data, "data.chat_template=qwen3_2507_instruct"), []
    checkpoints = checkpoints_of(run, run_dir)
    killed = run_dir / "checkpoints/.step-00000001.attempt-0"
    killed.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(run.ranks.rank)
    stalls = []
    for step in (1, 2):
        checkpoints.save(run.engine, run.balance, step, {})
        stalls.append(checkpoints.take_stall())
        checkpoints.finish()
        stalls.append(checkpoints.take_stall())
        if step == 1:
            drawn = torch.rand(3)
    dist.barrier()
    if run.ranks.is_main:
        damaged = sorted(run_dir.glob("checkpoints/step-00000002/optimizer/rank-*"))[1]
        with damaged.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            last = file.read(1)
            file.seek(-1, os.SEEK_END)
            file.write(bytes([last[0] ^ 1]))
    dist.barrier()
    again = Checkpoints(run_dir, 2, run.config, run.plan, run.ranks, said.append)
    step, _ = again.load_latest(run.engine, run.balance)
    found = {"step": step, "said": list(said), "drawn": drawn, "drawn again": torch.rand(3)}
    found |= {"stalls": stalls, "killed": killed.exists()}
    found["template"] = (run_dir / "checkpoints/step-00000002/hf/chat_template.jinja").read_text()
    found["manifest"] = read_manifest(run_dir / "checkpoints/step-00000002")
    dist.barrier()
    if run.ranks.is_main:
        (run_dir / "checkpoints/step-00000001/balance.pt").write_bytes(b"")
    dist.barrier()
    with pytest.raises(ConfigError) as refused:
        again.load_latest(run.engine, run.balance)
    return found | {"refused": str(refused.value)}


def save_in_many_ways(root: str, data: str) -> dict[str, Any]:
    folder = Path(root)
    come_back_late(folder / "late", data)
    return {
        "full": [run_out_of_space(folder / f"full-{word}", data, word) for word in ("true", "false")],
        "kept": save_many(folder / "kept", data),
        "damaged": go_on_from_a_whole_one(folder / "damaged", data),
        "files": [save_once(folder / f"files-{experts}", data, experts) for experts in (2, 64)],
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, data: str) -> list[dict[str, Any]]:
    """What both ranks saw; the ranks themselves check the attempt that was overtaken (`come_back_late`)."""
    return run_ranks(save_in_many_ways, 2, str(tmp_path_factory.mktemp("saved")), data)


def test_a_rank_that_cannot_write_stops_all_and_harms_nothing(saved):
    assert saved[0]["full"] == saved[1]["full"]
    for message in saved[0]["full"]:
        assert "cannot write the checkpoint of step 2 (rank 1: " in message
        assert "GiB free" in message


def test_a_damaged_checkpoint_is_passed_over(saved):
    drawn = [of["damaged"]["drawn"] for of in saved]
    assert not torch.equal(*drawn)
    for of, expected in zip(saved, drawn, strict=True):
        found = of["damaged"]
        assert found["step"] == 1
        assert torch.equal(found["drawn again"], expected)
        [line] = found["said"]
        assert "going on from step-00000001, which is whole" in line
        assert "step-00000002: optimizer/rank-" in line
        assert "1.safetensors is not what was written" in line
        assert found["manifest"]["next_row"] == 2 * ROWS
        assert found["template"] == read_template("qwen3_2507_instruct")
        assert min(found["stalls"]) > 0, "saving and finishing both take time"
        assert not found["killed"], "what killed attempts left is removed"
        assert "holds no whole checkpoint" in found["refused"]
        assert "step-00000001: balance.pt has 0 bytes" in found["refused"]


def test_what_is_kept(saved):
    """The two newest, every fourth and one that is being read; after a step back, no later ones."""
    assert saved[0]["kept"] == [["2", "3"], ["2", "4", "8", "9"], ["2", "4", "7"]]


def test_the_number_of_files_does_not_depend_on_the_model(saved):
    few, many = saved[0]["files"]
    assert few == many
    ranks = [name for name in few if name.startswith("optimizer/") or name.endswith(".safetensors")]
    assert len(ranks) == 2 * 2
    assert len(few) == 2 * 2 + 8, few


FILE_OPERATIONS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.copyfile")


def die_at(operation: int) -> None:
    """End this process as kill -9 does, after `operation` more operations on files."""
    seen = 0

    def count(event: str, _: Any) -> None:
        nonlocal seen
        seen += event in FILE_OPERATIONS
        if seen > operation:
            os._exit(9)

    sys.addaudithook(count)


def die_at_each_operation(root: str, data: str) -> int:
    """Commit step 2 over step 1 with keep=1 again and again, each time killed one operation later."""
    run = small_run(data, "parallel.ep_size=1", "checkpoint.keep=1")
    template = Path(root, "template")
    saver = checkpoints_of(run, template)
    saver.save(run.engine, run.balance, 1, {})
    saver.finish()
    saver.save(run.engine, run.balance, 2, {})
    writing = saver._writing
    part = writing.part.result()
    for operation in range(1000):
        run_dir = Path(root, str(operation))
        shutil.copytree(template, run_dir)
        child = os.fork()
        if not child:
            checkpoints = checkpoints_of(run, run_dir)
            folder = run_dir / "checkpoints/.step-00000002.attempt-1"
            die_at(operation)
            checkpoints._commit(writing._replace(folder=folder), [part])
            checkpoints._sweep()
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        there = sorted((run_dir / "checkpoints").glob("step-*"))
        assert there, operation
        assert all(damage(path) == [] for path in there), operation
        assert latest_checkpoint(run_dir) in there
        shutil.rmtree(run_dir)
        if code == 0:
            assert [path.name for path in there] == ["step-00000002"]
            return operation
        assert code == 9, operation
    raise AssertionError("the commit does not end within 1000 operations")


def test_a_kill_between_any_two_file_operations_of_a_commit(tmp_path, data):
    assert run_ranks(die_at_each_operation, 1, str(tmp_path), data)[0] > 20
