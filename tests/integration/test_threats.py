"""Secrets, hostile names and foreign files through every command, on one real run."""

import json
import os
import pickle
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import ENVIRONMENT, SMALL, python
from wandb_files import of_kind

from trainer import evaluate, export, generate, inspect, report

ROOT = Path(__file__).parents[2]
PACKAGES = ("conf", "data_pipeline", "moe", "slurm", "trainer")
NAME = """-it's "q" $(touch oh-no) `touch oh-no` $\\frac{$ <b>é :smile: %j"""
# Of the forms of secrets; none of them exists. One for each place where it is planted.
PLANTED = {
    "environment": "plain words of a secret",
    "slurm": "other words of a secret",
    "wandb": "0f1e2d3c4b" * 4,
    "diff": "hf_" + "Diff0000" * 4,
    "override": "hf_" + "Override" * 4,
    "setup": "hf_" + "Setup000" * 4,
    "row": "hf_" + "Row00000" * 4,
}
TWO_STEPS = [
    *(
        "stage.train_tokens=1024",
        "schedule.warmup_steps=1",
        "parallel.nproc_per_node=1",
        "parallel.ep_size=1",
    ),
    *("checkpoint.every_steps=2", "evaluate.every_steps=2", "tracker.wandb=offline", "micro_batch_size=4"),
]


class Place:
    """The code in a checkout with an edited file, its run, and what all commands have said."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.code, self.said = folder, folder / "code", ""
        self.run_dir = folder / "runs" / NAME
        home = folder / "home"
        home.mkdir()
        self.env = {
            **ENVIRONMENT,
            **dict.fromkeys(("HOME", "XDG_CACHE_HOME", "TMPDIR"), str(home)),
            "PYTHONPATH": str(self.code),
            "WANDB_MODE": "offline",
            "MY_SECRET": PLANTED["environment"],
            "SLURM_JWT": PLANTED["slurm"],
            "WANDB_API_KEY": PLANTED["wandb"],
        }

    def __call__(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a command of the checkout from the folder of the run."""
        done = python(*arguments, cwd=self.folder, env=self.env)
        self.said += done.stdout + done.stderr
        return done


def quoted(text: str) -> str:
    """A text as Hydra takes it literally on a command line."""
    return "'" + text.replace("'", "\\'") + "'"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A checkout whose diff holds a token, data with hostile names, and a run of two steps on it."""
    place = Place(tmp_path_factory.mktemp("threats"))
    place.code.mkdir()
    for package in PACKAGES:
        shutil.copytree(ROOT / package, place.code / package, ignore=shutil.ignore_patterns("__pycache__"))
    identity = ["-c", "user.name=t", "-c", "user.email=t"]
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "x"]):
        subprocess.run(["git", *command], cwd=place.code, check=True)
    with (place.code / "trainer/resume.py").open("a") as file:
        file.write(f"\nTOKEN = '{PLANTED['diff']}'\n")
    names = ["-x [1] 'q\" $(touch oh-no) é\n.jsonl", "b.jsonl"]
    for name in names:
        rows = [f"The {name!r} number {n} follows {n - 1}, {n * n} is its square.\n" * 3 for n in range(300)]
        rows[7] = f"My token is {PLANTED['row']}, keep it."
        lines = "".join(json.dumps({"text": row}) + "\n" for row in rows)
        (place.folder / name).write_text(lines + f'["{PLANTED["row"]}"]\n')
    sources = [f"+data.sources.s{i}={{kind: jsonl, paths: [{quoted(name)}]}}" for i, name in enumerate(names)]
    data = ["data=jsonl", f"data.dir={quoted('data of ' + NAME)}", "data.tokenizer_vocab_size=512"]
    place.data = [*data, "data.validation_fraction=0.1", *sources]
    done = place("data_pipeline", "name=t", "model.vocab_size=512", *place.data)
    assert done.returncode == 0, done.stderr
    done = place(
        *("trainer", *SMALL, *TWO_STEPS, *place.data, f"name={quoted(NAME)}"),
        *(f"tracker.group={PLANTED['override']}", "tracker.group=mine"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return place


def test_no_secret_is_found_in_any_byte(place: Place) -> None:
    """In the run folder with W&B's files, what W&B leaves in the home, and all output."""
    assert "+TOKEN = '***'" in (place.run_dir / "git.txt").read_text()
    assert "tracker.group=***\n" in (place.run_dir / "overrides.txt").read_text()
    files = [
        path for top in (place.run_dir, place.folder / "home") for path in top.rglob("*") if path.is_file()
    ]
    assert any(path.suffix == ".wandb" for path in files)
    for path in files:
        found = [where for where, text in PLANTED.items() if text.encode() in path.read_bytes()]
        assert not found, (path, found)
    assert not [where for where, text in PLANTED.items() if text in place.said]
    run = of_kind(place.run_dir / "wandb", "run")[0]
    assert run.display_name == NAME
    assert not run.git.commit
    code = of_kind(place.run_dir / "wandb", "artifact")[0]
    assert {"trainer/resume.py", "run/git.txt"} <= {entry.path for entry in code.manifest.contents}


