"""Every YAML that is shipped composes and breaks no law; every command in the documents is sound."""

import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module

from slurm.config import SubmitConfig
from trainer.config import RunConfig
from trainer.parallel import ParallelPlan
from trainer.typed import typed

ROOT = Path(__file__).parents[2]
GROUPS = sorted(
    folder.name
    for folder in (ROOT / "conf").iterdir()
    if folder.is_dir() and folder.name[0] != "_" and folder.name != "slurm"  # of submit: tests/unit/slurm
)
FILES = [
    (group, path.stem)
    for group in GROUPS
    for path in sorted((ROOT / "conf" / group).glob("*.yaml"))
    if not path.stem.startswith("_")
]
# what a user has to fill in
NO_START = ["stage.init_from=null"]  # the run of the stage before
NEEDED = {
    "data=jsonl": ["data.dir=d", "data.sources.text.paths=[x.jsonl]"],
    "stage=stem_code_4k": NO_START,
    **{
        f"stage={name}": [*NO_START, "model=qwen3_30b_a3b", "schedule.warmup_steps=100"]
        for name in ("long_context_32k", "sft")
    },
    **{f"experiment=demo_{name}": NO_START for name in ("stem_code", "long_context", "sft")},
    "experiment=demo_upcycle": [*NO_START, "init.upcycle=none"],
    **{f"experiment=qwen3_30b_a3b_{name}": NO_START for name in ("stem_code_4k", "long_context_32k", "sft")},
}
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def load(config_name: str, overrides: list[str]) -> RunConfig:
    with initialize_config_module("conf", version_base="1.3"):
        composed = compose(config_name, overrides=overrides)
    return typed(SubmitConfig if config_name == "submit" else RunConfig, composed)


@pytest.mark.parametrize(("group", "name"), FILES, ids=[f"{group}/{name}" for group, name in FILES])
def test_every_file_composes_and_is_lawful(group, name):
    choice = f"{group}={name}"
    named = [] if group == "experiment" else ["name=t"]
    config = load("train", [*named, choice, *NEEDED.get(choice, [])])
    config.check(ParallelPlan.of(config, config.parallel.nproc_per_node))


def test_prepare_has_the_groups_of_train():
    assert load("prepare", ["experiment=demo"]) == load("train", ["experiment=demo"])


def commands() -> list[tuple[str, list[str]]]:
    """(document, words) of every `python -m` line in a bash block."""
    found = []
    for document in DOCUMENTS:
        for block in re.findall(r"```bash\n(.*?)```", document.read_text(), re.S):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words[:2] == ["python", "-m"]:
                    found.append((document.name, words[2:]))
    return found


@pytest.mark.parametrize(("document", "words"), commands(), ids=lambda value: str(value)[:60])
def test_every_documented_command_is_sound(document, words):
    module, *arguments = words
    assert (ROOT / module.replace(".", "/")).is_dir() or (
        ROOT / f"{module.replace('.', '/')}.py"
    ).is_file(), words
    if module in ("trainer", "data_pipeline", "slurm"):
        if arguments[0] in ("inspect", "verify"):  # a row or a folder, then overrides
            arguments = arguments[2:]
        # a sweep's lists are one value at a time
        flags = ("-m", "--cfg", "job")
        overrides = [argument.split(",")[0] for argument in arguments if argument not in flags]
        overrides += [needed for override in overrides for needed in NEEDED.get(override, [])]
        names = {"trainer": "train", "data_pipeline": "prepare", "slurm": "submit"}
        config = load(names[module], overrides)
        ranks = config.parallel.nproc_per_node
        config.check(config.plan if isinstance(config, SubmitConfig) else ParallelPlan.of(config, ranks))


def test_make_targets_in_documents_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for document in [*DOCUMENTS, ROOT / "CONTRIBUTING.md"]:
        text = "\n".join(
            re.findall(
                r"(?:```bash\n.*?```)|(?:`make [a-z-]+`)|(?:^    make .*$)", document.read_text(), re.S | re.M
            )
        )
        assert set(re.findall(r"\bmake ([a-z-]+)", text)) <= targets, document
