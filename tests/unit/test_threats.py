"""What a secret, a foreign file or a hostile name must not do."""

import ast
import json
import os
import pickle
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf

from data_pipeline.chat import samples
from data_pipeline.config import DataError, SourceConfig
from data_pipeline.manifest import FORMAT, Manifest, to_json
from data_pipeline.readers import list_inputs, plan_slices, read_rows
from data_pipeline.tokenizer import Tokenizer
from moe.config import ConfigError, ModelConfig
from moe.hf import INDEX, locate, save_hf
from moe.model import CausalLM
from slurm.config import SubmitConfig
from slurm.jobs import points_of, runs_of
from slurm.script import job_script
from slurm.status import last_metrics
from trainer import inspect
from trainer.checkpoints.folder import damage
from trainer.checkpoints.weights import read_tensors, selection_bias
from trainer.monitor.report import _label, _lines
from trainer.monitor.terminal import Terminal
from trainer.monitor.tracker import Tracker
from trainer.ranks.launch import launch
from trainer.resume import change_layout, record_layout
from trainer.settings.command import check, refuse_unsafe
from trainer.settings.config import RunConfig
from trainer.settings.run_folder import (
    freeze,
    is_inside,
    pasted,
    read_frozen,
    read_manifest,
    read_run,
    read_state,
    write_manifest,
)
from trainer.settings.secrets import HIDDEN, redacted, secret_in, unsafe_settings, without_secrets
from trainer.settings.typed import typed

ROOT = Path(__file__).parents[2]
PACKAGES = ("conf", "data_pipeline", "moe", "slurm", "trainer")
PLANTED = "hf_" + "Planted0" * 4  # of the form of a token; none that exists
DEEP = 100_000 * "[" + 100_000 * "]"
HOSTILE = """-it's "q" $(touch oh-no) `touch oh-no`; é ${X} %j #"""


# --- static ---

