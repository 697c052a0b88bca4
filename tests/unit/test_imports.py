"""Who may import what, and how large a room may grow. The rooms of the house keep to themselves."""

import ast
import os
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STANDARD = sys.stdlib_module_names


class Room:
    """The rooms that it may ask beside itself, the packages that it may import, its lines at most."""

    def __init__(self, rooms: str, packages: str, lines: int) -> None:
        self.rooms, self.packages, self.lines = set(rooms.split()), set(packages.split()), lines


_BELOW = "moe moe/kernels data_pipeline trainer/settings"
# From the bottom to the top. A file belongs to the longest name that its path begins with.
ROOMS = {
    "conf": Room("", "", 10),
    "moe/kernels": Room("", "torch triton", 750),
    "moe": Room("moe/kernels", "torch safetensors", 4080),
    "data_pipeline": Room("", "numpy torch rich", 5620),
    "trainer/settings": Room("moe data_pipeline", "omegaconf hydra yaml", 1660),
    "trainer/verifiers": Room("trainer/settings", "", 770),
    "trainer/ranks": Room(_BELOW, "torch numpy", 600),
    "trainer/engine": Room(f"{_BELOW} trainer/ranks", "torch", 1250),
    "trainer/stages": Room(f"{_BELOW} trainer/verifiers trainer/ranks trainer/engine", "torch numpy", 1660),
    "trainer/monitor": Room(f"{_BELOW} trainer/ranks trainer/engine", "torch numpy rich yaml", 1240),
    "trainer/checkpoints": Room(f"{_BELOW} trainer/ranks trainer/engine trainer/monitor", "torch", 1100),
    "trainer": Room(  # the loop and the doors
        f"{_BELOW} trainer/ranks trainer/engine trainer/stages trainer/monitor trainer/checkpoints",
        "torch omegaconf hydra yaml rich",
        1450,
    ),
    "slurm": Room(_BELOW, "omegaconf hydra rich", 1200),
}
# The few files that may do what their room may not.
EXTRA = {
    "data_pipeline/__main__.py": {"moe", "trainer/settings", "omegaconf"},  # a door: it composes a run
    "data_pipeline/files.py": {"fsspec"},
    "data_pipeline/look.py": {"yaml"},
    "data_pipeline/overlap.py": {"datasketch"},
    "data_pipeline/sandbox.py": {"jinja2"},
    "data_pipeline/readers.py": {"datasets", "pyarrow"},
    "data_pipeline/prepare.py": {"datasets", "pyarrow", "tokenizers"},
    "data_pipeline/tokenizer.py": {"tokenizers"},
    "data_pipeline/chat.py": {"tokenizers"},
    "slurm/health.py": {"torch"},  # runs on the nodes
    "trainer/engine/engine.py": {"deepspeed"},
    "trainer/engine/gradients.py": {"deepspeed"},
    "trainer/engine/zero3.py": {"deepspeed"},
    "trainer/verifiers/math.py": {"math_verify"},
    "trainer/checkpoints/optimizer_state.py": {"safetensors"},
    "trainer/settings/hub.py": {"huggingface_hub"},
    "trainer/stages/lessons.py": {"safetensors"},
    "trainer/inspect.py": {"safetensors"},
    "trainer/stages/asked.py": {"lm_eval"},
    "trainer/stages/benchmarks.py": {"lm_eval"},
    "trainer/monitor/tracker.py": {"wandb"},
    "trainer/monitor/report.py": {"matplotlib"},
    "moe/gated_delta_net.py": {"fla"},
    "moe/experts_optional.py": {"megablocks", "liger_kernel"},
}
PACKAGES = {room.partition("/")[0] for room in ROOMS}
TORCH_FREE = [
    "moe.config",
    "data_pipeline.config",
    "trainer.settings.config",
    "trainer.settings.parallel",
    "trainer.settings.command",
    "trainer.settings.rl",
    "trainer.verifiers.scorer",
    "trainer.ranks.launch",
    "trainer.__main__",
    "trainer.resume",
    "trainer.inspect",
    "slurm.submit",
    "slurm.status",
    "slurm.stop",
    "slurm.resume",
    "slurm.logs",
    "slurm.prepare",
    "trainer.models",
    "trainer.report",
]


def product_files() -> list[Path]:
    return [path for package in sorted(PACKAGES) for path in sorted((ROOT / package).rglob("*.py"))]


def room_of(path: Path) -> str:
    name = path.relative_to(ROOT).as_posix()
    return max((room for room in ROOMS if name.startswith(f"{room}/")), key=len)


