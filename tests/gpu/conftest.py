"""Tests run as one rank on one GPU; the commands of a user run in separate processes at the same time."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import torch.distributed as dist
from commands import SMALL, prepare_corpus
from one_gpu import ON_GPU, PLACE, USABLE

ROOT = Path(__file__).parents[2]
# Without a GPU only test_kernels.py is collected: it reports the skip once.
collect_ignore = [] if USABLE else ["test_training.py", "test_whole.py"]
_started: dict[str, Future] = {}


@pytest.fixture(scope="session", autouse=True)
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of this process alone, with NCCL on a GPU."""
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    store = f"file://{tmp_path_factory.mktemp('group')}/store"
    backend = "cpu:gloo,cuda:nccl" if ON_GPU else "gloo"
    dist.init_process_group(backend, init_method=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Deterministic algorithms, as with the key `deterministic`."""
    from trainer.ranks.device import use_deterministic_algorithms

    use_deterministic_algorithms()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def small_corpus() -> Path:
    """A folder with a prepared corpus."""
    return _started["small_corpus"].result()


@pytest.fixture(scope="session")
def typed_commands() -> dict[str, Any]:
    """The results of `type_commands`."""
    return _started["typed_commands"].result()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run these tests last, so that no other test runs inside a process group."""
    items.sort(key=lambda item: item.path.parent == Path(__file__).parent)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Start the other processes at once: they take as long as all other tests together."""
    wanted = {name for item in session.items for name in getattr(item, "fixturenames", ())}
    if wanted & {"small_corpus", "typed_commands"} and not session.config.option.collectonly:
        folder = TemporaryDirectory(prefix="gpu-tests-", ignore_cleanup_errors=True)
        session.config.add_cleanup(folder.cleanup)
        pool = ThreadPoolExecutor(1)
        _started["small_corpus"] = pool.submit(_prepare, Path(folder.name))
        if "typed_commands" in wanted:
            _started["typed_commands"] = pool.submit(type_commands, Path(folder.name))


def _prepare(folder: Path) -> Path:
    prepare_corpus(folder)
    return folder


def type_commands(folder: Path) -> dict[str, Any]:
    """Train, resume from step 4 as if the run had died after it, generate, evaluate.

    Returns the output of each command, and the logged steps of both attempts.
    """
    run_dir = folder / "runs" / "t"
    text, more = (f"{{kind:jsonl,paths:[{folder}/{name}.jsonl]}}" for name in ("text", "second"))
    overrides = [
        *(*SMALL, "name=t", f"output_dir={folder}/runs", "data=jsonl", f"data.dir={folder}/prepared"),
        *("data.tokenizer_vocab_size=512", "data.validation_fraction=0.1", "checkpoint.keep=3"),
        *(f"+data.sources.text={text}", f"+data.sources.second={more}", "+data.sources.second.weight=0.5"),
        *("parallel.nproc_per_node=1", "parallel.ep_size=1", "dtype=bf16", f"device={PLACE}"),
        *("deterministic=true", "tracker.wandb=disabled"),
    ]
    said = {"train": _command(folder, "trainer", *overrides)}
    (run_dir / "latest").write_text("step-00000004")
    said["resume"] = _command(folder, "trainer.resume", str(run_dir))
    said["generate"] = _command(folder, "trainer.generate", str(run_dir), "The", "--tokens", "5")
    said["evaluate"] = _command(folder, "trainer.evaluate", str(run_dir))
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return said | {"steps": [line for line in lines if "loss" in line]}


def _command(folder: Path, *words: str) -> str:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        environment.pop(key, None)  # they describe the group of this process
    command = [sys.executable, "-m", *words]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}{done.stderr}"
    return done.stdout
