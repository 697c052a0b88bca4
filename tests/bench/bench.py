"""`make bench`, or `python tests/bench/bench.py [SECTION ...]`: speed against the alternatives of a user.

Sections: equality, startup, one_rank, two_ranks, scaling. Every contender runs in its own process, in rounds,
so that a slow minute of the machine affects all of them; the best step of all rounds counts. Writes the
measured sections of docs/bench.json and the tables of docs/performance.md. Takes half an hour on two cores,
longer without bf16 instructions; nothing else may run on the machine.
"""

import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tables import show
from work import Work

from trainer.ranks.launch import ON_CPU

HERE = Path(__file__).parent
RESULTS = HERE.parent.parent / "docs" / "bench.json"
PAGE, BEGIN, END = RESULTS.with_name("performance.md"), "<!-- bench -->", "<!-- end of bench -->"
PEER = HERE.parent.parent / "build" / "transformers-5.22"  # AutoEP does not work with newer versions
TUNED = "our malloc settings"
ASIDE = (f"transformers, {TUNED}", "deepspeed.moe")
ROUNDS = 2
SECONDS = 300  # a contender that takes longer is stopped


def run(name: str, ranks: int = 1, tuned: bool = True, **work: Any) -> dict[str, Any] | None:
    """One run of a contender; None if it did not finish. `tuned`: with the launcher's settings of malloc."""
    environment = {**os.environ, **(ON_CPU if tuned else {}), "WORLD_SIZE": str(ranks)}
    environment["OMP_NUM_THREADS"] = str(max(1, work.pop("threads", os.cpu_count() or 1) // ranks))
    if name == "autoep":
        environment["PYTHONPATH"] = f"{PEER}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    command = [sys.executable, str(HERE / "contender.py"), name, *(f"{k}={v}" for k, v in work.items())]
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in range(ranks):
            out = Path(folder, f"{rank}.out").open("w")  # noqa: SIM115
            err = Path(folder, f"{rank}.err").open("w")  # noqa: SIM115
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(subprocess.Popen(command, env=environment | place, stdout=out, stderr=err))
        try:
            codes = [process.wait(max(1, SECONDS + started - time.monotonic())) for process in processes]
        except subprocess.TimeoutExpired:
            codes = [None]
        finally:
            for process in processes:
                process.kill()
                process.wait()
        lines = Path(folder, "0.out").read_text().splitlines()
        if any(codes):
            print(Path(folder, "0.err").read_text()[-2000:], file=sys.stderr)
    print(
        f"  {name} {' '.join(command[3:])} x{ranks}: {time.monotonic() - started:.0f} s, {codes}", flush=True
    )
    return json.loads(lines[-1]) if not any(code != 0 for code in codes) else None


def best(runs: list[dict[str, Any] | None]) -> dict[str, Any]:
    """Of several runs of one contender: its fastest step, its peak memory, its first losses."""
    done = [result for result in runs if result is not None]
    if not done:
        return {"seconds": None, "gave_up_after_seconds": SECONDS}
    tokens = done[0]["rows"] * done[0]["seq_len"]
    seconds = min(min(result["seconds"]) for result in done)
    return {
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "peak_gib": max(result["peak_gib"] for result in done),
        "work_gib": max(result["peak_gib"] - result["imported_gib"] for result in done),
        "losses": done[0]["losses"][:4],
        "parts": done[-1]["parts"],
    }


def compete(contenders: dict[str, dict[str, Any]], **work: Any) -> dict[str, Any]:
    """The best of ROUNDS rounds of every contender; one that does not finish is not run again.

    Without bf16 instructions a step of a peer takes minutes, so those in ASIDE are left out, others do one.
    """
    slow = work["dtype"] == "bf16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if slow:
        contenders = {name: keys for name, keys in contenders.items() if name not in ASIDE}
    runs: dict[str, list[dict[str, Any] | None]] = {name: [] for name in contenders}
    for turn in range(ROUNDS):
        for name, keys in contenders.items():
            once = slow and keys["name"] != "ours"
            if None not in runs[name] and not (once and turn):
                runs[name].append(run(**(keys | work), **({"warm_up": 0, "steps": 1} if once else {})))
    return {name: best(results) for name, results in runs.items()}


def equality() -> dict[str, float]:
    """The largest relative difference to transformers' loss and gradients, from the same weights, in fp32."""
    result = subprocess.run(
        [sys.executable, str(HERE / "equal.py")], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(result.stdout.splitlines()[-1])


def one_rank() -> dict[str, Any]:
    """The reference work on one rank, all threads."""
    ours = {"name": "ours", "parts": 1}
    contenders: dict[str, dict[str, Any]] = {
        "ours": ours,
        "transformers": {"name": "transformers", "tuned": False},
        f"transformers, {TUNED}": {"name": "transformers"},
        "deepspeed.moe": {"name": "deepspeed_moe"},
    }
    results = {dtype: compete(contenders, dtype=dtype) for dtype in ("fp32", "bf16")}
    return {"peak_tflops": peaks(), "flops": flops(Work()), **results}


def two_ranks() -> dict[str, Any]:
    """EP=2 on two ranks of one thread, and one rank of one thread."""
    ours, autoep = {"name": "ours", "ranks": 2}, {"name": "autoep", "ranks": 2}
    contenders: dict[str, dict[str, Any]] = {
        "ours": ours | {"parts": 1},
        "ours, one rank": {"name": "ours", "threads": 1},
        "AutoEP, ZeRO-1": autoep | {"tuned": False, "zero_stage": 1},
    }
    more: dict[str, dict[str, Any]] = {
        "ours, tokens in two chunks": ours | {"chunks": 2},
        "ours, ZeRO-1": ours | {"zero_stage": 1},
        "AutoEP": autoep | {"tuned": False},
        f"AutoEP, {TUNED}": autoep,
    }
    return {"fp32": compete(contenders | more, dtype="fp32"), "bf16": compete(contenders, dtype="bf16")}


def scaling() -> dict[str, Any]:
    """Seconds of our step in fp32 as one size grows, and the exponent fitted to them."""
    series: dict[str, list[tuple[int, dict[str, Any]]]] = {
        "tokens": [(512 * 2**n, {"rows": 2**n, "seq_len": 512, "document": 512}) for n in range(6)],
        "experts": [(16 * 2**n, {"experts": 16 * 2**n}) for n in range(6)],
        "top_k": [(k, {"top_k": k}) for k in (1, 2, 4, 8, 16)],
        "sequence length, documents of 1K": [
            (length, {"rows": 1, "seq_len": length}) for length in (1024, 4096, 16384, 32768)
        ],
        "sequence length, one document": [
            (length, {"rows": 1, "seq_len": length, "document": length})
            for length in (1024, 4096, 16384, 32768)
        ],
    }
    return {name: grow(points, 1 if "length" in name else ROUNDS) for name, points in series.items()}


def grow(points: list[tuple[int, dict[str, Any]]], rounds: int) -> dict[str, Any]:
    """The best step of each point, the exponent fitted to all of them, and that of the last two."""
    base = {"dtype": "fp32", "layers": 2, "experts": 64, "vocab": 4096, "seq_len": 1024}
    runs: list[list[dict[str, Any] | None]] = [[] for _ in points]
    for _ in range(rounds):
        for (_, keys), results in zip(points, runs, strict=True):
            results.append(run("ours", **(base | keys)))
    timed = [(size, best(results)["seconds"]) for (size, _), results in zip(points, runs, strict=True)]
    done = [(size, took) for size, took in timed if took is not None]
    (size, took), (last_size, last) = done[-2:]
    return {
        "points": timed,
        "exponent": slope([math.log(size) for size, _ in done], [math.log(took) for _, took in done]),
        "exponent of the last doubling": math.log(last / took) / math.log(last_size / size),
    }


def slope(x: list[float], y: list[float]) -> float:
    """The slope of the least-squares line."""
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    products = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return products / sum((a - mean_x) ** 2 for a in x)


def startup() -> dict[str, float]:
    """Seconds of commands as a user types them; preparing the embedded corpus is not counted."""
    demo = ["experiment=demo", "checkpoint.every_steps=1000", "evaluate.every_steps=0"]
    with tempfile.TemporaryDirectory() as folder:
        one_step = [
            *demo,
            "stage.train_tokens=2048",
            "schedule.warmup_steps=0",
            f"output_dir={folder}",
            "tracker.wandb=disabled",
        ]
        commands = {
            "trainer --help": ["trainer", "--help"],
            "slurm --help": ["slurm", "--help"],
            "a refused configuration": ["trainer", *demo, "parallel.ep_size=3"],
            "slurm dry run": ["slurm", *demo, "slurm=local", "slurm.dry_run=true", f"output_dir={folder}"],
            "trainer.models": ["trainer.models"],
            "one step of the demo, from the prompt to the prompt": ["trainer", *one_step, "name=one"],
        }
        subprocess.run([sys.executable, "-m", "data_pipeline", *demo], check=True, capture_output=True)
        result = {}
        for name, command in commands.items():
            times = []
            for attempt in range(3):
                words = [word if word != "name=one" else f"name=one{attempt}" for word in command]
                started = time.perf_counter()
                done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True)
                if done.returncode != (2 if "refused" in name else 0):
                    sys.exit(f"{' '.join(words)} ended with {done.returncode}: {done.stderr[-2000:]}")
                times.append(time.perf_counter() - started)
            result[name] = min(times)
    return result


def peaks() -> dict[str, float]:
    """TFLOP/s of the largest matrix products, measured as the trainer does, under its settings."""
    from trainer.engine.cpu_products import fast_products
    from trainer.monitor.hardware import peak_flops

    device, result = torch.device("cpu"), {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        with fast_products(device, dtype):
            result[name] = max(peak_flops(device, dtype) for _ in range(5)) / 1e12
    return result


def flops(work: Work) -> float:
    """Model FLOPs of a step."""
    from moe.config import ModelConfig

    model = ModelConfig.from_hf({"model_type": "qwen3_moe", **work.model_keys()})
    return model.flops_per_token(work.seq_len) * work.rows * work.seq_len


def main(sections: list[str]) -> None:
    """Measure, write, show."""
    known = {function.__name__: function for function in (equality, startup, one_rank, two_ranks, scaling)}
    if unknown := set(sections) - set(known):
        sys.exit(f"unknown: {', '.join(unknown)}; sections are {', '.join(known)}")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the page shows figures of a CPU
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in sections or known:
        print(f"{name} ...", flush=True)
        results[name] = known[name]()
        cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        flags = next((line.split() for line in cpu.splitlines() if line.startswith("flags")), [])
        best_flags = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
        results["machine"] = {"cpus": os.cpu_count(), "cpu": platform.machine(), "instructions": best_flags}
        whole = RESULTS.with_suffix(".new")
        whole.write_text(json.dumps(results, indent=1) + "\n")
        whole.replace(RESULTS)
    tables = show(results)
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{tables}\n{END}{rest.split(END)[1]}")
    print(tables)


if __name__ == "__main__":
    main(sys.argv[1:])
