"""A model that `trainer.generate` can continue texts with."""

import pytest

from data_pipeline.tokenizer import train_tokenizer
from moe.hf import save_hf
from moe.init import init_weights
from moe.model import CausalLM
from trainer import generate

TEXT = "the quick brown fox jumps over the lazy dog\n" * 20


@pytest.fixture
def folder(run_config, tmp_path):
    """A Hugging Face folder of random weights, with a tokenizer."""
    hf = tmp_path / "hf"
    model = CausalLM(run_config("model=tiny_dense", "model.vocab_size=320").model)
    init_weights(model, 0)
    save_hf(model, hf)
    (hf / "tokenizer.json").write_text(train_tokenizer([TEXT], 320))
    return hf


@pytest.fixture
def say(folder, capsys):
    """`say(argument, ...)`: exit code, output and error of the command."""

    def run(*arguments):
        capsys.readouterr()
        code = generate.main([str(folder), *map(str, arguments)])
        return code, *capsys.readouterr()

    return run