FORBIDDEN = {"pickle", "cPickle", "dill", "marshal", "shelve", "joblib", "jinja2", "transformers"}
CALLS = {"os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "eval", "exec", "subprocess.getoutput"}
KEYWORDS = {"shell", "allow_pickle", "trust_remote_code"}


@pytest.mark.parametrize("package", PACKAGES)
def test_no_file_of_the_product_asks_a_shell_or_reads_a_pickle(package: str) -> None:
    for path in sorted((ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            where = f"{path}:{getattr(node, 'lineno', '')}"
            if isinstance(node, ast.Import | ast.ImportFrom):
                module = getattr(node, "module", None)
                names = {module or ""} | {alias.name for alias in node.names}
                assert not {name.partition(".")[0] for name in names} & FORBIDDEN, where
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                given = {key.arg: ast.unparse(key.value) for key in node.keywords}
                assert called not in CALLS, where
                assert not KEYWORDS & given.keys(), where
                assert called != "torch.load" or given.get("weights_only") == "True", where


def test_the_job_script_evaluates_only_the_lines_of_setup() -> None:
    lines = (ROOT / "slurm/job.sh").read_text().splitlines()
    assert [line for line in lines if "eval " in line] == [
        'for line in "${SETUP[@]}"; do eval "$line" || give_up "slurm.setup failed: $line"; done'
    ]


# --- secrets in text ---

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


# --- names ---


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
    assert launch(Path("-run"), 1, "cpu", held, ["child", "--"]) == 0
    assert (tmp_path / "-run/seen").exists()
    assert '"--"]' in (ROOT / "trainer/profile.py").read_text()


# --- foreign files ---


class Bomb:
    """A pickle that makes a file when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return Path.touch, (self.mark,)


@pytest.fixture
def small() -> ModelConfig:
    plain = OmegaConf.to_container(OmegaConf.load(ROOT / "conf/model/_base.yaml"))
    shape = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8, "num_experts": 0}
    shape |= {"max_position_embeddings": 64}
    return ModelConfig(**{**plain, **shape, "use_qk_norm": True})


@pytest.mark.parametrize(
    "name",
    ["../secret.safetensors", "/etc/x.safetensors", "pytorch_model.bin", "..", "", 7, "a/b.safetensors"],
)
def test_an_index_names_files_of_its_folder(name: object, small: ModelConfig, tmp_path: Path) -> None:
    save_hf(CausalLM(small), tmp_path / "folder")
    (tmp_path / "folder/model.safetensors").rename(tmp_path / "secret.safetensors")
    (tmp_path / "folder" / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(ConfigError, match=r"index.json cannot be read .*fetch it again"):
        locate(small, tmp_path / "folder")


def test_a_pickle_is_no_weight_file(small: ModelConfig, tmp_path: Path) -> None:
    bomb = Bomb(tmp_path / "exploded")
    for write in (lambda path: torch.save(bomb, path), lambda path: path.write_bytes(pickle.dumps(bomb))):
        write(tmp_path / "model.safetensors")
        with pytest.raises(ConfigError, match=r"model.safetensors cannot be read"):
            locate(small, tmp_path)
        (tmp_path / "hf").mkdir(exist_ok=True)
        write(tmp_path / "balance.pt")
        with pytest.raises(
            ConfigError, match=r"balance.pt is not a file of tensors .* restore the checkpoint"
        ):
            selection_bias(tmp_path / "hf", torch.device("cpu"))
    (tmp_path / "balance.pt").write_bytes(b"")
    with pytest.raises(ConfigError, match="not a file of tensors"):
        read_tensors(tmp_path / "balance.pt")
    torch.save([1], tmp_path / "balance.pt")
    assert selection_bias(tmp_path / "hf", torch.device("cpu")) is None
    assert not bomb.mark.exists()


def test_a_weight_file_may_be_a_folder_or_hold_other_numbers(small: ModelConfig, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_hf(CausalLM(small), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(8, dtype=torch.int64)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"1 misshapen: model.norm.weight I64 instead of F32, BF16"):
        locate(small, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(ConfigError, match=r"model.safetensors cannot be read"):
        locate(small, tmp_path)


def nested(*keys: str) -> str:
    """JSON that is nested in a group of keys, less deep than json.loads refuses."""
    return "".join(f'{{"{key}": ' for key in keys) + "1" + "}" * len(keys)


@pytest.mark.parametrize("text", [DEEP, '{"model_type": ' + DEEP + "}", nested(*["rope_scaling"] * 900)])
def test_a_nested_config_is_one_message(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError):
        ModelConfig.of_folder(tmp_path)


@pytest.mark.parametrize("text", [DEEP, "[]", "7", '{"a": ' + DEEP + "}"])
def test_nested_and_other_json_is_one_message(text: str, small: ModelConfig, tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text(text)
    (tmp_path / "state").write_text(text)
    (tmp_path / "manifest.json").write_text(text)
    (tmp_path / INDEX).write_text(text)
    (tmp_path / "metrics.jsonl").write_text(text + "\n")
    readers: list[tuple[Callable, Path, type[Exception], str]] = [
        (read_state, tmp_path, ConfigError, "state cannot be read"),
        (points_of, tmp_path, ConfigError, "sweep.json cannot be read"),
        (lambda folder: locate(small, folder), tmp_path, ConfigError, "index.json cannot be read"),
        (read_manifest, tmp_path, ValueError, "manifest.json cannot be read"),
        (Manifest.load, tmp_path, DataError, "manifest.json is damaged"),
        (_lines, tmp_path / "metrics.jsonl", ConfigError, "metrics.jsonl cannot be read"),
        (lambda text: Tokenizer(text, "it"), text, DataError, "it is not a tokenizer.json"),
    ]
    for read, given, kind, message in readers:
        with pytest.raises(kind, match=message):
            read(given)
    assert damage(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"loss": 1}\n{"loss":' + text[:30_000] + "..}\n")
    assert last_metrics(tmp_path) == {"loss": 1}


@pytest.mark.parametrize(
    "text", ["a: " + 5000 * "[" + 5000 * "]", "[a]", "a: ${", "a: 1", "stage: 1\ninit: {}"]
)
def test_another_config_is_one_message(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"config.yaml (cannot be read|is not the configuration of a run)"):
        read_run(tmp_path)


def test_a_nested_row_is_a_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"messages": ' + DEEP + '}\n{"text": "good"}\n')
    source = SourceConfig("jsonl", [str(path)])
    (parts,) = plan_slices(source, list_inputs("s", source, {}), 1 << 30)
    first, second = read_rows(source, parts[0])
    assert first.fault is not None
    assert first.fault.startswith("json: ")
    assert second.value == {"text": "good"}
    arguments: dict = {}
    for _ in range(2000):
        arguments = {"a": arguments}
    call = {"role": "assistant", "content": "a", "tool_calls": [{"name": "f", "arguments": arguments}]}
    with pytest.raises(ValueError, match="json: "):
        samples({"messages": [{"role": "user", "content": "q"}, call]}, 0.5)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "hf/../../x"])
def test_a_manifest_names_files_of_its_checkpoint(name: str, tmp_path: Path) -> None:
    """Its checksum is no signature: a foreign one is right."""
    fields = {"step": 1, "files": {name: [1, 2]}}
    write_manifest(tmp_path, fields)
    with pytest.raises(ValueError, match="is no file of a checkpoint"):
        read_manifest(tmp_path)
    assert damage(tmp_path) == [f"manifest.json cannot be read ({name!r} is no file of a checkpoint)"]
    assert not is_inside(name)


def test_a_manifest_of_other_values_is_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = tmp_path / "step-00000001"
    (checkpoint / "hf").mkdir(parents=True)
    for files in ({"a": 1}, [], {"a": [1, 2, 3]}):
        write_manifest(checkpoint, {"step": 1, "files": files})
        assert inspect.main([str(checkpoint)]) == 1
    weights = checkpoint / "hf/model.safetensors"
    weights.write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    size, checksum = weights.stat().st_size, zlib.crc32(weights.read_bytes())
    write_manifest(checkpoint, {"step": 1, "files": {"hf/model.safetensors": [size, checksum]}})
    assert inspect.main([str(checkpoint)]) == 1
    said = capsys.readouterr()
    assert "its manifest or its weights are of no checkpoint" in said.out
    assert not said.err
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("name", ["../../x/train-00000", "/x/train-00000", "s/../train-00000", "train-00000"])
def test_a_manifest_names_shards_of_its_folder(name: str, tmp_path: Path) -> None:
    shard = {"name": name, "documents": 1, "tokens": 1, "crc32": {"tokens": ""}}
    fields = {"format": FORMAT, "settings": {}, "inputs": {}, "rejects_sha256": ""}
    fields["tokenizer"] = {"sha256": "", "vocab_size": 1, "end_of_text": 0}

    def load(shard: dict) -> Manifest:
        record = {"skipped": {}, "validation_unigram_cross_entropy": None}
        sources = {"s": {**record, "shards": {"train": [shard], "validation": []}}}
        (tmp_path / "manifest.json").write_bytes(to_json({**fields, "sources": sources}))
        return Manifest.load(tmp_path)

    assert load({**shard, "name": "s-00000/train-00000"}).shards()
    for wrong in (shard, {**shard, "name": "s/train-00000", "crc32": {"../x": ""}}):
        with pytest.raises(DataError, match="is no shard of slices/"):
            load(wrong)


def test_a_sweep_holds_only_numbered_runs(tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text("[[]]")
    for name in ("0", "10", "2", "copy of 0", "-1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").touch()
    assert [path.name for path in runs_of(tmp_path)] == ["0", "2", "10"]
