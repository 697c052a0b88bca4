"""Who may import what. The rooms of the house keep to themselves."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STANDARD = sys.stdlib_module_names
ALLOWED = {
    "moe": {"moe", "torch", "safetensors"},
    "data_pipeline": {"data_pipeline", "numpy", "torch", "rich"},
    "trainer": {"trainer", "moe", "data_pipeline", "torch", "numpy", "omegaconf", "hydra", "rich", "yaml"},
    "slurm": {"slurm", "trainer", "moe", "data_pipeline", "omegaconf", "hydra", "rich"},
    "conf": set(),
}
# the few files that may do what their room may not
EXTRA = {
    "data_pipeline/__main__.py": {"trainer", "omegaconf"},  # an entry point composes
    "data_pipeline/readers.py": {"datasets", "pyarrow"},
    "data_pipeline/prepare.py": {"datasets", "pyarrow", "tokenizers"},
    "data_pipeline/tokenizer.py": {"tokenizers"},
    "data_pipeline/chat.py": {"tokenizers"},
    "slurm/health.py": {"torch"},  # runs on the nodes
    "trainer/engine/engine.py": {"deepspeed"},
    "trainer/engine/gradients.py": {"deepspeed"},
    "trainer/checkpoints/optimizer_state.py": {"safetensors"},
    "trainer/inspect.py": {"safetensors"},
    "trainer/monitor/tracker.py": {"wandb"},
    "trainer/report.py": {"matplotlib"},
    "moe/gated_delta_net.py": {"fla"},
    "moe/experts_optional.py": {"megablocks", "liger_kernel"},
}
TORCH_FREE = [
    "moe.config",
    "data_pipeline.config",
    "trainer.settings.config",
    "trainer.settings.parallel",
    "trainer.cli",
    "trainer.inspect",
    "slurm.submit",
    "slurm.status",
    "slurm.stop",
    "slurm.resume",
    "slurm.logs",
    "trainer.models",
]


def imported(path: Path) -> set[str]:
    """Top-level names of the packages that a file imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add((node.module or "").split(".")[0])
    return names - STANDARD


@pytest.mark.parametrize("room", ALLOWED)
def test_rooms_import_only_what_they_may(room):
    for path in sorted((ROOT / room).rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        assert imported(path) <= ALLOWED[room] | EXTRA.get(name, set()), name


@pytest.mark.parametrize("module", TORCH_FREE)
def test_a_login_node_needs_no_torch(module):
    code = f"import {module}, sys; assert 'torch' not in sys.modules and 'datasets' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)


@pytest.mark.parametrize("path", sorted(ROOT.glob("*/__init__.py")), ids=lambda path: path.parent.name)
def test_init_files_hold_a_docstring_only(path):
    body = ast.parse(path.read_text()).body
    assert len(body) == 1
    assert ast.get_docstring(ast.parse(path.read_text()))


def product_files() -> list[Path]:
    return [path for room in ALLOWED for path in sorted((ROOT / room).rglob("*.py"))]


def test_budgets():
    """Files under 350 lines, functions under 70 (the loop under 120)."""
    for path in product_files():
        text = path.read_text()
        assert text.count("\n") < 350, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                limit = 120 if node.name == "train" else 70
                assert node.end_lineno - node.lineno < limit, f"{path}: {node.name}"


@pytest.mark.xfail(reason="the product has outgrown 9,000 lines and must be cut", strict=True)
def test_the_product_is_under_9000_lines():
    assert sum(path.read_text().count("\n") for path in product_files()) < 9000
