"""Models of the hub by name, from a hub on this machine that speaks the protocol of huggingface.co."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hub_server import COMMIT, Hub, serving
from omegaconf import OmegaConf

from data_pipeline.tokenizer import train_tokenizer
from moe.hf import save_hf
from moe.init import init_weights
from moe.model import CausalLM

MODEL = ["model=tiny_dense", "model.vocab_size=320", "model.num_hidden_layers=2", "model.hidden_size=32"]


@pytest.fixture
def hub(tmp_path: Path, run_config) -> Iterator[dict[str, str]]:
    """The environment of a process that asks this hub, with an empty cache."""
    Hub.folder = tmp_path / "model"
    model = CausalLM(run_config(*MODEL).model)
    torch.manual_seed(0)
    init_weights(model, 0)
    save_hf(model, Hub.folder)
    (Hub.folder / "tokenizer.json").write_text(train_tokenizer(["the quick brown fox\n" * 20], 320))
    with serving() as environment:
        yield {**environment, "HF_HOME": str(tmp_path / "cache")}


def python(*command: str, env: dict[str, str], cwd: Path) -> subprocess.CompletedProcess[str]:
    run = [sys.executable, "-m", *command]
    return subprocess.run(run, env=env, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)


def test_a_run_starts_from_a_model_of_the_hub(hub, tmp_path):
    """The weights are fetched once, at the commit that the name meant when the run was frozen."""
    rows = [json.dumps({"text": f"the quick {n} fox " * 30}) + "\n" for n in range(90)]
    (tmp_path / "a.jsonl").write_text("".join(rows))
    data = ["data=jsonl", "data.dir=made", f"data.tokenizer={Hub.folder}", "data.validation_fraction=0.1"]
    data += ["data.sources={a: {kind: jsonl, paths: [a.jsonl]}}", "name=a", *MODEL]
    made = python("data_pipeline", *data, env=hub, cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    small = ["stage.seq_len=32", "stage.global_batch_size=4", "stage.train_tokens=128", "optimizer.lr=1e-30"]
    small += ["micro_batch_size=2", "schedule.warmup_steps=0", "evaluate.every_steps=0", "dtype=fp32"]
    run = ["trainer", *data, *small, "parallel.nproc_per_node=2", "stage.init_from=me/tiny"]
    done = python(*run, env=hub, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert OmegaConf.load(tmp_path / "runs/a/config.yaml").stage.init_from == f"me/tiny@{COMMIT}"
    assert Hub.asked.count("model.safetensors") == 1
    assert set(Hub.asked) <= {"model.safetensors", "config.json", "tokenizer.json", "generation_config.json"}
    how = ["the", "--tokens", "9"]
    said = [python("trainer.generate", of, *how, env=hub, cwd=tmp_path) for of in ("runs/a", "me/tiny")]
    assert said[0].returncode == said[1].returncode == 0, said[1].stderr
    assert said[0].stdout == said[1].stdout


@pytest.mark.parametrize("name", ["me/other", "me/tiny@nowhere"])
def test_a_model_that_the_hub_does_not_have_is_refused(hub, tmp_path, name):
    done = python("trainer.generate", name, "the", env=hub, cwd=tmp_path)
    assert done.returncode == 2
    assert f"{name} is no folder here, and the hub does not give it" in done.stderr
    assert "Traceback" not in done.stderr
    run = ["trainer", "experiment=demo", "name=b", f"stage.init_from={name}"]
    refused = python(*run, env=hub, cwd=tmp_path)
    assert refused.returncode == 2
    assert f"stage.init_from={name}: {name} is no folder here" in refused.stderr


def test_a_folder_is_uploaded_and_a_refusal_says_what_to_do(hub, tmp_path):
    out = ["trainer.export", str(Hub.folder), "out", "--push", "me/new"]
    env = {**hub, "HF_TOKEN": "hf_nothing"}
    dry = python(*out, "--dry-run", env=env, cwd=tmp_path)
    assert dry.returncode == 0, dry.stderr
    assert "to me/new (private if it is new):" in dry.stdout
    assert "model.safetensors" in dry.stdout
    assert not Hub.created
    done = python(*out, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert Hub.created["name"] == "new"
    assert Hub.created.get("visibility") == "private" or Hub.created.get("private")
    files = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert Hub.uploaded == files
    assert f"{len(files)} files" in done.stdout
    refused = python("trainer.export", str(Hub.folder), "out", "--push", "me/other", env=env, cwd=tmp_path)
    assert refused.returncode == 2
    assert "--push me/other: the hub refuses" in refused.stderr
    assert "log in by `hf auth login`" in refused.stderr