def imported(path: Path) -> set[str]:
    """The modules that a file imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.partition(".")[0] not in STANDARD}


def file_of(module: str) -> Path | None:
    """The product's file that a dotted name is, or is something in; None for another package's."""
    parts = module.split(".")
    if parts[0] not in PACKAGES:
        return None
    for end in (len(parts), len(parts) - 1):
        path = ROOT.joinpath(*parts[:end])
        if path.with_suffix(".py").is_file():
            return path.with_suffix(".py")
    return path / "__init__.py"


@pytest.mark.parametrize("path", product_files(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_import_only_what_their_room_may(path):
    room = ROOMS[room_of(path)]
    allowed = {room_of(path)} | room.rooms | room.packages
    allowed |= EXTRA.get(path.relative_to(ROOT).as_posix(), set())
    asked = {module: file_of(module) for module in imported(path)}
    for module, file in asked.items():
        assert (module.partition(".")[0] if file is None else room_of(file)) in allowed, module


def test_no_import_is_a_circle():
    graph = {path: {file_of(module) for module in imported(path)} - {None} for path in product_files()}
    list(TopologicalSorter(graph).static_order())  # raises CycleError


def test_every_folder_of_the_product_is_a_room():
    folders = {path.parent.relative_to(ROOT).as_posix() for path in product_files()}
    assert folders == set(ROOMS)


def test_rooms_are_in_order():
    """A room asks only rooms below it."""
    order = list(ROOMS)
    for name, room in ROOMS.items():
        assert all(order.index(asked) < order.index(name) for asked in room.rooms), name


def test_only_the_loop_and_the_doors_stand_at_the_top_of_trainer():
    doors = {path.stem for path in (ROOT / "trainer").glob("*.py")} - {"__init__", "train"}
    for door in doors:
        text = (ROOT / f"trainer/{door}.py").read_text()
        assert '__name__ == "__main__"' in text, f"{door} is no command"
        command = "python -m trainer" if door == "__main__" else f"python -m trainer.{door}"
        assert command in ast.get_docstring(ast.parse(text)), door


def import_without(modules: list[str], *packages: str) -> None:
    """Import modules in a new process, and fail with the first that brings one of the packages along."""
    code = f"""
import importlib, sys
for module in {modules}:
    importlib.import_module(module)
    brought = [package for package in {packages} if package in sys.modules]
    assert not brought, (module, brought)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=120)


def test_commands_that_read_a_checkpoint_need_no_deepspeed_and_no_compiler():
    """Its import takes seconds, as that of torch's compiler, and asks for CUDA before a device is chosen."""
    doors = ("evaluate", "generate", "benchmark", "export", "report", "inspect")
    import_without([f"trainer.{door}" for door in doors], "deepspeed", "torch._dynamo")


def test_ranks_prepare_to_compile_nothing():
    """ZeRO imports this module in the first step of a run."""
    import_without(
        ["trainer.train", "deepspeed.runtime.zero.muon.muon_optimizer"], "torch._inductor.compile_fx"
    )


def test_the_engine_leaves_the_variables_as_deepspeed_wants_them():
    """Its own, of how torch looks for GPUs; not that which keeps torch from compiling."""
    names = ("PYTORCH_NVML_BASED_CUDA_CHECK", "TORCHDYNAMO_DISABLE")
    clean = {key: value for key, value in os.environ.items() if key not in names}
    code = f"import os, trainer.engine.engine; print(*[os.environ.get(name) for name in {names}])"
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=ROOT, env=clean, stdout=subprocess.PIPE
    )
    assert done.stdout.split()[-2:] == [b"1", b"None"]


def test_a_login_node_needs_no_torch():
    import_without(TORCH_FREE, "torch", "datasets")


@pytest.mark.parametrize(
    "path",
    [path for path in product_files() if path.name == "__init__.py"],
    ids=lambda path: path.parent.relative_to(ROOT).as_posix(),
)
def test_init_files_hold_a_docstring_only(path):
    body = ast.parse(path.read_text()).body
    assert len(body) == 1
    assert ast.get_docstring(ast.parse(path.read_text()))


def test_files_and_functions_are_short():
    """Files under 350 lines, functions under 70, the loop under 100."""
    for path in product_files():
        text = path.read_text()
        assert text.count("\n") < 350, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                limit = 100 if node.name == "train" else 70
                assert node.end_lineno - node.lineno < limit, f"{path}: {node.name}"


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_keep_their_budgets(room):
    files = [path for path in product_files() if room_of(path) == room]
    files += sorted((ROOT / room).glob("*.sh"))
    assert sum(path.read_text().count("\n") for path in files) <= ROOMS[room].lines


def test_what_a_training_step_touches_is_read_in_an_afternoon():
    """docs/walk.md lists the files: they exist, and hold under 5,000 lines."""
    listed = (ROOT / "docs/walk.md").read_text().partition("## What a training step touches")[2]
    names = re.findall(r"`([\w/]+\.py)`", listed.partition("\n## ")[0])
    assert {"trainer/train.py", "trainer/engine/engine.py", "moe/model.py"} <= set(names)
    assert sum((ROOT / name).read_text().count("\n") for name in names) < 5000
