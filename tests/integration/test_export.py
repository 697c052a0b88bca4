"""`python -m trainer.export` and `trainer.evaluate`: on real runs, after a kill, with wrong arguments."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from commands import ENVIRONMENT, python
from omegaconf import OmegaConf
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from data_pipeline.chat import encode
from data_pipeline.config import read_template
from data_pipeline.templated import template_of
from data_pipeline.tokenizer import load_tokenizer, train_tokenizer
from moe.config import ModelConfig
from moe.hf import load_hf, save_hf
from moe.model import CausalLM
from trainer import evaluate, export
from trainer.checkpoints.weights import load_model
from trainer.ranks.runtime import Ranks

ROOT = Path(__file__).parents[2]
MB = 10**6
SHORT = ["stage.train_tokens=1024", "optimizer.lr=5e-3", "evaluate.every_steps=2"]  # two steps
DENSE = ["model=tiny_dense", "model.num_experts=0", "parallel.ep_size=1", "model.intermediate_size=96"]
SOURCES = ("loss/text", "loss/second")
# keys of config.json of Qwen3-30B-A3B, except max_window_layers and output_router_logits (no effect here)
RELEASED_KEYS = {
    *("architectures", "attention_bias", "attention_dropout", "bos_token_id", "decoder_sparse_step"),
    *("eos_token_id", "head_dim", "hidden_act", "hidden_size", "initializer_range", "intermediate_size"),
    *("max_position_embeddings", "mlp_only_layers", "model_type", "moe_intermediate_size", "norm_topk_prob"),
    *("num_attention_heads", "num_experts", "num_experts_per_tok", "num_hidden_layers", "pad_token_id"),
    *("num_key_value_heads", "rms_norm_eps", "rope_scaling", "rope_theta", "router_aux_loss_coef"),
    *("sliding_window", "tie_word_embeddings", "torch_dtype", "transformers_version", "use_cache"),
    *("use_sliding_window", "vocab_size"),
}
SHAPE = ModelConfig(
    **{
        **OmegaConf.to_container(OmegaConf.load(ROOT / "conf/model/_base.yaml")),
        "use_qk_norm": True,
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
    }
)


def run_export(source: Path, out: Path, *arguments: str) -> int:
    """Run the command line in this process, because a new process takes seconds to start."""
    return export.main([str(source), str(out), *arguments])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_equal_weights(a: Path, b: Path) -> None:
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def make_folder(folder: Path, config: ModelConfig, seed: int = 0, max_shard_bytes: int = 40 * MB) -> Path:
    """A folder like the `hf/` of a checkpoint: random weights in a few shards, and a tokenizer."""
    torch.manual_seed(seed)
    model = CausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    save_hf(model, folder, max_shard_bytes=max_shard_bytes)
    (folder / "tokenizer.json").write_text(train_tokenizer(["to export is to leave"] * 3, 400))
    return folder


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("small") / "hf", SHAPE)


@pytest.fixture(scope="module")
def large_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 340 MB in shards of 40 MB."""
    large = ModelConfig(
        **{**vars(SHAPE), "hidden_size": 512, "num_experts": 32, "moe_intermediate_size": 416}
    )
    return make_folder(tmp_path_factory.mktemp("large") / "hf", large)


