"""What a secret must not reach."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from moe.config import ConfigError
from trainer.monitor.terminal import Terminal
from trainer.monitor.tracker import Tracker
from trainer.resume import change_layout, record_layout
from trainer.settings.command import check, refuse_unsafe
from trainer.settings.config import RunConfig
from trainer.settings.run_folder import (
    freeze,
    read_frozen,
    read_run,
)
from trainer.settings.secrets import HIDDEN, redacted, secret_in, unsafe_settings, without_secrets

ROOT = Path(__file__).parents[3]
PACKAGES = ("conf", "data_pipeline", "moe", "slurm", "trainer")
PLANTED = "hf_" + "Planted0" * 4  # of the form of a token; none that exists


SECRETS = [
    (PLANTED, PLANTED),
    ("sk-ant-api03-" + "x1" * 20, "x1x1x1"),
    ("ghp_" + "a1" * 18, "a1a1a1"),
    ("github_pat_" + "a1" * 18, "a1a1a1"),
    ("AKIA" + "A1B2" * 4, "A1B2"),
    ("xoxb-1234567890-abc", "1234567890"),
    ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abcdefghijkl", "abcdefghijkl"),
    ("wandb login " + "0f" * 20, "0f0f0f"),
    ("https://me:hunter2@host/x.git", "hunter2"),
    ("Authorization: Bearer abcdef0123456789abcdef", "abcdef"),
    ("-----BEGIN RSA PRIVATE KEY-----\nMIIabc\n-----END RSA PRIVATE KEY-----", "MIIabc"),
    ("export MY_TOKEN=hunter22", "hunter22"),
    ('+os.environ["DB_PASSWORD"] = "two words"', "two words"),
    ("API_KEY: str = 'hunter22'", "hunter22"),
    ("api_key: " + "0f" * 20, "0f0f0f"),
    ('{"client_secret": "hunter22"}', "hunter22"),
    ("hf_token=hunter22", "hunter22"),
    ("login --token hunter22", "hunter22"),
    ("login --api-key=hunter22", "hunter22"),
    ("login --hub-token hunter22", "hunter22"),
]
NO_SECRETS = [
    "stage.train_tokens=4096 data.text_key=content data.max_chat_tokens=100000 model.num_key_value_heads=2",
    "export HF_TOKEN=$(cat ~/.token) WANDB_API_KEY=$KEY",
    'export HF_TOKEN="$(cat ~/.token)"',
    "source ~/.secrets",
    "export SSH_KEY_FILE=/home/me/key.pem TOKENIZERS_PARALLELISM=false MAX_TOKENS=1000000",
    'TOKEN = np.dtype("<u4")',
    "CONTROL_TOKENS = (END_OF_TEXT, *others)",
    "key = os.environ['HF_TOKEN']",
    "    def hf_folder(source: Path) -> Path:",
    "lines = sorted(lines, key=lambda path: path.name)",
    "risk-free-and-task-oriented-learning-of-everything",
    "https://host:8080/x",
]


@pytest.mark.parametrize(("text", "part"), SECRETS)
def test_a_secret_is_found_and_hidden(text: str, part: str) -> None:
    what, shown = secret_in(text), redacted(f"before {text}\nafter")
    assert what is not None
    assert part not in what
    assert part not in shown
    assert HIDDEN in shown
    assert shown.startswith("before ")
    assert shown.endswith("\nafter")
    assert redacted(shown) == shown


@pytest.mark.parametrize("text", NO_SECRETS)
def test_what_is_no_secret_stays(text: str) -> None:
    assert secret_in(text) is None
    assert redacted(text) == text


def test_our_own_code_holds_nothing_that_looks_like_one() -> None:
    """A diff of it stays a diff that can be applied."""
    for path in (path for package in PACKAGES for path in (ROOT / package).rglob("*")):
        if path.suffix in (".py", ".yaml", ".sh"):
            assert redacted(path.read_text()) == path.read_text(), path


def test_values_of_the_environment_are_secrets_by_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("My_Secret_1", "correct horse")
    monkeypatch.setenv("OTHER_TOKEN", "correct horse battery")
    monkeypatch.setenv("SHORT_KEY", "abc")
    monkeypatch.setenv("A_KEY_IN_A_FILE", str(tmp_path))
    monkeypatch.setenv("PLAIN", "plain value")
    text = f"a correct horse, a correct horse battery, abc, {tmp_path}, plain value"
    assert redacted(text) == f"a ***, a ***, abc, {tmp_path}, plain value"
    assert secret_in("correct horse.") == "the value of the environment variable My_Secret_1"
    nested = {"a": ["correct horse", 1, None, {"b": "correct horse"}], "c": 0.5}
    assert without_secrets(nested) == {"a": [HIDDEN, 1, None, {"b": HIDDEN}], "c": 0.5}


def test_text_of_any_size_is_searched_in_time() -> None:
    """No expression needs more than linear time: long words, no line ends, many names."""
    for text in ("A" * 100_000, "KEY_" * 30_000, "api_key" * 20_000, "=" * 100_000, "a_" * 100_000):
        assert redacted(text) == text


# --- secrets in settings and in the run folder ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"tracker.group": PLANTED},
            "tracker.group holds what looks like a token or a key, but settings are",
        ),
        ({"slurm.setup": ["a", "export HF_TOKEN=hunter22"]}, "slurm.setup holds a value of HF_TOKEN"),
        ({"deepspeed.x": [{"y": "https://me:hunter22@host"}]}, "deepspeed.x holds what looks like"),
    ],
)
def test_unsafe_settings_are_named_without_their_secret(settings: dict, message: str) -> None:
    (found,) = unsafe_settings(settings)
    assert found.startswith(message)
    assert "hunter22" not in found
    assert PLANTED not in found


def test_a_run_with_a_secret_among_its_settings_is_refused(
    composed: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that an interpolation brings from the environment."""
    monkeypatch.setenv("HOME_TOKEN", "correct horse")
    cfg = composed("tracker.project=${oc.env:HOME_TOKEN}")
    with pytest.raises(ConfigError, match=r"tracker.project holds the value of .* HOME_TOKEN"):
        check(RunConfig.load(cfg), cfg)
    cfg = composed("+deepspeed.a=${no.such.key}")
    with pytest.raises(ConfigError, match="cannot be resolved"):
        refuse_unsafe(cfg)


