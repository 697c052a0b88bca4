"""What a foreign file must not do."""

import json
import pickle
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from data_pipeline.chat import samples
from data_pipeline.config import DataError, SourceConfig
from data_pipeline.inputs import list_inputs
from data_pipeline.manifest import FORMAT, Manifest, to_json
from data_pipeline.readers import plan_slices, read_rows
from data_pipeline.tokenizer import Tokenizer
from moe.config import ConfigError, ModelConfig
from moe.hf import INDEX, locate, save_hf
from moe.model import CausalLM
from slurm.jobs import points_of, runs_of
from slurm.status import last_metrics
from trainer import inspect
from trainer.checkpoints.folder import damage
from trainer.checkpoints.weights import read_tensors, selection_bias
from trainer.monitor.report import _lines
from trainer.settings.run_folder import (
    is_inside,
    read_manifest,
    read_run,
    read_state,
    write_manifest,
)

ROOT = Path(__file__).parents[3]
DEEP = 100_000 * "[" + 100_000 * "]"


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