def test_the_run_goes_on_under_its_name(place: Place) -> None:
    """The command that is printed can be pasted; nothing ran that a name holds."""
    (shown,) = [line for line in place.said.splitlines() if line.startswith("  next ")]
    report_command = "python -m trainer.report" + shown.rpartition("python -m trainer.report")[2]
    stand_in = f"python() {{ printf '%s\\n' \"$@\"; }}; {report_command}"
    done = subprocess.run(["bash", "-c", stand_in], capture_output=True, text=True, check=True)
    assert done.stdout == f"-m\ntrainer.report\nruns/{NAME}\n"
    assert not list(place.folder.rglob("oh-no"))
    done = place("trainer.resume", f"runs/{NAME}", "checkpoint.keep=9")
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_command_takes_the_name(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From inside `runs`, where it begins with a dash."""
    monkeypatch.chdir(place.run_dir.parent)
    assert inspect.main(["--", NAME]) == 0
    assert report.main(["--", NAME]) == 0
    assert generate.main(["--tokens", "3", "--", NAME, "-x"]) == 0
    assert evaluate.main(["--", NAME]) == 0
    assert export.main(["--", NAME, f"-out of {NAME}"]) == 0
    said = capsys.readouterr()
    assert "-x" in said.out
    upload = next(line for line in said.out.splitlines() if line.startswith("  upload"))
    shown = subprocess.run(
        ["bash", "-c", f"hf() {{ printf '%s\\n' \"$@\"; }}; {upload.partition('upload')[2]}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout == f"upload\nYOUR_NAME/-out of {NAME}\n./-out of {NAME}\n"
    page = (place.run_dir / "report/report.html").read_text()
    assert "<b>é" not in page
    assert not list(place.folder.rglob("oh-no"))


def test_the_data_commands_take_the_name(place: Place) -> None:
    folder = f"data of {NAME}"
    done = place("data_pipeline", "verify", folder)
    assert done.returncode == 0, done.stderr
    assert f"{folder} is undamaged" in done.stdout
    before = place.said  # it shows the rows, with what they hold
    done = place("data_pipeline", "inspect", "s0:0", "name=t", "model.vocab_size=512", *place.data)
    place.said = before
    assert done.returncode == 0, done.stderr
    assert "-x [1]" in done.stdout


def test_a_secret_on_the_command_line_is_refused(place: Place) -> None:
    """Nothing is written, and the message does not repeat it."""
    before = sorted(place.folder.iterdir())
    setup = f"slurm.setup=[{quoted('export HF_TOKEN=' + PLANTED['setup'])}]"
    for command, override, message in (
        ("trainer", f"tracker.group={PLANTED['override']}", "tracker.group holds what looks like a token"),
        ("slurm", setup, "slurm.setup holds what looks like a token"),
        ("slurm", f"name={PLANTED['override']}", "name holds what looks like a token"),
        ("trainer", "optimizer.lr=${oc.env:MY_SECRET}", "optimizer.lr=*** must be of type float"),
        ("slurm", 'name="a\n#SBATCH --uid=0"', "holds a line end"),
    ):
        more = ["slurm.dry_run=true"] if command == "slurm" else []
        done = place(command, *SMALL, *TWO_STEPS, *place.data, "name=refused", *more, override)
        assert done.returncode == 2, done.stdout + done.stderr
        assert message in done.stderr
        assert "Traceback" not in done.stderr
        assert "#SBATCH" not in done.stdout
    assert sorted(place.folder.iterdir()) == before
    assert not (place.folder / "runs/refused").exists()
    assert not [where for where, text in PLANTED.items() if text in place.said]


def test_a_dry_run_shows_a_script_that_bash_reads(place: Place) -> None:
    name = NAME.replace("\\", "")  # which the name of a log must not hold
    done = place("slurm", *SMALL, *TWO_STEPS, *place.data, f"name={quoted(name)}", "slurm.dry_run=true")
    assert done.returncode == 0, done.stderr
    subprocess.run(["bash", "-n"], input=done.stdout, text=True, check=True)
    assert not [where for where, text in PLANTED.items() if text in done.stdout]


@pytest.fixture
def foreign(place: Place, tmp_path: Path) -> Path:
    """A copy of the run folder, which a test makes hostile."""
    ignored = shutil.ignore_patterns("wandb", "report")
    return Path(shutil.copytree(place.run_dir, tmp_path / "foreign", ignore=ignored))


class Bomb:
    """A pickle that makes a file when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return Path.touch, (self.mark,)


Say = Callable[..., str]


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str]) -> Say:
    """`refusal(main, argument, ...)`: the message of a command that exits with 2."""

    def refused(main: Callable[[list[str]], int], *arguments: object) -> str:
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == 2
        return capsys.readouterr().err

    return refused


