"""The results of the benchmark as Markdown tables."""

from typing import Any


def show(results: dict[str, Any]) -> str:
    """The tables of docs/performance.md for the sections that were measured."""
    sections = {
        "equality": _equality,
        "one_rank": _one_rank,
        "two_ranks": _two_ranks,
        "scaling": _scaling,
        "startup": _startup,
    }
    machine = results["machine"]
    where = f"On {machine['cpus']} {machine['cpu']} cores with {', '.join(machine['instructions'])}."
    return "\n\n".join(
        [where, *(render(results[name]) for name, render in sections.items() if name in results)]
    )


def table(head: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def _equality(found: dict[str, float]) -> str:
    return (
        f"Loss {found['loss']:.6f}; relative difference to transformers' {found['loss difference']:.1e}, "
        f"of gradients {found['gradient difference']:.1e} at most, in fp32."
    )


def _contenders(found: dict[str, Any], mine: str) -> list[list[Any]]:
    rows = []
    for name, result in found.items():
        if result["seconds"] is None:
            rows.append([name, f"not in {result['gave_up_after_seconds']} s", "", "", "", ""])
            continue
        ratio = result["seconds"] / found[mine]["seconds"]
        memory = found[mine]["peak_gib"] / result["peak_gib"]
        cells = [f"{result['seconds']:.2f}", f"{result['tokens_per_second']:,.0f}", f"{ratio:.2f}"]
        rows.append([name, *cells, f"{result['peak_gib']:.2f}", f"{memory:.2f}"])
    return rows


def _parts(parts: dict[str, float]) -> str:
    total = sum(parts.values())
    rows = [[name, f"{took:.2f}", f"{took / total:.0%}"] for name, took in parts.items()]
    return table(["part", "s", "share"], sorted(rows, key=lambda row: -float(row[1])))


HEAD = ["contender", "s per step", "tokens/s", "we are faster by", "peak GiB", "our share of it"]


def _one_rank(found: dict[str, Any]) -> str:
    blocks = []
    for dtype in ("fp32", "bf16"):
        mine, peak = found[dtype]["ours"], found["peak_tflops"][dtype]
        share = found["flops"] / mine["seconds"] / 1e12 / peak
        blocks.append(f"One rank, {dtype}: {share:.0%} of the largest matrix product's {peak:.3f} TFLOP/s.")
        blocks.append(table(HEAD, _contenders(found[dtype], "ours")))
        blocks.append(_parts(mine["parts"]))
    return "\n\n".join(blocks)


def _two_ranks(found: dict[str, Any]) -> str:
    blocks = []
    for dtype, contenders in found.items():
        mine, alone = contenders["ours"], contenders["ours, one rank"]
        efficiency = alone["seconds"] / mine["seconds"] / 2
        blocks.append(f"Two ranks of one thread, EP=2, {dtype}: scaling efficiency {efficiency:.2f}.")
        blocks.append(table(HEAD, _contenders(contenders, "ours")))
        blocks.append(_parts(mine["parts"]))
    return "\n\n".join(blocks)


def _scaling(found: dict[str, Any]) -> str:
    rows = []
    for name, series in found.items():
        points = ", ".join(f"{size:,}: {took:.2f}" for size, took in series["points"] if took)
        rows.append(
            [name, f"{series['exponent']:.2f}", f"{series['exponent of the last doubling']:.2f}", points]
        )
    return table(["as this grows", "exponent", "at the end", "seconds per step"], rows)


def _startup(found: dict[str, float]) -> str:
    return table(["command", "s"], [[name, f"{took:.2f}"] for name, took in found.items()])
