"""Random configurations: a sound run, or a message that names what is wrong. No traceback and no hang."""

import copy
import itertools
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import GrammarParseError

from moe.config import ConfigError
from trainer.settings import run_folder
from trainer.settings.config import RunConfig
from trainer.settings.run_folder import freeze, lock

BASES = {
    "sparse": ["experiment=demo"],
    "hybrid": ["experiment=demo_qwen3_next"],
    "dense": ["model=tiny_dense", "parallel.ep_size=1", "dtype=fp32", "deepspeed=zero3"],
    "long": ["experiment=demo_long_context", "stage.init_from=null", "deepspeed=zero2"],
    "upcycled": ["experiment=demo_upcycle", "dtype=bf16"],
}
SECONDS = 5.0  # more than any check takes, with much room for a busy machine
WORDS = [
    *(
        "",
        "???",
        "null",
        "auto",
        "cuda",
        "cpu",
        "fp32",
        "bf16",
        "best_fit",
        "concat",
        "streaming",
        "prepared",
    ),
    *("cosine", "wsd", "constant", "exact", "micro_batch", "split", "copy", "full", "local", "grouped"),
    *(
        "liger",
        "sft",
        "jsonl",
        "yarn",
        "full_attention",
        "linear_attention",
        "nan",
        "inf",
        "-1",
        "1e999",
        "0x10",
    ),
    *(
        "true",
        "~",
        "[",
        "${nope}",
        "${stage.seq_len}",
        "${oc.env:NOPE}",
        "\\${a}",
        "${",
        "..",
        "../up",
        "/",
        ".",
    ),
    *(
        "a\nb",
        "\0",
        "\udcff",
        "\u2028",
        "\x1b[2J",
        "ü",
        "日本",
        "🙂",
        "a" * 300,
        "9" * 5000,
        "1_000",
        "1:30",
        "=",
        "<<",
    ),
]
SIZES = [
    0,
    1,
    2,
    3,
    4,
    8,
    64,
    100,
    255,
    512,
    4096,
    32768,
    2**31,
    2**53 + 1,
    2**63 - 1,
    2**63,
    10**30,
    10**400,
]
PLAIN = st.one_of(
    st.sampled_from(SIZES),
    st.sampled_from(SIZES[:12]),
    st.sampled_from(SIZES).map(lambda size: -size),
    st.floats(0, 1),
    st.floats(),
    st.sampled_from(WORDS),
    st.text(max_size=8),
    st.booleans(),
    st.none(),
)
VALUES = st.one_of(
    PLAIN,
    PLAIN,
    st.lists(PLAIN, max_size=3),
    st.dictionaries(st.one_of(st.sampled_from(WORDS), st.integers(-2, 9)), PLAIN, max_size=2),
    st.lists(st.lists(st.integers(-1, 9), max_size=3), max_size=2),
    st.dictionaries(st.integers(-1, 10**6), st.dictionaries(st.sampled_from(["stdlib_code", "x"]), PLAIN)),
)
# A law, or what to do.
SAYS_WHAT_TO_DO = re.compile(r"; |\bmust\b|\buse\b|\bgive\b|\bneeds\b|\bis not supported: ")


def paths_of(tree: Any, path: tuple = ()) -> Iterator[tuple[tuple, Any]]:
    """The path of every key, of groups too, and its value."""
    for key, value in tree.items() if isinstance(tree, dict) else ():
        yield (*path, key), value
        yield from paths_of(value, (*path, key))


def changed(base: dict, changes: dict[tuple, Any]) -> DictConfig:
    """A composed run with other values; a path that an earlier change has removed is left out."""
    tree = copy.deepcopy(base)
    for path, value in changes.items():
        group: Any = tree
        for key in path[:-1]:
            group = group.get(key) if isinstance(group, dict) else None
        if isinstance(group, dict):
            group[path[-1]] = copy.deepcopy(value)  # it may be a part of `base`
    return OmegaConf.create(tree)