@pytest.mark.parametrize(
    "layout",
    [
        ["deepspeed=zero3", "parallel.ep_size=2"],
        pytest.param(["deepspeed=zero2", "parallel.ep_size=2", "dtype=bf16"], marks=pytest.mark.slow),
        pytest.param(
            ["deepspeed=zero1", "parallel.ep_size=1", "balance.bias_update_rate=0.05"], marks=pytest.mark.slow
        ),
        pytest.param(["deepspeed=zero1", *DENSE], marks=pytest.mark.slow),
    ],
    ids=["zero3-ep2", "zero2-ep2-bf16", "zero1-ep1", "dense"],
)
def test_a_run_goes_to_the_hub(train, tmp_path, layout):
    """transformers computes our logits from the export, and evaluate prints the losses of the run."""
    trained = train("name=a", *SHORT, *layout)
    assert trained.returncode == 0, trained.stdout + trained.stderr
    done = python("trainer.export", "runs/a", "out", "--max-shard-size", "200KB", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "from a/checkpoints/step-00000002/hf" in done.stdout
    assert ("with a selection bias" in done.stdout) == ("balance.bias_update_rate=0.05" in layout)
    assert "hf upload YOUR_NAME/out out" in done.stdout.splitlines()[-1]
    card = (tmp_path / "out/README.md").read_text()
    front, _, text = card.removeprefix("---\n").partition("\n---\n")
    assert yaml.safe_load(front)["library_name"] == "transformers"
    lines = map(json.loads, (tmp_path / "runs/a/metrics.jsonl").read_text().splitlines())
    last = {key: value for line in lines for key, value in line.items()}
    assert f"| Tokens | {last['tokens']:,} of {last['tokens']:,} |" in text
    assert re.search(r"\| `text` \| [\d,]+ tokens, \d+\.\d\d epochs \|", text)
    assert f"| `loss/validation` | {last['loss/validation']:.4f} |" in text
    assert str(tmp_path) not in card, "no path of this machine"
    assert (tmp_path / "out/training.png").read_bytes().startswith(b"\x89PNG")
    out, hf = tmp_path / "out", tmp_path / "runs/a/checkpoints/step-00000002/hf"
    shards = sorted(out.glob("model-*.safetensors"))
    assert [path.name for path in shards] == [
        f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))
    ]
    assert len(shards) > 2
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
    assert_equal_weights(out, hf)

    theirs, report = AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    ids = torch.arange(40).unsqueeze(0)
    with torch.no_grad():
        ours = load_model(hf, Ranks(0, 0, 1, torch.device("cpu")))(
            ids, ids, torch.tensor([0, 40], dtype=torch.int32)
        )
        torch.testing.assert_close(ours.logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.decode(tokenizer("The text number")["input_ids"]) == "The text number"

    lines = (tmp_path / "runs/a/metrics.jsonl").read_text().splitlines()
    logged = next(line for line in map(json.loads, lines) if "loss/validation" in line)
    source = "runs/a" if layout[0] == "deepspeed=zero1" else "runs/a/checkpoints/step-00000002"
    said = python("trainer.evaluate", source, cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    found = {line.split()[0]: float(line.split()[1]) for line in said.stdout.splitlines()}
    assert found.keys() == {key for key in logged if key.startswith("loss/")} == {*SOURCES, "loss/validation"}
    if "dtype=bf16" not in layout:
        assert found == pytest.approx({key: logged[key] for key in found}, rel=1e-5)


@pytest.mark.slow
def test_a_dense_run_is_upcycled(train, tmp_path):
    """One step at a rate near zero keeps the held-out loss of the dense run, on two ranks with EP 2."""
    assert train("name=dense", *SHORT, *DENSE).returncode == 0
    upcycled = ["stage.init_from=runs/dense", "init.upcycle=split", "stage.train_tokens=512"]
    upcycled += ["evaluate.every_steps=1", "optimizer.lr=1e-30", "schedule.warmup_steps=0"]
    refused = train("name=no", *upcycled, "model.moe_intermediate_size=64", "model.norm_topk_prob=false")
    assert refused.returncode == 2
    assert "init.upcycle=split needs model.norm_topk_prob=true" in refused.stderr
    assert "init.upcycle=split needs model.moe_intermediate_size=64 to be a proper divisor" in refused.stderr
    done = train("name=moe", *upcycled, "model.moe_intermediate_size=24")
    assert done.returncode == 0, done.stdout + done.stderr
    losses = {}
    for name in ("dense", "moe"):
        lines = map(json.loads, (tmp_path / f"runs/{name}/metrics.jsonl").read_text().splitlines())
        losses[name] = [line["loss/validation"] for line in lines if "loss/validation" in line][-1]
    assert losses["moe"] == pytest.approx(losses["dense"], rel=1e-5)


def test_what_a_hub_folder_holds(small_folder, tmp_path):
    out = tmp_path / "out"
    assert run_export(small_folder, out, "--dtype", "bf16") == 0
    assert {path.name for path in out.iterdir()} == {
        *("model.safetensors", "config.json", "generation_config.json"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "SHA256SUMS"),
    }
    config = json.loads((out / "config.json").read_text())
    assert config.keys() == RELEASED_KEYS
    assert config["torch_dtype"] == "bfloat16"
    tokenizer = AutoTokenizer.from_pretrained(out)
    stops = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == stops
    assert config["eos_token_id"] == tokenizer.eos_token_id == stops[1]
    said = [{"role": "user", "content": "leave"}]
    text = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nleave<|im_end|>\n<|im_start|>assistant\n"
    before, after = weights(small_folder), weights(out)
    assert all(torch.equal(after[name], before[name].bfloat16()) for name in before)
    model = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert model.dtype == torch.bfloat16
    assert model.generation_config.eos_token_id == stops


def test_a_bias_that_is_lost_is_told(small_folder, tmp_path, capsys):
    shutil.copytree(small_folder, tmp_path / "step/hf")
    assert run_export(tmp_path / "step/hf", tmp_path / "without") == 0
    assert "selection bias" not in capsys.readouterr().out
    torch.save({"bias": torch.zeros(4, 8)}, tmp_path / "step/balance.pt")
    assert run_export(tmp_path / "step/hf", tmp_path / "with") == 0
    assert "with a selection bias" in capsys.readouterr().out


def test_the_template_of_the_run_is_exported(small_folder, tmp_path):
    """It is that of the checkpoint; transformers and this project make the same prompt of it."""
    text = read_template("qwen3_5")
    folder = tmp_path / "with_template"
    shutil.copytree(small_folder, folder)
    (folder / "chat_template.jinja").write_text(text)
    assert run_export(folder, tmp_path / "out") == 0
    assert (tmp_path / "out/chat_template.jinja").read_text() == text
    assert json.loads((tmp_path / "out/tokenizer_config.json").read_text())["chat_template"] == text
    tokenizer, said = AutoTokenizer.from_pretrained(tmp_path / "out"), [{"role": "user", "content": "leave"}]
    for thinks in (True, False):
        options = {"add_generation_prompt": True, "enable_thinking": thinks, "return_dict": False}
        expected = tokenizer.apply_chat_template(said, **options)
        pieces = template_of(tmp_path / "out").prompt({"messages": said}, thinks)
        assert encode(pieces, load_tokenizer(tmp_path / "out"))[0].tolist() == expected


def test_an_export_in_fp8_is_read_by_transformers_and_here(small_folder, tmp_path):
    """Linear weights in blocks of 128 x 128, in shards whose scales may be in another file, all else bf16."""
    out = tmp_path / "out"
    assert run_export(small_folder, out, "--dtype", "fp8", "--max-shard-size", "60KB") == 0
    config = json.loads((out / "config.json").read_text())
    assert config.keys() == RELEASED_KEYS | {"quantization_config"}
    said = config["quantization_config"]
    assert (said["quant_method"], said["weight_block_size"], said["fmt"]) == ("fp8", [128, 128], "e4m3")
    assert said["activation_scheme"] == "dynamic"
    stored, before = weights(out), weights(small_folder)
    small = {name for name, tensor in stored.items() if tensor.dtype == torch.float8_e4m3fn}
    assert small == {name for name in before if name.endswith("_proj.weight")}
    assert stored.keys() == before.keys() | {f"{name}_scale_inv" for name in small}
    assert set(said["modules_to_not_convert"]) == {
        name.removesuffix(".weight") for name in before.keys() - small
    }
    assert len(list(out.glob("*.safetensors"))) > 2
    model = load_model(out, Ranks(0, 0, 1, torch.device("cpu")), torch.float32)
    ids = torch.arange(40).unsqueeze(0)
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        ours = model(ids, ids, torch.tensor([0, 40], dtype=torch.int32)).logits
        torch.testing.assert_close(ours, theirs.float()(ids).logits, rtol=1e-4, atol=1e-4)
    assert run_export(out, tmp_path / "back") == 0  # dequantised
    assert json.loads((tmp_path / "back/config.json").read_text()).keys() == RELEASED_KEYS
    again = weights(tmp_path / "back")
    for name, tensor in model.state_dict().items():
        if name in again:
            torch.testing.assert_close(again[name].float(), tensor.bfloat16().float(), rtol=0, atol=0)


def test_multi_token_prediction_stays_behind_where_it_has_no_place(tmp_path, capsys):
    ahead = replace(SHAPE, num_hidden_layers=1, num_nextn_predict_layers=1)
    plain = make_folder(tmp_path / "qwen3_moe", ahead)
    assert run_export(plain, tmp_path / "out") == 0
    assert "multi-token prediction is not exported" in capsys.readouterr().out
    assert weights(tmp_path / "out").keys() == {name for name in weights(plain) if name[:4] != "mtp."}
    assert "num_nextn_predict_layers" not in json.loads((tmp_path / "out/config.json").read_text())
    hybrid = replace(
        ahead,
        zero_centered_norm=True,
        attn_output_gate=True,
        shared_expert_gate=True,
        shared_expert_intermediate_size=64,
    )
    assert run_export(make_folder(tmp_path / "qwen3_next", hybrid), tmp_path / "next") == 0
    assert "is not exported" not in capsys.readouterr().out
    assert "mtp.fc.weight" in weights(tmp_path / "next")
    _, report = AutoModelForCausalLM.from_pretrained(tmp_path / "next", output_loading_info=True)
    assert not any(report.values()), report


def test_fused_experts_are_exported_one_by_one(small_folder, tmp_path):
    theirs = AutoModelForCausalLM.from_pretrained(small_folder, dtype=torch.float32)
    fused = {name: tensor.contiguous() for name, tensor in theirs.state_dict().items()}
    assert any(name.endswith("gate_up_proj") for name in fused)
    (tmp_path / "hf").mkdir()
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / "hf" / name).write_bytes((small_folder / name).read_bytes())
    save_file(fused, tmp_path / "hf/model.safetensors")
    assert run_export(tmp_path / "hf", tmp_path / "out") == 0
    assert_equal_weights(tmp_path / "out", small_folder)


def start_export(source: Path, out: Path, *arguments: str) -> subprocess.Popen:
    command = [
        sys.executable,
        "-m",
        "trainer.export",
        str(source),
        str(out),
        "--max-shard-size",
        "30MB",
        *arguments,
    ]
    return subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


PEAK = """
import sys
from pathlib import Path
from trainer.export import main
code = main(sys.argv[1:])
print(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")))
sys.exit(code)
"""


def peak_bytes(source: Path, out: Path, *arguments: str) -> int:
    """Peak resident memory of one export; ru_maxrss of a child would start at that of this process."""
    command = [sys.executable, "-c", PEAK, str(source), str(out), "--max-shard-size", "30MB", *arguments]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=True)
    return int(done.stdout.split()[-2]) * 1024


