"""The results of `make bench-gpu` as Markdown tables."""

import re
from typing import Any

from tables import table

LAYERS = 48  # of Qwen3-30B-A3B
Figures = list[dict[str, Any]]


def show(results: dict[str, Any]) -> str:
    """The tables of docs/performance.md for the sections that were measured."""
    if "card" not in results:
        return "Not measured yet."
    card = results["card"]
    where = f"On one {card['name']} ({card['gib']:.0f} GiB), torch {card['torch']}."
    if card["tiny"]:
        where += " A rehearsal with tiny shapes: no figure means anything."
    sections = {
        "ceilings": lambda found: _ceilings(found),
        "step": lambda found: _step(found, card["peak"]),
        "parts": _parts,
        "kernels": _kernels,
        "experts": lambda found: _alone("experts", found, results, "tokens"),
        "attention": lambda found: _alone("attention", found, results, "documents", "longest"),
        "cross_entropy": lambda found: _alone("cross entropy", found, results, "tokens"),
        "router": lambda found: _alone("router", found, results, "tokens"),
    }
    return "\n\n".join(
        [where, *(render(results[name]) for name, render in sections.items() if results.get(name))]
    )


def _ceilings(found: Figures) -> str:
    return table(
        ["ceiling", "rate"], [[line["name"], f"{line['rate']:.3g} {line['unit']}"] for line in found]
    )


def _step(found: Figures, peak: float) -> str:
    """A line for each contender and its settings; the two depths give the time of a layer."""
    lines: dict[tuple, dict[int, dict[str, Any]]] = {}
    for figure in found:
        if "recompute" not in figure:  # the model did not fit
            continue
        settings = (
            figure["recompute"],
            figure["micro_batches"],
            figure.get("balance_mode"),
            figure.get("passes"),
        )
        lines.setdefault((figure["contender"], *settings), {})[figure["layers"]] = figure
    rows = []
    for (contender, recompute, micro_batches, mode, passes), depths in lines.items():
        low, high = min(depths), max(depths)
        name = contender + (f", {mode}" if mode else "") + (f", {passes}'s passes" if passes else "")
        cells: list[Any] = [name, recompute, micro_batches]
        took = {depth: figure["seconds"] for depth, figure in depths.items()}
        peaks = (depths[high].get("peak_gib"), depths[low].get("peak_gib"))
        cells += [_ms(took, high), _ms(took, low)]
        if low == high or None in took.values():
            rows.append([*cells, *[""] * 5, *_gib(*peaks)])
            continue
        layer = (took[high] - took[low]) / (high - low)
        fixed = took[low] - low * layer
        whole, figure = fixed + LAYERS * layer, depths[high]
        tokens = figure["rows"] * figure["seq_len"] * micro_batches
        rate = figure["flops_48"] / whole
        cells += [
            f"{1000 * layer:.1f}",
            f"{1000 * fixed:.0f}",
            f"{tokens / whole:,.0f}",
            f"{rate / 1e12:.0f}",
        ]
        rows.append([*cells, f"{rate / peak:.1%}", *_gib(*peaks)])
    figure = found[0]
    shape = f"A step of bf16 at two depths, and with all {LAYERS} layers as they give it"
    if "rows" in figure:
        shape += f"; a micro-batch is {figure['rows']} x {figure['seq_len']:,} tokens"
    head = [
        "contender",
        "recompute",
        "micro-batches",
        "ms (layers)",
        "ms (layers)",
        "ms per layer",
        "ms fixed",
    ]
    head += ["tokens/s", "TFLOP/s", "MFU", "peak GiB", "peak GiB"]
    return f"{shape}.\n\n{table(head, rows)}"


def _ms(took: dict[int, float | None], depth: int) -> str:
    seconds = took[depth]
    return f"{'out of memory' if seconds is None else f'{1000 * seconds:.0f}'} ({depth})"


def _gib(*peaks: float | None) -> list[str]:
    return ["" if peak is None else f"{peak:.1f}" for peak in peaks]


def _parts(found: Figures) -> str:
    lines = []
    for figure in found:
        total = sum(figure["seconds"].values())
        rows = sorted(figure["seconds"].items(), key=lambda item: -item[1])
        cells = [[name, f"{1000 * took:.1f}", f"{took / total:.0%}"] for name, took in rows]
        head = [f"part of our step, {figure['layers']} layers", "ms", "share"]
        lines.append(table(head, [*cells, ["sum", f"{1000 * total:.1f}", "100%"]]))
    return "\n\n".join(lines)


def _kernels(found: Figures) -> str:
    lines = []
    for figure in found:
        total = sum(figure["kinds"].values())
        rows = sorted(figure["kinds"].items(), key=lambda item: -item[1])
        cells = [[name, f"{took:.1f}", f"{took / total:.0%}"] for name, took in rows]
        cells.append([f"sum, of {figure['wall_ms']:.0f} ms with the profiler on", f"{total:.1f}", "100%"])
        lines.append(table([f"kernels of our step, {figure['layers']} layers", "ms", "share"], cells))
        top = [[f"`{_short(name)}`", f"{took:.2f}", calls] for name, took, calls in figure["top"][:15]]
        lines.append(table(["kernel", "ms", "calls"], top))
    return "\n\n".join(lines)


def _short(name: str) -> str:
    """The words in a kernel's name, including its templates, that say what it does."""
    if "GroupProblemShape" in name:
        return "cutlass, grouped product"
    words = re.findall(r"(?<!\w)\w*(?:kernel|Kernel|Functor|Adam|gemm|nvjet|fill|copy|Copy)\w*", name)
    words = [word for word in dict.fromkeys(words) if not word.startswith("_Z")] or [name]
    return " ".join(words)[:90].replace("|", "/").replace("`", "'")


def _alone(part: str, found: Figures, results: dict[str, Any], *sizes: str) -> str:
    """Times of forward, and of forward and backward, beside the time at the rate of the largest product."""
    product = next((line["rate"] for line in results.get("ceilings", []) if "bfloat16" in line["name"]), None)
    copy = next((line["rate"] for line in results.get("ceilings", []) if line["name"] == "copy"), None)
    rows = []
    for figure in found:
        cells = [figure["name"], *(f"{figure[size]:,}" for size in sizes)]
        if figure["forward_ms"] is None:
            rows.append([*cells, figure["why"], "", "", "", ""])
            continue
        flops = figure["flops"] * (1 + figure["backward"])
        floor = None if product is None else flops / product / 1e9
        if floor is not None and copy is not None:  # the logits are written once and read once
            floor += 2 * figure.get("logits_bytes", 0) / copy / 1e9
        cells += [
            f"{figure['forward_ms']:.2f}",
            f"{figure['both_ms']:.2f}",
            "" if floor is None else f"{floor:.2f}",
        ]
        rows.append([*cells, f"{flops / figure['both_ms'] / 1e9:.0f}", f"{figure['kept'] / 2**20:.0f}"])
    head = [
        f"{part} alone",
        *sizes,
        "forward ms",
        "with backward ms",
        "floor ms",
        "TFLOP/s",
        "kept MiB",
    ]
    return table(head, rows)
