"""The tables in the documentation show the stored measurements."""

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


def test_the_tables_of_the_gpu_are_those_of_its_benchmark(repository, monkeypatch):
    monkeypatch.syspath_prepend(str(repository / "tests/bench"))
    for name in ("tables", "gpu_tables"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    from gpu_tables import show

    measured = repository / "docs/bench-gpu.json"
    shown = show(json.loads(measured.read_text()) if measured.exists() else {})
    page = (repository / "docs/performance.md").read_text()
    assert f"<!-- bench-gpu -->\n{shown}\n<!-- end of bench-gpu -->" in page