def mild(value: Any) -> st.SearchStrategy:
    """Values of the same kind, of which many are lawful."""
    if isinstance(value, bool):
        return st.booleans()
    if isinstance(value, int):
        return st.sampled_from([value, 2 * value, value // 2, 1, 2, 4])
    return st.floats(0, 1) if isinstance(value, float) else st.sampled_from([value, None])


def changes_of(name: str, base: dict) -> st.SearchStrategy[tuple[str, dict[tuple, Any]]]:
    """The name of a base, and a few values for its keys or for keys that there are not."""
    known = dict(paths_of(base))
    paths = st.sampled_from([*sorted(known), ("nope",), ("stage", "nope"), ("data", "sources", "x"), (7,)])
    wild = st.tuples(paths, VALUES)
    tame = st.sampled_from(sorted(known)).flatmap(lambda path: st.tuples(st.just(path), mild(known[path])))
    changes = st.one_of(
        st.lists(tame, min_size=1, max_size=3), st.lists(st.one_of(wild, wild, tame), min_size=1, max_size=3)
    )
    return changes.map(lambda pairs: (name, dict(pairs)))


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, dict]:
    """The trees of sound configurations, without the part that only Hydra reads."""
    found = {}
    with initialize_config_module("conf", version_base="1.3"):
        for name, overrides in BASES.items():
            found[name] = OmegaConf.to_container(compose("train", ["name=t", *overrides]))
    dense = tmp_path_factory.mktemp("dense")
    config = RunConfig.load(OmegaConf.create(found["dense"])).model
    (dense / "config.json").write_text(json.dumps(config.to_hf()))
    found["upcycled"]["stage"]["init_from"] = str(dense)
    return found


@pytest.fixture
def freezes_fast(monkeypatch):
    """Freezing without the list of packages and the state of git."""
    monkeypatch.setattr(run_folder, "_environment", dict)
    monkeypatch.setattr(run_folder, "git", lambda *_: "")


def judged(cfg: DictConfig) -> RunConfig | ConfigError:
    """What the check of a run says; any other error is a fault of the program, and so is a long wait."""
    started = time.process_time()
    verdict: RunConfig | ConfigError
    try:
        verdict = RunConfig.load(cfg)
        verdict.check()
        with suppress(ConfigError):
            verdict.check(8)
    except ConfigError as error:
        verdict = error
    assert time.process_time() - started < SECONDS
    return verdict


def assert_tells(error: ConfigError, names: set[str]) -> None:
    """Each line names a key that was changed and what to do."""
    assert error.problems
    for line in error.problems:
        assert any(name in line for name in names), (line, names)
        assert SAYS_WHAT_TO_DO.search(line), line


def names_of(path: tuple) -> set[str]:
    """How a message may name a key: with its group, or as the number that it is a part of."""
    name = ".".join(map(str, path[:2]))
    ranks = {"ranks"} if name in ("parallel", "parallel.nproc_per_node") else set()
    return {name, *ranks}


@pytest.mark.fuzzing(150, 10_000)
def test_any_values_give_a_run_or_a_message(fuzz, bases, tmp_path, freezes_fast):
    for base in bases.values():
        assert isinstance(judged(changed(base, {})), RunConfig)
    numbers, verdicts = itertools.count(), []

    @fuzz(st.sampled_from(sorted(bases)).flatmap(lambda name: changes_of(name, bases[name])))
    def holds(drawn):
        name, changes = drawn
        try:
            cfg = changed(bases[name], changes)
        except GrammarParseError:  # no command line and no file can hold it
            return
        verdict = judged(cfg)
        verdicts.append(type(verdict))
        if isinstance(verdict, ConfigError):
            assert_tells(verdict, set().union(*map(names_of, changes)))
            return
        plan = verdict.plan()
        rows = plan.world_size * plan.micro_batch_size * plan.gradient_accumulation_steps
        assert rows == verdict.stage.global_batch_size
        assert verdict.stage.total_steps >= 1
        run_dir = tmp_path / f"run-{next(numbers)}"
        os.close(lock(run_dir))
        freeze(run_dir, cfg, [])
        assert RunConfig.of_run(run_dir) == verdict, "what is read back is what was checked"
        freeze(run_dir, cfg, [])  # the same run goes on

    for kind in (RunConfig, ConfigError):
        assert verdicts.count(kind) > len(verdicts) / 10, "both kinds are tried"


@pytest.mark.fuzzing(40, 3000)
def test_a_frozen_file_with_wrong_bytes_is_a_run_or_a_message(fuzz, bases, tmp_path, freezes_fast):
    freeze(tmp_path, OmegaConf.create(bases["sparse"]), [])
    frozen = tmp_path / "config.yaml"
    whole = frozen.read_bytes()

    @fuzz(st.integers(0, len(whole) - 1), st.binary(max_size=3), st.integers(0, 3))
    def holds(place, written, removed):
        frozen.write_bytes(whole[:place] + written + whole[place + removed :])
        with suppress(ConfigError):
            RunConfig.of_run(tmp_path).check()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("stage.seq_len", 0, "stage.seq_len=0 is below 1; use 1 or more"),
        ("stage.global_batch_size", 0, "stage.global_batch_size=0 must be above 0"),
        ("model.num_hidden_layers", 10**12, "model.num_hidden_layers=1000000000000 must be at most 10000"),
        ("model.num_experts", 2**15, "model.num_experts=32768 must be below 32768"),
        ("parallel.nproc_per_node", 10**12, "is not a multiple of 1000000000000 ranks"),
        ("parallel.ep_size", 10**12 + 1, "parallel.ep_size=1000000000001 does not divide the 2 ranks"),
        ("model.rms_norm_eps", float("nan"), "model.rms_norm_eps=nan must be a finite number"),
        ("optimizer.lr", "inf", "optimizer.lr=inf must be a finite number"),
        ("optimizer.betas", [0.9, float("nan")], "optimizer.betas[1]=nan must be a finite number"),
        ("optimizer.lr", 10**400, "must be a number of 64 bits"),
        pytest.param("seed", 16**5000, "must be a number of 64 bits", id="more digits than str allows"),
        ("name", "a\nscancel", r"name='a\nscancel' holds a line end"),
        ("output_dir", "\x1b", "output_dir='\\x1b' holds a line end or another character"),
        ("data.dir", "a\0", "data.dir=a\0 must be text in UTF-8 without null characters"),
        ("tracker.tags", ["\udcff"], "tracker.tags[0]=\udcff must be text in UTF-8"),
        ("seed", "${nope}", "seed cannot be resolved (Interpolation key 'nope' not found...)"),
        ("data.sources", {1: "x"}, "data.sources.1=x must be a group of keys"),
        ("data.sources", {"a": "${nope}"}, "data.sources.a=${nope} must be a group of keys"),
    ],
)
def test_values_that_once_ended_in_a_traceback_or_a_hang(bases, path, value, message):
    verdict = judged(changed(bases["sparse"], {tuple(path.split(".")): value}))
    assert isinstance(verdict, ConfigError)
    assert any(message in line for line in verdict.problems), verdict.problems


