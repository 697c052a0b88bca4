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
    head = ["file", "faults by hand", "judged", "caught", "generated", "caught"]
    rows = []
    for table in tables():
        kinds = results[table.file]
        judged = [list(kinds[kind].values()) for kind in KINDS]
        drawn = [result for result in judged[1] if result != "broken"]
        counts = [len(table.faults), len(judged[0]), judged[0].count("caught")]
        rows.append([table.file, *counts, len(drawn), drawn.count("caught")])
    rows.append(["all", *(sum(column) for column in list(zip(*rows, strict=True))[1:])])
    lines = [f"| {' | '.join(map(str, row))} |" for row in [head, ["---"] * len(head), *rows]]
    lines += ["", "Survivors:", ""]
    for file, kinds in results.items():
        alive = [what for kind in KINDS for what, result in kinds[kind].items() if result == "survived"]
        lines += [f"- {file}: {what}" for what in alive]
    return "\n".join([*lines, ""])
