"""The check list of an exported folder: what those who serve it read, and the answers that it gives."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from commands import SMALL, python
from layouts import FAMILY, small_config
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
    pipeline,
)

from data_pipeline.tokenizer import load_tokenizer, train_tokenizer
from moe.hf import save_hf
from moe.init import init_weights
from moe.model import CausalLM
from trainer import export

# Keys of config.json that vLLM (vllm/model_executor/models) and SGLang (python/sglang/srt/models) read.
ALL = {
    *("architectures", "model_type", "torch_dtype", "vocab_size", "hidden_size", "hidden_act"),
    *("intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("rms_norm_eps", "max_position_embeddings", "rope_theta", "rope_scaling", "tie_word_embeddings"),
    *("use_sliding_window", "sliding_window", "eos_token_id", "bos_token_id"),
}
MOE = {"num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"}
MOE |= {"decoder_sparse_step", "mlp_only_layers"}
SHARED = {"shared_expert_intermediate_size"}
LINEAR = {"layer_types", "partial_rotary_factor", "linear_num_key_heads", "linear_num_value_heads"}
LINEAR |= {"linear_key_head_dim", "linear_value_head_dim", "linear_conv_kernel_dim"}
SERVED = {
    "qwen2": ("Qwen2ForCausalLM", ALL),
    "qwen3": ("Qwen3ForCausalLM", ALL | {"attention_bias"}),
    "qwen2_moe": ("Qwen2MoeForCausalLM", ALL | MOE | SHARED | {"qkv_bias"}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", ALL | MOE | {"attention_bias"}),
    "qwen3_next": ("Qwen3NextForCausalLM", ALL | MOE | SHARED | LINEAR | {"attention_bias"}),
}
LIMIT = 40_000  # bytes of a shard
TEXTS = [
    "to leave",
    "  two  spaces\n\n\ttab",
    "naïve — 日本語 🙂",
    "e\u0301",
    "1234567",
    "",
]
QUESTIONS = {"Is 7 even?": "No, 7 is odd.", "Is 4 even?": "Yes, it is.", "Who are you?": "A small model."}


@pytest.mark.parametrize("family", SERVED)
def test_the_check_list(tmp_path: Path, family: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = tmp_path / "hf", tmp_path / "out"
    model = CausalLM(small_config(*FAMILY[family], "model.vocab_size=512").model)
    init_weights(model, seed=0)
    save_hf(model, folder)
    (folder / "tokenizer.json").write_text(train_tokenizer(["to export is to leave"] * 3, 400))
    assert export.main([str(folder), str(out), "--max-shard-size", "40KB", "--dtype", "bf16"]) == 0

    architecture, keys = SERVED[family]
    config = json.loads((out / "config.json").read_text())
    assert keys <= config.keys()
    assert config["architectures"] == [architecture]
    assert (config["model_type"], config["torch_dtype"]) == (family, "bfloat16")
    assert AutoConfig.from_pretrained(out).rope_parameters["rope_theta"] == config["rope_theta"]

    # transformers' own class for qwen2 changes texts that are not in NFC, as Qwen's tokenizer does
    told = "AutoTokenizer composes the characters of each text" in capsys.readouterr().out
    assert told == (family == "qwen2")
    kind = PreTrainedTokenizerFast if told else AutoTokenizer
    tokenizer, ours = kind.from_pretrained(out), load_tokenizer(folder)
    stops = [ours.control_id("<|im_end|>"), ours.end_of_text]
    generation = GenerationConfig.from_pretrained(out)
    assert (generation.eos_token_id, generation.pad_token_id) == (stops, stops[1])
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert ids == ours.encode(text)
        assert tokenizer.decode(ids) == text
    # theirs reads control tokens in a text, as who serves a rendered prompt wants it
    assert tokenizer("<|im_start|>")["input_ids"] == [ours.control_id("<|im_start|>")]
    assert tokenizer.chat_template == (out / "chat_template.jinja").read_text()
    assert tokenizer.model_max_length == config["max_position_embeddings"]

    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == sorted(path.name for path in out.glob("*.safetensors"))
    found, total = {}, 0
    for file in files:
        with safe_open(out / file, "pt") as shard:
            assert shard.metadata()["format"] == "pt"
            sizes = [shard.get_tensor(name).nbytes for name in shard.keys()]  # noqa: SIM118
            found |= dict.fromkeys(shard.keys(), file)
        assert sum(sizes) <= LIMIT or len(sizes) == 1, "a shard is larger only for one tensor"
        total += sum(sizes)
    assert (found, total) == (index["weight_map"], index["metadata"]["total_size"])
    assert ("lm_head.weight" in found) != config["tie_word_embeddings"]

    checked = subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=out, check=False)
    assert checked.returncode == 0
    listed = {line.split("  ")[1] for line in (out / "SHA256SUMS").read_text().splitlines()}
    assert listed == {path.name for path in out.iterdir()} - {"SHA256SUMS"}


def test_shards_are_under_5_gb_unless_told_otherwise() -> None:
    assert export._size("5GB") == 5 * 10**9
    with pytest.raises(SystemExit):
        export.main(["runs/a"])


def test_an_sft_model_answers_in_a_pipeline_of_transformers_as_here(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}
        for asked, said in QUESTIONS.items()
    ]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 40))
    sources = "data.sources={talk: {kind: sft, paths: [chat.jsonl]}}"
    keys = [*SMALL, "name=sft", "data=jsonl", sources, "data.dir=prepared", "data.tokenizer_vocab_size=512"]
    keys += ["data.packing=best_fit", "data.deduplicate=none", "data.validation_fraction=0.1"]
    keys += ["stage.train_tokens=30720", "optimizer.lr=1e-2", "evaluate.every_steps=0"]
    keys += ["checkpoint.every_steps=100", "deepspeed=zero1"]
    for command in ("data_pipeline", "trainer"):
        done = python(command, *keys, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
    assert python("trainer.export", "runs/sft", "out", cwd=tmp_path).returncode == 0
    asks = "".join(json.dumps({"messages": row["messages"][:1]}) + "\n" for row in rows)
    (tmp_path / "asks.jsonl").write_text(asks)
    here = ["--prompts", "asks.jsonl", "--out", "said.jsonl", "--no-thinking", "--tokens", "24"]
    done = python("trainer.generate", "runs/sft", *here, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = map(json.loads, (tmp_path / "said.jsonl").read_text().splitlines())
    ours = {line["messages"][0]["content"]: line["completion"] for line in lines}

    answer = pipeline("text-generation", model=str(tmp_path / "out"), dtype=torch.float32, device="cpu")
    for row in rows:
        asked = row["messages"][0]["content"]
        template = {"tokenizer_encode_kwargs": {"enable_thinking": False}}
        said = answer(row["messages"][:1], max_new_tokens=24, do_sample=False, **template)
        theirs = said[0]["generated_text"][-1]["content"]
        assert theirs == ours[asked]
        assert theirs == QUESTIONS[asked], "it has learned the answer, and stops after it"
