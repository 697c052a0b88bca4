"""Speed of each part of the data pipeline against its bound; run it on an idle machine.

    python tests/bench/data_speed.py prepare TEXT.jsonl TOKENIZER [WORKERS]  prepare / encode_batch_fast alone
    python tests/bench/data_speed.py load                                     loader / trainer of the demo
    python tests/bench/data_speed.py pack [SEQ_LEN]                           padding of a 32K corpus

prepare: both use the same cores: WORKERS processes of one thread (1: one process with every core). CPU
seconds are those of the process and its workers. load: run `make demo` first; the trainer's rate is the best
in its log. pack: synthetic lengths of long_context_32k; the bound is rows without padding.
"""

import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data_pipeline.best_fit import pack_lengths
from data_pipeline.prepare import prepare
from data_pipeline.tokenizer import Tokenizer, fetch_tokenizer

if TYPE_CHECKING:  # workers import this file, so functions import torch and hydra
    from trainer.settings.config import RunConfig


def timed(act: Callable[[], object]) -> tuple[float, float]:
    """Wall seconds, and CPU seconds of this process and its children."""
    before = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    started = time.perf_counter()
    act()
    wall = time.perf_counter() - started
    after = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return wall, sum(
        b.ru_utime + b.ru_stime - a.ru_utime - a.ru_stime for a, b in zip(before, after, strict=True)
    )


def encode_alone(serialized: str, texts: list[str]) -> int:
    """The number of tokens of the texts, only encoded, in batches of a megabyte as in prepare."""
    tokenizer, tokens, batch, size = Tokenizer(serialized, ""), 0, [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= 1 << 20:
            tokens += sum(map(len, tokenizer.encode_batch(batch)))
            batch, size = [], 0
    return tokens + sum(map(len, tokenizer.encode_batch(batch)))


def bench_prepare(path: str, tokenizer: str, workers: int = 1) -> None:
    lines = Path(path).read_bytes().splitlines(keepends=True)
    seconds = np.array([measure_prepare(part, tokenizer, workers) for part in (lines[::3], lines)])
    more = seconds[1] - seconds[0]  # for two thirds of the text, without any startup
    megabytes = sum(map(len, lines)) / 1e6
    for name, (ours, theirs), (ours_more, theirs_more) in zip(
        ("wall", "CPU"), seconds[1].T, more.T, strict=True
    ):
        print(
            f"{megabytes:.0f} MB, {workers} workers, {name} seconds: prepare {ours:.1f}, alone {theirs:.1f}:"
        )
        print(f"ratio {theirs / ours:.2f} with startup, {theirs_more / ours_more:.2f} without")


def measure_prepare(lines: list[bytes], tokenizer: str, workers: int) -> list[tuple[float, float]]:
    """(wall, CPU) seconds of prepare and of encode_batch_fast alone."""
    overrides = f"data.tokenizer={tokenizer}", "data.tokenizer_vocab_size=null", f"data.num_workers={workers}"
    config = load(*overrides)
    texts = [json.loads(line)["text"] for line in lines]
    serialized = fetch_tokenizer(tokenizer).serialized
    if workers > 1:
        os.environ["RAYON_NUM_THREADS"] = "1"

    def alone() -> None:
        if workers == 1:
            encode_alone(serialized, texts)
            return
        with ProcessPoolExecutor(workers) as pool:
            list(pool.map(encode_alone, [serialized] * workers, [texts[i::workers] for i in range(workers)]))

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "text.jsonl").write_bytes(b"".join(lines))
        source = replace(next(iter(config.data.sources.values())), kind="jsonl", text_key="text")
        source = replace(source, paths=[f"{folder}/text.jsonl"])
        data = replace(config.data, dir=f"{folder}/data", sources={"text": source}, slice_bytes=1 << 22)
        ours = timed(lambda: prepare(data, 1 << 20, 0))
    return [ours, timed(alone)]


def bench_load() -> None:
    from data_pipeline.loader import Loader

    config = load("experiment=demo")
    lines = (json.loads(line) for line in Path("runs/demo/metrics.jsonl").read_text().splitlines())
    trained = max(line["tokens_per_second"] for line in lines if "loss" in line)
    shape = {"global_batch_size": 16, "micro_batch_size": 8, "rank": 0, "world_size": 2}
    with Loader(config.data, seq_len=config.stage.seq_len, seed=0, **shape) as loader:
        next(loader)

        def read() -> None:
            for _ in range(300):
                next(loader)

        wall, cpu = timed(read)
    tokens = 300 * shape["global_batch_size"] // shape["world_size"] * config.stage.seq_len
    print(f"loader of one rank {tokens / wall:,.0f} tokens/s ({tokens / cpu:,.0f} per CPU second),")
    print(f"trainer {trained / 2:,.0f} tokens/s per rank: {tokens / wall * 2 / trained:.0f} times as fast")


def bench_pack(seq_len: int = 32768) -> None:
    chance = np.random.default_rng(0)
    for name, (low, high, share) in {"16-32K": (16384, 32769, 1.0), "jointly": (4096, 16384, 0.25)}.items():
        lengths = np.exp(chance.uniform(np.log(16384), np.log(32769), 200_000)).astype(np.int64)
        if share < 1:
            short = np.exp(chance.uniform(np.log(low), np.log(high), 2_000_000)).astype(np.int64)
            taken = np.searchsorted(np.cumsum(short), lengths.sum() * share / (1 - share))
            lengths = np.concatenate([lengths, short[:taken]])
        counts = np.bincount(lengths, minlength=seq_len + 2)
        bins = pack_lengths(counts, seq_len + 1).total
        print(f"{name}: {len(lengths):,} lengths, {1 - lengths.sum() / (bins * (seq_len + 1)):.2%} padding")


def load(*overrides: str) -> "RunConfig":
    from hydra import compose, initialize_config_module

    from trainer.settings.config import RunConfig

    with initialize_config_module("conf", version_base="1.3"):
        return RunConfig.load(compose("train", ["experiment=demo", *overrides]))


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    if command == "prepare":
        bench_prepare(*arguments[:2], *map(int, arguments[2:]))
    elif command == "load":
        bench_load()
    else:
        bench_pack(*map(int, arguments))
