"""Random strings in a submission: refused by a law, or each arrives in the job script as one word."""

import copy
import shlex
import subprocess
import sys
from itertools import takewhile
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hypothesis import strategies as st
from omegaconf import OmegaConf

from moe.config import ConfigError
from slurm.config import SubmitConfig
from slurm.script import job_script
from trainer.settings.typed import typed

ROOT = Path(__file__).parents[3]
JOB = (ROOT / "slurm/job.sh").read_text()
SIGNS = [
    "'",
    '"',
    "`",
    "$",
    "(",
    ")",
    "{",
    "}",
    "\\",
    "\n",
    "\t",
    " ",
    "-",
    "#",
    ";",
    "&",
    "|",
    "<",
    ">",
    "!",
]
SIGNS += [
    "*",
    "?",
    "~",
    "%",
    "=",
    ",",
    ":",
    "/",
    ".",
    "a",
    "B",
    "_",
    "7",
    "\r",
    "\x7f",
    "\0",
    "ü",
    "’",
    "日",
    "\u2028",
]
COMMANDS = ["$(touch pwned)", "`touch pwned`", "'; touch pwned; '", '"; touch pwned; "', "--wrap=x", "a b"]
# Without signs that a flag of sbatch refuses, and with all.
ONE_LINE = st.one_of(
    st.text(st.sampled_from([sign for sign in SIGNS if sign.isprintable()]), max_size=8),
    st.text("abc-_ 7", max_size=8),
    st.sampled_from(COMMANDS),
)
TEXTS = st.one_of(
    *[ONE_LINE] * 9,
    st.text(st.sampled_from(SIGNS), max_size=8),
    st.sampled_from(["a\n#SBATCH --x", "a\ntouch pwned"]),
).map(lambda text: text.replace("${", "$ {"))  # no reference to another key
NAMES = st.one_of(
    *[st.sampled_from(["A", "path_2", "lower", "__"])] * 4,
    st.sampled_from(["RUN_DIR", "WRAP", "UID", "IFS", "BASHOPTS", "é", "a\nb", "_"]),
    TEXTS,
)
SWITCHES = ["partition", "account", "qos", "constraint", "reservation", "time", "mem", "exclude", "nodelist"]
SWITCHES += ["switches"]
# How bash tells the words that it has: each with a null character after it.
TELL = 'printf "%s\\0" "$RUN_DIR" "$CODE" "$PYTHON" "$EXCLUDE" "${#SETUP[@]}" "${SETUP[@]}"'
TELL += ' "${SRUN[@]}" "${WRAP[@]}"'
# The codes that job.sh turns off for itself, and one for carriage returns, which bash takes as they are.
TOLERATED = "SC2034,SC2016,SC2153,SC2154,SC2329,SC1017"


@pytest.fixture(scope="module")
def tree() -> dict:
    with initialize_config_module("conf", version_base="1.3"):
        cfg = compose(
            "submit", overrides=["experiment=demo", "slurm.nodes=2", "name=t", "stage.global_batch_size=16"]
        )
    return OmegaConf.to_container(cfg)


def submissions() -> st.SearchStrategy[dict]:
    """Some of the keys that hold text, with random text."""
    slurm: dict[str, st.SearchStrategy] = dict.fromkeys((*SWITCHES, "python"), TEXTS)
    slurm |= {"setup": st.lists(TEXTS, max_size=3), "env": st.dictionaries(NAMES, TEXTS, max_size=3)}
    slurm |= {
        "sbatch": st.dictionaries(st.sampled_from(["comment", "mail_type", "J", "a\nb", "wrap"]), TEXTS)
    }
    container = {
        "kind": st.sampled_from(["pyxis", "apptainer"]),
        "image": TEXTS,
        "mounts": st.lists(TEXTS, max_size=2),
    }
    return st.fixed_dictionaries(
        {},
        optional={
            "name": TEXTS,
            "output_dir": TEXTS,
            "slurm": st.fixed_dictionaries({}, optional=slurm),
            "container": st.fixed_dictionaries(container),
        },
    )


def with_texts(tree: dict, texts: dict) -> dict:
    tree = copy.deepcopy(tree)
    tree.update({key: texts[key] for key in ("name", "output_dir") if key in texts})
    tree["slurm"].update(texts.get("slurm", {}))
    tree["slurm"]["container"].update(texts.get("container", {}))
    return tree


def checked(tree: dict) -> SubmitConfig:
    config = typed(SubmitConfig, OmegaConf.create(tree))
    config.check()
    return config


def lines_of(head: str, config: SubmitConfig) -> list[list[str]]:
    """What sbatch reads: the words of each line that is for it."""
    lines = head.split("\n")
    assert lines[0] == "#!/usr/bin/env bash"
    found = list(takewhile(lambda line: line.startswith("#SBATCH "), lines[1:]))
    assert lines[len(found) + 1].startswith("RUN_DIR="), "sbatch reads no further than the first command"
    return [shlex.split(line.removeprefix("#SBATCH ")) for line in found]