def test_no_pickle_of_a_foreign_checkpoint_is_read(foreign: Path, refusal: Say, tmp_path: Path) -> None:
    (checkpoint,) = (foreign / "checkpoints").glob("step-*")
    bomb = pickle.dumps(Bomb(tmp_path / "exploded"))
    (checkpoint / "balance.pt").write_bytes(bomb)
    assert "balance.pt is not a file of tensors" in refusal(generate.main, foreign, "a")
    assert "balance.pt is not a file of tensors" in refusal(evaluate.main, foreign)
    for path in (checkpoint / "hf").glob("*.safetensors"):
        path.write_bytes(bomb)
    (checkpoint / "hf/pytorch_model.bin").write_bytes(bomb)
    assert "safetensors cannot be read" in refusal(generate.main, foreign, "a")
    assert "safetensors cannot be read" in refusal(export.main, foreign, tmp_path / "out")
    assert inspect.main([str(foreign)]) == 1
    assert not (tmp_path / "exploded").exists()


def test_no_template_or_code_of_a_foreign_folder_runs(
    foreign: Path, tmp_path: Path, refusal: Say, capsys: pytest.CaptureFixture[str]
) -> None:
    """Endless loops and classes in a chat template, which is refused, and modules that config.json names."""
    (checkpoint,) = (foreign / "checkpoints").glob("step-*")
    hf = checkpoint / "hf"
    template = "{% for a in range(10 ** 12) %}{{ ''.__class__.__mro__ }}{% endfor %}"
    (hf / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    (hf / "chat_template.jinja").write_text(template)
    (hf / "modeling_x.py").write_text(f"open({str(tmp_path / 'exploded')!r}, 'w')")
    config = json.loads((hf / "config.json").read_text())
    config |= {"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}
    (hf / "config.json").write_text(json.dumps(config))
    assert "chat_template.jinja: the chat template fails" in refusal(export.main, hf, tmp_path / "out")
    assert "chat_template.jinja: the chat template fails" in refusal(generate.main, hf, "a", "--chat")
    assert generate.main(["--tokens", "2", str(hf), "a"]) == 0, "a text needs no template"
    assert not (tmp_path / "out").exists()
    (hf / "chat_template.jinja").unlink()
    assert "tokenizer_config.json: the chat template fails" in refusal(export.main, hf, tmp_path / "out")
    (hf / "tokenizer_config.json").unlink()
    assert export.main([str(hf), str(tmp_path / "out")]) == 0
    written = "".join(path.read_text() for path in (tmp_path / "out").glob("*.json*"))
    assert "__mro__" not in written
    assert "modeling_x" not in written
    assert not (tmp_path / "exploded").exists()
    capsys.readouterr()


def test_damaged_and_nested_files_are_one_message(foreign: Path, refusal: Say) -> None:
    (checkpoint,) = (foreign / "checkpoints").glob("step-*")
    deep = 100_000 * "[" + 100_000 * "]"
    assert "the prompt is not text in UTF-8" in refusal(generate.main, foreign, "\udcff")
    kept = {path: path.read_bytes() for path in (checkpoint / "hf").glob("*.json")}
    for name, message in (
        ("hf/tokenizer.json", "is not a tokenizer.json"),
        ("hf/config.json", "config.json cannot be read"),
        ("hf/model.safetensors.index.json", "index.json cannot be read"),
    ):
        (checkpoint / name).write_text(deep)
        assert message in refusal(generate.main, checkpoint, "a")
        (checkpoint / name).write_bytes(kept[checkpoint / name])
    (foreign / "metrics.jsonl").write_text(deep + "\n")
    assert "metrics.jsonl cannot be read" in refusal(report.main, foreign)


def test_a_foreign_run_folder_adds_nothing_to_the_report(
    foreign: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither markup nor what its ${...} would read from the environment."""
    monkeypatch.setenv("HOME_TOKEN", PLANTED["environment"])
    (foreign / "state").write_text('{"state": "<script>", "attempt": 1}')
    (foreign / "alarms.jsonl").write_text('{"step": 1, "kind": "<script>", "text": "<script>"}\n')
    config = (foreign / "config.yaml").read_text()
    assert "\n  group: mine\n" in config
    (foreign / "config.yaml").write_text(config.replace("group: mine", "group: ${oc.env:HOME_TOKEN}"))
    shutil.copytree(foreign, foreign.parent / "other")
    other = (foreign / "config.yaml").read_text().replace("HOME_TOKEN", "OTHER_TOKEN")
    (foreign.parent / "other/config.yaml").write_text(other)
    out = foreign.parent / "out"
    assert report.main([str(foreign), str(foreign.parent / "other"), "--out", str(out)]) == 0
    page = (out / "report.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert PLANTED["environment"] not in page
    assert "${oc.env:HOME_TOKEN}" in page
    assert not os.environ.get("OTHER_TOKEN")
    capsys.readouterr()
