"""What the documentation shows is what was measured."""

import json
import sys


def test_the_tables_of_performance_are_those_of_the_benchmark(repository, monkeypatch):
    monkeypatch.syspath_prepend(str(repository / "tests/bench"))
    monkeypatch.delitem(sys.modules, "tables", raising=False)
    from tables import show

    shown = show(json.loads((repository / "docs/bench.json").read_text()))
    assert (
        f"<!-- bench -->\n{shown}\n<!-- end of bench -->" in (repository / "docs/performance.md").read_text()
    )
