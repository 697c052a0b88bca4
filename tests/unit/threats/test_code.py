"""No file of the product asks a shell, or reads what can run code."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PACKAGES = ("conf", "data_pipeline", "moe", "slurm", "trainer")


FORBIDDEN = {"pickle", "cPickle", "dill", "marshal", "shelve", "joblib", "jinja2", "transformers"}
CALLS = {"os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "eval", "exec", "subprocess.getoutput"}
KEYWORDS = {"shell", "allow_pickle", "trust_remote_code"}
TEMPLATES = ROOT / "data_pipeline/sandbox.py"  # its tests: tests/unit/data_pipeline/test_sandbox.py
SANDBOX = ROOT / "trainer/verifiers/sandbox.py"  # a script of its own process, made to run what a model wrote


@pytest.mark.parametrize("package", PACKAGES)
def test_no_file_of_the_product_asks_a_shell_or_reads_a_pickle(package: str) -> None:
    for path in sorted((ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            where = f"{path}:{getattr(node, 'lineno', '')}"
            if isinstance(node, ast.Import | ast.ImportFrom):
                module = getattr(node, "module", None)
                names = {module or ""} | {alias.name for alias in node.names}
                allowed = {"jinja2"} if path == TEMPLATES else set()
                assert not {name.partition(".")[0] for name in names} & FORBIDDEN - allowed, where
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                given = {key.arg: ast.unparse(key.value) for key in node.keywords}
                assert called not in CALLS or (called, path) == ("exec", SANDBOX), where
                assert not KEYWORDS & given.keys(), where
                assert called != "torch.load" or given.get("weights_only") == "True", where


def test_nothing_imports_the_file_that_runs_programs() -> None:
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            assert "verifiers.sandbox" not in path.read_text(), path


def test_the_job_script_evaluates_only_the_lines_of_setup() -> None:
    lines = (ROOT / "slurm/job.sh").read_text().splitlines()
    assert [line for line in lines if "eval " in line] == [
        'for line in "${SETUP[@]}"; do eval "$line" || give_up "slurm.setup failed: $line"; done'
    ]
