"""The table of mutants in docs/testing.md."""

from collections import defaultdict

from faults import ROOT

PAGE, BEGIN, END = ROOT / "docs" / "testing.md", "<!-- mutants -->", "<!-- end of mutants -->"

Judged = tuple[str, str, bool, str]  # file, what was changed, whether by cosmic-ray, result


def write_page(judged: list[Judged]) -> None:
    """Replace what is between the two marks of the page."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text("".join([before, BEGIN, "\n", *_table(judged), "\n", *_survivors(judged), END, after]))


def _table(judged: list[Judged]) -> list[str]:
    rooms: dict[str, list[Judged]] = defaultdict(list)
    for one in judged:
        rooms[one[0]].append(one)
    rooms["all"] = judged
    lines = ["| file | written by hand | caught | generated | caught |\n", "|---|---|---|---|---|\n"]
    for file, mutants in rooms.items():
        cells = [file]
        for generated in (False, True):  # a generated change that cannot be imported tests nothing
            kind = [one for one in mutants if one[2] is generated and not (generated and one[3] == "broken")]
            cells += [str(len(kind)), str(sum(one[3] == "caught" for one in kind))]
        lines.append(f"| {' | '.join(cells)} |\n")
    return lines


def _survivors(judged: list[Judged]) -> list[str]:
    alive = [one for one in judged if one[3] != "caught" and not (one[2] and one[3] == "broken")]
    lines = [f"- {file}: {what.replace('|', chr(92) + '|')}\n" for file, what, *_ in alive]
    return ["Survivors:\n", "\n", *lines] if lines else ["No mutant survived.\n"]
