"""Models of the hub by name, from a hub on this machine that speaks the protocol of huggingface.co."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from data_pipeline.tokenizer import train_tokenizer
from moe.hf import save_hf
from moe.init import init_weights
from moe.model import CausalLM

COMMIT = "5f0b02c75b57c5855da9ae460ce51323ea669d8a"
API = "/api/models/me/tiny"
MODEL = ["model=tiny_dense", "model.vocab_size=320", "model.num_hidden_layers=2", "model.hidden_size=32"]


class Hub(BaseHTTPRequestHandler):
    """One model with one commit."""

    folder: Path
    asked: list[str]

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        names = sorted(file.name for file in self.folder.iterdir())
        body, headers = b"", {}
        if path in {API, f"{API}/revision/main", f"{API}/revision/{COMMIT}"}:
            files = [{"rfilename": name} for name in names]
            body = json.dumps({"id": "me/tiny", "sha": COMMIT, "siblings": files, "tags": []}).encode()
        elif path == f"{API}/tree/{COMMIT}":
            sizes = {file.name: file.stat().st_size for file in self.folder.iterdir()}
            tree = [{"type": "file", "oid": "0" * 40, "size": sizes[name], "path": name} for name in names]
            body = json.dumps(tree).encode()
        elif path.startswith("/me/tiny/resolve/") and path.split("/")[-1] in names:
            body = (self.folder / path.split("/")[-1]).read_bytes()
            headers = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": COMMIT}
            if with_body:
                self.asked.append(path.split("/")[-1])
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, run_config) -> Iterator[dict[str, str]]:
    """The environment of a process that asks this hub, with an empty cache."""
    Hub.folder, Hub.asked = tmp_path / "model", []
    model = CausalLM(run_config(*MODEL).model)
    torch.manual_seed(0)
    init_weights(model, 0)
    save_hf(model, Hub.folder)
    (Hub.folder / "tokenizer.json").write_text(train_tokenizer(["the quick brown fox\n" * 20], 320))
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        place = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "cache")}
        yield {**os.environ, **place, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        server.shutdown()


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