@pytest.mark.parametrize(
    "arguments", [[], pytest.param(["--dtype", "bf16"], marks=pytest.mark.slow)], ids=str
)
def test_memory_stays_below_two_shards(small_folder, large_folder, tmp_path, arguments):
    """The memory that an export of 340 MB takes beyond a tiny export, also when it converts the dtype."""
    held = sum(path.stat().st_size for path in large_folder.glob("*.safetensors"))
    assert held > 300 * MB
    taken = peak_bytes(large_folder, tmp_path / "large", *arguments)
    taken -= peak_bytes(small_folder, tmp_path / "small", *arguments)
    assert len(list((tmp_path / "large").glob("model-*"))) > 5
    print(f"peak beyond the small export: {taken / MB:.1f} MB")
    assert taken < 2 * 30 * MB


def test_a_killed_export_goes_on(large_folder, tmp_path):
    out = tmp_path / "out"
    process = start_export(large_folder, out)
    deadline = time.monotonic() + 60
    while len(list(out.glob("model-*"))) < 3 or not list(out.glob(".model-*")):
        assert time.monotonic() < deadline
        assert process.poll() is None, "the export ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=10)
    assert not (out / "config.json").exists()
    there = {path.name: path.stat().st_mtime_ns for path in out.glob("model-*")}
    again = start_export(large_folder, out)
    said, errors = again.communicate(timeout=100)
    assert again.returncode == 0, errors
    assert set(re.findall(r"(\S+) kept and read back", said)) == there.keys()
    assert all((out / name).stat().st_mtime_ns == then for name, then in there.items())
    assert not list(out.glob(".*"))
    assert_equal_weights(out, large_folder)


