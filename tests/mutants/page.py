"""docs/mutants.json, what became of each mutant when it was last judged, and its table in docs/testing.md."""

import json

from faults import ROOT, tables

RESULTS, PAGE = ROOT / "docs" / "mutants.json", ROOT / "docs" / "testing.md"
BEGIN, END = "<!-- mutants -->\n", "<!-- end of mutants -->"
KINDS = ("by hand", "generated")

Results = dict[str, dict[str, dict[str, str]]]  # file -> one of KINDS -> what was changed -> result


def known() -> Results:
    """The results so far, without those of faults that are no longer in the tables."""
    stored = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results: Results = {}
    for table in tables():
        of = stored.get(table.file, {})
        judged = {f.what: of["by hand"][f.what] for f in table.faults if f.what in of.get("by hand", {})}
        results[table.file] = {"by hand": judged, "generated": of.get("generated", {})}
    return results


def write_page(results: Results) -> None:
    """Replace the stored results and the table of the page."""
    RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}{show(results)}{END}{rest.partition(END)[2]}")


def show(results: Results) -> str:
    """The table and the survivors. A generated change that cannot be imported tests nothing: left out."""
    lines = ["| file | written by hand: caught | generated: caught |", "|---|---|---|"]
    counts = {file: {kind: _count(of[kind]) for kind in KINDS} for file, of in results.items()}
    counts["all"] = {kind: [sum(of[kind][i] for of in counts.values()) for i in (0, 1)] for kind in KINDS}
    for file, of in counts.items():
        lines.append(f"| {file} | {' | '.join('{} of {}'.format(*of[kind]) for kind in KINDS)} |")
    lines += ["", "Survivors:", ""]
    for file, kinds in results.items():
        alive = [what for kind in KINDS for what, result in kinds[kind].items() if result == "survived"]
        lines += [f"- {file}: {what}" for what in alive]
    return "\n".join([*lines, ""])


def _count(judged: dict[str, str]) -> list[int]:
    results = [result for result in judged.values() if result != "broken"]
    return [results.count("caught"), len(results)]
