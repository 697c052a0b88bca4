"""What a hostile name must not do."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from matplotlib.figure import Figure

from data_pipeline.config import SourceConfig
from data_pipeline.inputs import list_inputs
from data_pipeline.readers import plan_slices, read_rows
from moe.config import ConfigError
from slurm.config import SubmitConfig
from slurm.script import job_script
from trainer.monitor.report import _label
from trainer.ranks.launch import launch
from trainer.settings.command import check
from trainer.settings.config import RunConfig
from trainer.settings.run_folder import (
    pasted,
)
from trainer.settings.typed import typed

ROOT = Path(__file__).parents[3]
PLANTED = "hf_" + "Planted0" * 4  # of the form of a token; none that exists
HOSTILE = """-it's "q" $(touch oh-no) `touch oh-no`; é ${X} %j #"""


def test_a_printed_command_can_be_pasted(tmp_path: Path) -> None:
    for name in (HOSTILE, "-rf", "a b", "é", "$HOME"):
        (tmp_path / name).mkdir(parents=True)
        script = f"cd {pasted(tmp_path)} && cd {pasted(Path(name))} && pwd"
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
        assert done.stdout == f"{tmp_path / name}\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([HOSTILE, "-rf", "a b", "é", "$HOME"])
    assert pasted(Path("runs/demo")) == "runs/demo"


@pytest.mark.parametrize("key", ["name", "output_dir"])
@pytest.mark.parametrize("end", ["\n", "\r", "\x1b[2J", "\u2028", "\udcff"])
def test_a_line_end_in_a_name_is_refused(run_config: Callable[..., RunConfig], key: str, end: str) -> None:
    config = run_config()
    setattr(config, key, f"a{end}#SBATCH --uid=0")
    with pytest.raises(ConfigError, match=f"{key}='a.*use one line of visible characters"):
        config.check()


def submission(*overrides: str, name: str = "t") -> SubmitConfig:
    with initialize_config_module("conf", version_base="1.3"):
        config = typed(SubmitConfig, compose("submit", overrides=["name=t", *overrides]))
    config.name = name
    return config


def test_no_line_of_a_job_script_is_added_by_a_name() -> None:
    config = submission('slurm.partition="a\n#SBATCH --uid=0"')
    with pytest.raises(ConfigError, match="value of one line"):
        config.check()
    for folder in ("a\n#SBATCH --uid=0", "a\\b"):
        with pytest.raises(ConfigError, match=r"#SBATCH --output=.* must be one line of visible characters"):
            job_script(Path("/runs") / folder, [submission()], False)


def test_a_job_script_takes_names_as_they_are(tmp_path: Path) -> None:
    """bash reads the variables of the script, and runs nothing."""
    setup = "echo 'a b' > \"$X\""
    config = submission("slurm.setup=[]", "slurm.env={}", name=HOSTILE)
    config.slurm.setup, config.slurm.env, config.slurm.python = [setup], {"A": HOSTILE}, HOSTILE
    lines = job_script(tmp_path / HOSTILE, [config], False).splitlines()
    variables = [line for line in lines[: lines.index("")] if not line.startswith("#")]
    shown = """printf '%s\\0' "$RUN_DIR" "$PYTHON" "$A" "${SETUP[@]}" """
    bash = ["bash", "-c", "\n".join([*variables, shown])]
    done = subprocess.run(bash, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split("\0") == [f"{tmp_path / HOSTILE}", HOSTILE, HOSTILE, setup, ""]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["pyxis", "apptainer"])
def test_no_name_mounts_another_folder(kind: str, tmp_path: Path) -> None:
    container = [f"slurm.container.kind={kind}", "slurm.container.image=image"]
    for name in ("a,/etc", "a:/etc"):
        with pytest.raises(ConfigError, match="which would mount other folders in the container"):
            job_script(tmp_path / name, [submission(*container)], False)
    job_script(tmp_path / "a b", [submission(*container)], False)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("slurm.setup=['export HF_TOKEN=hunter22']", "slurm.setup holds a value of HF_TOKEN"),
        ("+slurm.env.A=" + PLANTED, "slurm.env.A holds what looks like a token"),
        ("+slurm.env.HF_TOKEN=x", "slurm.env.HF_TOKEN looks like a secret"),
        ("slurm.container.image='docker://me:hunter22@host#a'", "slurm.container.image holds what"),
        ("+slurm.sbatch.comment=" + PLANTED, "slurm.sbatch.comment holds"),
    ],
)
def test_no_secret_reaches_a_job_script(override: str, message: str) -> None:
    with initialize_config_module("conf", version_base="1.3"):
        cfg = compose("submit", overrides=["name=t", override])
    with pytest.raises(ConfigError) as refused:
        check(typed(SubmitConfig, cfg), cfg)
    assert message in str(refused.value)
    assert "hunter22" not in str(refused.value)
    assert PLANTED not in str(refused.value)


def test_a_file_is_read_under_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that is a pattern, begins with a dash, or holds quotes and line ends."""
    monkeypatch.chdir(tmp_path)
    names = ["a[1]*.jsonl", "-x.jsonl", HOSTILE + ".jsonl", "a\nb.jsonl", "\udcff.jsonl"]
    for number, name in enumerate(names):
        Path(name).write_text(json.dumps({"text": str(number)}) + "\n")
    source = SourceConfig("jsonl", names)
    (parts,) = plan_slices(source, list_inputs("s", source, {}), 1 << 20)
    rows = [row.value["text"] for part in parts for row in read_rows(source, part)]
    assert rows == ["0", "1", "2", "3", "4"]


def test_a_legend_shows_a_name_as_it_is() -> None:
    """matplotlib sets $...$ as mathematics, and raises if it is none."""
    figure = Figure()
    axes = figure.subplots()
    for name in (r"$\nothing{$", "_hidden", "plain"):
        axes.plot([1, 2], label=_label(name))
    legend = axes.legend()
    figure.canvas.draw()
    assert [text.get_text() for text in legend.get_texts()] == [r"\$\nothing{\$", "\u200b_hidden", "plain"]


def test_a_rank_takes_a_folder_with_a_dash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("-run").mkdir()
    (tmp_path / "child.py").write_text(
        "import argparse, pathlib\nparser = argparse.ArgumentParser()\nparser.add_argument('folder')\n"
        "(pathlib.Path(parser.parse_args().folder) / 'seen').touch()\n"
    )
    held = os.open(tmp_path, os.O_RDONLY)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert launch(["child", "--", "-run"], 1, "cpu", held) == 0
    assert (tmp_path / "-run/seen").exists()
    assert '"--", str(run_dir)]' in (ROOT / "trainer/profile.py").read_text()