def test_what_is_frozen_hides_secrets_and_stays_exact(
    composed: Callable[..., DictConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    (bin_folder / "git").write_text(f"#!/bin/sh\necho '+TOKEN = \"{PLANTED}\"'\necho '+a = correct horse'\n")
    (bin_folder / "git").chmod(0o755)
    monkeypatch.setenv("PATH", str(bin_folder), prepend=os.pathsep)
    monkeypatch.setenv("MY_SECRET", "correct horse")
    cfg = composed()
    (tmp_path / "run").mkdir()
    freeze(tmp_path / "run", cfg, ["tracker.group=correct horse", "tracker.group=x"])
    for path in (tmp_path / "run").iterdir():
        assert "correct horse" not in path.read_text(), path
        assert PLANTED not in path.read_text(), path
    assert (tmp_path / "run/git.txt").read_text().splitlines()[-2:] == ['+TOKEN = "***"', "+a = ***"]
    assert (tmp_path / "run/overrides.txt").read_text() == "tracker.group=***\ntracker.group=x\n"
    assert read_frozen(tmp_path / "run/config.yaml") == OmegaConf.to_container(cfg, resolve=True)


@pytest.mark.parametrize("text", ["${oc.env:HOME_TOKEN}", r"a\${b}", r"\\${oc.env:HOME_TOKEN}", "${a:${b}}"])
def test_a_frozen_file_resolves_nothing(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says what it says, whoever opens it."""
    monkeypatch.setenv("HOME_TOKEN", "correct horse")
    (tmp_path / "config.yaml").write_text(json.dumps({"a": text, "b": [text], "c": {"d": text}}))
    found = read_frozen(tmp_path / "config.yaml")
    assert OmegaConf.to_container(found, resolve=True) == {"a": text, "b": [text], "c": {"d": text}}
    assert "correct horse" not in OmegaConf.to_yaml(found, resolve=True)


def test_a_resume_freezes_text_and_no_secret(
    composed: Callable[..., DictConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    freeze(tmp_path, composed(), [])
    monkeypatch.setenv("HOME_TOKEN", "correct horse")
    with pytest.raises(ConfigError, match="HOME_TOKEN, but settings are stored"):
        change_layout(read_run(tmp_path), ["tracker.group=${oc.env:HOME_TOKEN}"])
    monkeypatch.setenv("PLAIN", "plain")
    overrides = ["tracker.group=${oc.env:PLAIN}", r"tracker.project=\${oc.env:PLAIN}"]
    written = record_layout(tmp_path, change_layout(read_run(tmp_path), overrides), overrides)
    monkeypatch.setenv("PLAIN", "changed")
    tracker = RunConfig.of_run(tmp_path).tracker
    assert (tracker.group, tracker.project) == ("plain", "${oc.env:PLAIN}")
    (tmp_path / "resume-x.yaml").write_text("name: other\n")
    assert read_run(tmp_path).name == "t", f"only files like {written.name} change a run"


def test_messages_hide_secrets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME_TOKEN", "correct horse")
    with (tmp_path / "said").open("w") as stream:
        Terminal(stream, 1).say(f"it's [b] :smile: {PLANTED} correct horse")
    said = (tmp_path / "said").read_text()
    assert said.endswith("it's [b] :smile: *** ***\n"), "and change nothing else"


def test_wandb_gets_no_secret(
    run_config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its settings, its copy of the code, and the variables of SLURM that it records."""
    import wandb

    import trainer.monitor.tracker as module

    given: dict = {}
    monkeypatch.setattr(wandb, "init", lambda **arguments: given.update(arguments) or pytest.fail("enough"))
    monkeypatch.setenv("SLURM_JWT", "correct horse")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    config = run_config("tracker.wandb=offline", f"tracker.tags=[{PLANTED}]")
    for name in ("config.yaml", "overrides.txt", "environment.json", "git.txt"):
        (tmp_path / name).write_text(f"{name}: {PLANTED}\n")
    with pytest.raises(BaseException, match="enough"):
        Tracker(config, tmp_path, 1, print, is_main=True)
    assert given["config"]["tracker"]["tags"] == [HIDDEN]
    assert given["settings"]["disable_git"]
    assert given["settings"]["save_code"] is False
    assert "SLURM_JWT" not in os.environ
    assert os.environ["SLURM_JOB_ID"] == "7"
    (tmp_path / "code/trainer").mkdir(parents=True)
    (tmp_path / "code/trainer/mine.py").write_text(f"TOKEN = '{PLANTED}'\n")
    (tmp_path / "code/trainer/other.py").write_text("x = 1\n")
    monkeypatch.setattr(module, "ROOT", tmp_path / "code")
    code = module._code("code-x", tmp_path)
    stored = {path: Path(entry.local_path).read_text() for path, entry in code.manifest.entries.items()}
    assert stored["trainer/mine.py"] == f"TOKEN = '{HIDDEN}'\n"
    assert stored["trainer/other.py"] == "x = 1\n"
    assert stored["run/git.txt"] == f"git.txt: {HIDDEN}\n"