def words_of(head: str, names: list[str], folder: Path) -> list[str]:
    """The words that bash has after the lines before job.sh, then the values that a child process gets."""
    child = "import os, sys; [print(os.environ[name], end='\\0') for name in sys.argv[1:]]"
    told = f"{head}\n{TELL}\n{shlex.join([sys.executable, '-c', child, *names])}\n"
    done = subprocess.run(["bash", "-u"], input=told.encode(), cwd=folder, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b""), done.stderr
    assert not list(folder.iterdir()), "a text became a command"
    return done.stdout.decode().split("\0")[:-1]


def shellcheck(script: str, *options: str) -> None:
    command = [Path(sys.executable).parent / "shellcheck", "--shell=bash", *options, "-"]
    done = subprocess.run(command, input=script.encode(), capture_output=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout.decode()


@pytest.mark.fuzzing(60, 1000)
def test_any_text_is_refused_or_arrives_as_one_word(fuzz, tree, tmp_path):
    accepted, refused = [], []
    folder, empty = tmp_path / "run", tmp_path / "empty"
    empty.mkdir()

    @fuzz(submissions())
    def holds(texts):
        try:
            config = checked(with_texts(tree, texts))
        except ConfigError as error:
            refused.append(texts)
            for line in error.problems:
                assert line.startswith(("slurm", "name", "output_dir")), line
            return
        run_dir = folder / config.run_dir
        try:
            script = job_script(run_dir, [config], False)
        except ConfigError:  # its folder is no name for a mount or a flag: tests/unit/threats
            refused.append(texts)
            return
        accepted.append(texts)
        assert script.endswith(f"\n{JOB}")
        head = script.removesuffix(JOB)
        flags = config.slurm.flags() | {"job-name": config.name}
        for flag, value in flags.items():
            assert [f"--{flag}" if value is None else f"--{flag}={value}"] in lines_of(head, config)
        assert all(len(words) == 1 for words in lines_of(head, config))
        slurm, container = config.slurm, config.slurm.container
        contained = container.kind != "none"
        python = slurm.python or ("python" if contained else sys.executable)
        expected = [str(run_dir), str(run_dir / "code"), python, slurm.exclude or ""]
        expected += [str(len(slurm.setup)), *slurm.setup]
        words = words_of(head, list(slurm.env), empty)
        given = len(words) - len(slurm.env)
        assert words[: len(expected)] == expected
        assert words[given:] == list(slurm.env.values())
        wrap = words[len(expected) : given]
        if container.kind == "apptainer":
            assert wrap[-1] == container.image
            assert {f"--bind={mount}" for mount in container.mounts} <= set(wrap)
        if container.kind == "pyxis":
            assert wrap[0] == f"--container-image={container.image}"
        shellcheck(head, f"--exclude={TOLERATED}", "--severity=error")

    assert min(len(accepted), len(refused)) > len(accepted + refused) / 10, "both kinds are tried"


@pytest.mark.fuzzing(3, 100)
def test_whole_scripts_are_bash(fuzz, tree, tmp_path):
    """As the test above, with all of job.sh."""
    tame = st.text(
        st.sampled_from([sign for sign in SIGNS if sign.isprintable() and sign != "/"]),
        min_size=1,
        max_size=8,
    )
    # no reference to another key, and not OmegaConf's word for a value that is missing
    tame = tame.map(lambda text: text.replace("${", "$ {").replace("???", "?"))
    values = st.fixed_dictionaries(dict.fromkeys((*SWITCHES, "python"), tame))

    @fuzz(
        tame.map(lambda text: f"run{text}".replace("\\", "")),
        values,
        st.lists(tame, min_size=1, max_size=3),
        tame,
    )
    def holds(name, switches, setup, value):
        texts = {"name": name, "slurm": {**switches, "setup": setup, "env": {"A": value}}}
        config = checked(with_texts(tree, texts))
        script = job_script(tmp_path / name, [config], False)
        done = subprocess.run(["bash", "-n"], input=script.encode(), capture_output=True, check=False)
        assert (done.returncode, done.stderr) == (0, b"")
        shellcheck(script, f"--exclude={TOLERATED}", "--severity=error")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("é", "is not the name of an environment variable"),
        ("a\n", "is not the name of an environment variable"),
        ("RUN_DIR", "is a variable of the job script or of bash; use another name"),
        ("UID", "is a variable of the job script or of bash"),
        ("BASH_ENV", "is a variable of the job script or of bash"),
    ],
)
def test_names_that_bash_would_not_export(tree, name, said):
    with pytest.raises(ConfigError) as error:
        checked(with_texts(tree, {"slurm": {"env": {name: "x"}}}))
    assert error.value.problems[0].startswith(f"slurm.env.{name} {said}")


def test_every_variable_of_the_script_is_reserved(tree, tmp_path):
    head = job_script(tmp_path, [checked(tree)], False).removesuffix(JOB)
    names = [line.partition("=")[0] for line in head.splitlines() if line[:1].isupper()]
    assert "RUN_DIR" in names
    for name in names:
        with pytest.raises(ConfigError, match=f"slurm.env.{name} is a variable of the job script"):
            checked(with_texts(tree, {"slurm": {"env": {name: "x"}}}))


def test_a_name_is_no_second_line_of_the_script(tree):
    with pytest.raises(ConfigError, match="holds a line end or another character that cannot be printed"):
        checked(with_texts(tree, {"name": "a\ntouch pwned"}))