def test_a_flipped_bit_is_found(small_folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert run_export(small_folder, out) == 0
    with (out / "model.safetensors").open("r+b") as file:
        file.seek(-5, os.SEEK_END)
        (byte,) = file.read(1)
        file.seek(-5, os.SEEK_END)
        file.write(bytes([byte ^ 4]))
    assert run_export(small_folder, out) == 1
    assert "out/model.safetensors differs from" in capsys.readouterr().err


def test_an_out_of_something_else_is_refused(small_folder, tmp_path, capsys):
    """The message names what the folder holds, and its files stay unchanged."""
    other, out, mine = make_folder(tmp_path / "other/hf", SHAPE, seed=1), tmp_path / "out", tmp_path / "mine"
    assert run_export(other, out) == 0
    mine.mkdir()
    (mine / "config.json").write_text("{}")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/model.safetensors").write_bytes(b"no")
    for source, target, arguments, message in [
        (
            small_folder,
            out,
            [],
            r"is from \S+/other/hf \(float32, 1 .*, not from \S+/hf .*; choose another folder",
        ),
        (small_folder, other, [], r"hf/model.safetensors is from another program, not from"),
        (small_folder, tmp_path / "damaged", [], r"damaged/model.safetensors is from an unknown source"),
        (small_folder, mine, [], r"mine holds config.json; choose a new folder"),
        (small_folder, mine / "config.json", [], r"mine/config.json cannot be made"),
        (other, out, ["--max-shard-size", "300KB"], r"is from .*5,000,000,000 B\), not from .*300,000 B\)"),
        (other, out, ["--dtype", "bf16"], r"is from .*\(float32, .*, not from .*\(bfloat16, "),
    ]:
        assert run_export(source, target, *arguments) == 2
        assert re.search(message, capsys.readouterr().err)
    assert_equal_weights(out, other)
    for arguments, message in [
        (["--max-shard-size", "7"], "7 is not a size; write 5GB or 300MB"),
        (["--dtype", "int4"], "invalid choice: 'int4'"),
    ]:
        with pytest.raises(SystemExit, match="2"):
            run_export(small_folder, tmp_path / "new", *arguments)
        assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("module", [export, evaluate])
def test_sources_that_are_none(module, tmp_path, capsys):
    for name in ("empty", "gone", "gone/checkpoints/step-00000001"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("empty", "gone"):
        (tmp_path / name / "config.yaml").write_text("")
    (tmp_path / "gone/latest").write_text("step-00000002\n")
    out = [str(tmp_path / "out")] if module is export else []
    for source in ("nowhere", "empty", "gone", "gone/checkpoints/step-00000001"):
        assert module.main([str(tmp_path / source), *out]) == 2
        said = capsys.readouterr().err
        assert source in said or "no value" in said
        assert f"{tmp_path.parent} is not" not in said, "names what was typed, not a folder around it"
    assert not (tmp_path / "out").exists()


def test_shards_read_as_the_library_reads(small_folder, tmp_path):
    """Our own writer follows the format: aligned data, shapes, the metadata that transformers needs."""
    assert run_export(small_folder, tmp_path / "out", "--max-shard-size", "300KB") == 0
    back = CausalLM(SHAPE)
    load_hf(back, tmp_path / "out")
    for path in (tmp_path / "out").glob("model-*"):
        assert path.stat().st_size < 310_000, "300 KB and the names"
        assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0
        with safe_open(path, framework="pt") as reader:
            assert reader.metadata()["format"] == "pt"
