"""Every shipped YAML file composes and breaks no law; every documented command is valid."""

import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module

from moe.cross_entropy import CHUNK_BYTES
from slurm.config import SubmitConfig
from trainer.models import bytes_per_rank
from trainer.settings.command import in_words_of_hydra
from trainer.settings.config import RunConfig
from trainer.settings.typed import typed
from trainer.train import KEPT

ROOT = Path(__file__).parents[2]
GROUPS = sorted(
    folder.name
    for folder in (ROOT / "conf").iterdir()
    if folder.is_dir()
    and folder.name[0] != "_"
    and folder.name not in ("slurm", "job")  # see tests/unit/slurm
)
FILES = [
    (group, path.stem)
    for group in GROUPS
    for path in sorted((ROOT / "conf" / group).glob("*.yaml"))
    if not path.stem.startswith("_")
]
# values that a user has to give
NO_START = ["stage.init_from=null"]  # the run of the previous stage
RL = [
    *("data=rl", "stage.seq_len=512", "rl.max_prompt_tokens=256", "rl.sampling.max_new_tokens=256"),
    "rl.verifiers={answer: {kind: math, weight: 1.0}}",
]
NEEDED = {
    "data=jsonl": [
        *("data.dir=d", "data.tokenizer_vocab_size=4096"),
        "+data.sources.web={kind: jsonl, paths: [x.jsonl]}",
    ],
    "stage=stem_code_4k": NO_START,
    **{
        f"stage={name}": [*NO_START, "model=qwen3_30b_a3b", "schedule.warmup_steps=100"]
        for name in ("long_context_32k", "sft")
    },
    **{f"experiment=demo_{name}": NO_START for name in ("stem_code", "long_context", "sft", "rl")},
    "rl=grpo": RL,
    "distill=teacher": ["distill.teacher=t", "distill.lessons=l"],  # lessons: no teacher is read
    "experiment=demo_distill": ["distill.lessons=l"],
    "data=rl": ["rl=grpo", *RL],
    "stage=rl": [*NO_START, "model.max_position_embeddings=20480", "schedule.warmup_steps=10"],
    "experiment=demo_upcycle": [*NO_START, "init.upcycle=none"],
    **{
        f"experiment=qwen3_30b_a3b_{name}": NO_START
        for name in ("stem_code_4k", "long_context_32k", "sft", "rl")
    },
}
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def load(config_name: str, overrides: list[str]) -> RunConfig:
    with initialize_config_module("conf", version_base="1.3"):
        composed = compose(config_name, overrides=in_words_of_hydra(overrides))
    return typed(SubmitConfig if config_name == "submit" else RunConfig, composed)


@pytest.mark.parametrize(("group", "name"), FILES, ids=[f"{group}/{name}" for group, name in FILES])
def test_every_file_composes_and_is_lawful(group, name):
    choice = f"{group}={name}"
    named = [] if group == "experiment" else ["name=t"]
    config = load("train", [*named, choice, *NEEDED.get(choice, [])])
    config.check()


@pytest.mark.parametrize("name", ["general_4k", "stem_code_4k", "long_context_32k", "sft", "rl"])
def test_the_30b_experiments_fit_the_gpus_that_their_files_name(name):
    """Memory: the table of models, the forwards that are kept, and a generous estimate of one layer."""
    comment = (ROOT / f"conf/experiment/qwen3_30b_a3b_{name}.yaml").read_text()
    named = re.findall(r"(?:Fits|or) (\d+) (?:or (?:\d+|more)|to \d+)? ?H\d00 \((\d+) GB\)", comment)
    assert len(named) == 2, "H100 and H200"
    for ranks, memory in named:
        config = load("train", [f"experiment=qwen3_30b_a3b_{name}", *NO_START])
        model, plan = config.model, config.plan(int(ranks))
        config.check(plan.world_size)
        layout = {"zero_stage": config.zero_stage, "ep_size": plan.ep_size, "world_size": plan.world_size}
        hidden, tokens = model.hidden_size, config.micro_batch_size * config.stage.seq_len
        head = 2 * hidden * (model.vocab_size + tokens)  # gradients of the head, computed in the forward
        forward = 2 * model.num_hidden_layers * tokens * hidden + head  # kept of one under full recompute
        steps = plan.gradient_accumulation_steps
        kept = forward * (steps if steps <= KEPT else 1)
        slots = 1.5 * tokens * model.num_experts_per_tok  # on the busiest rank
        layer = 2 * slots * (2 * hidden + 8 * model.moe_intermediate_size)
        logits = CHUNK_BYTES + 6 * model.vocab_size * hidden  # and the weight gradient's fp32 sum and product
        libraries = 3 * 2**30  # CUDA, NCCL
        cache = 0  # of sampling, when nothing is kept for a backward
        if config.rl is not None:
            key_values = 2 * model.num_key_value_heads * model.head_dim * model.num_hidden_layers
            cache = 2 * config.rl.sampling.rows_at_once * config.stage.seq_len * key_values
        working = max(kept + layer + logits, cache)
        needed = sum(bytes_per_rank(model, **layout)) + working + libraries
        assert needed < int(memory) * 1e9, (name, ranks, memory, needed / 1e9)


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
        if arguments[0] == "look":
            return
        if arguments[0] in ("inspect", "verify"):  # a row or a folder, then overrides
            arguments = arguments[2:]
        overrides = [argument for argument in arguments if argument not in ("-m", "--cfg", "job")]
        if "-m" in arguments:  # of a list of a sweep, check the first value
            overrides = [argument.split(",")[0] for argument in overrides]
        # the commands themselves fill in what data=jsonl needs
        chosen = [override for override in overrides if override != "data=jsonl"]
        overrides += [needed for override in chosen for needed in NEEDED.get(override, [])]
        names = {"trainer": "train", "data_pipeline": "prepare", "slurm": "submit"}
        config = load(names[module], overrides)
        ranks = config.parallel.nproc_per_node
        config.check(None if isinstance(config, SubmitConfig) else ranks)


def test_make_targets_in_documents_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for document in [*DOCUMENTS, ROOT / "CONTRIBUTING.md"]:
        text = "\n".join(
            re.findall(
                r"(?:```bash\n.*?```)|(?:`make [a-z-]+`)|(?:^    make .*$)", document.read_text(), re.S | re.M
            )
        )
        assert set(re.findall(r"\bmake ([a-z-]+)", text)) <= targets, document