def test_a_dense_model_has_no_pattern_of_sparse_layers(bases):
    tree = changed(bases["dense"], {("model", "decoder_sparse_step"): 0})
    assert isinstance(judged(tree), RunConfig)


def test_no_yarn_with_a_base_of_one(bases):
    yarn = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}
    tree = changed(bases["dense"], {("model", "rope_scaling"): yarn, ("model", "rope_theta"): 1})
    assert "model.rope_theta=1.0 must be above 1 where model.rope_scaling is set" in str(judged(tree))


def test_an_initial_folder_is_not_compared_with_a_broken_model(bases):
    tree = changed(bases["upcycled"], {("model", "decoder_sparse_step"): 0})
    assert "model.decoder_sparse_step=0 must be above 0" in str(judged(tree))


def test_a_list_may_refer_to_other_keys(bases):
    sources = {"a": {"kind": "text", "paths": ["${output_dir}/a.txt"]}}
    config = judged(changed(bases["sparse"], {("data", "sources"): sources}))
    assert isinstance(config, RunConfig), config
    assert config.data.sources["a"].paths == ["runs/a.txt"]


def test_a_name_that_is_too_long_is_refused(run_config, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = run_config(f"output_dir={'a' * 300}")
    run_folder.forget_origin(config, config.run_dir)
    with pytest.raises(ConfigError, match="cannot write the run folder"):
        lock(config.run_dir)
    config.stage.init_from = "a" * 300
    with pytest.raises(ConfigError, match="is not a folder"):
        config.check()
    assert not any(Path.cwd().iterdir())
