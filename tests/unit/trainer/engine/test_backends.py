from importlib.util import find_spec

import pytest
import torch
from hydra import compose, initialize_config_module

from moe import attention, trial
from moe.kernels import support
from trainer.engine.backends import choose_backends
from trainer.monitor.terminal import opening
from trainer.settings.config import RunConfig


@pytest.fixture
def config():
    with initialize_config_module("conf", version_base="1.3"):
        return RunConfig.load(compose("train", overrides=["experiment=demo", "name=t"]))


@pytest.fixture
def choose(config, monkeypatch):
    """The choice for a GPU of this compute capability, of which torch is told here."""
    caches = (support.obstacle, trial.kernels_obstacle, attention.varlen_obstacle, attention._newer_flash)
    monkeypatch.setattr(trial, "_results", lambda device, dtype: [])  # there is no GPU to try them on

    def make(capability):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        for function in caches:
            function.cache_clear()
        return choose_backends(config.model, "auto", torch.device("cuda"), torch.bfloat16)

    yield make
    for function in caches:
        function.cache_clear()


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed; `make megablocks` does it")
@pytest.mark.parametrize(("capability", "passes"), [((9, 0), "Triton"), ((7, 5), "torch")])
def test_the_first_line_names_the_passes_between_products(config, choose, capability, passes):
    backends = choose(capability)
    assert backends.names["passes"] == passes
    slow = [warning for warning in backends.warnings if "compute capability 8.0, not 7.5" in warning]
    assert bool(slow) == (passes == "torch")
    lines = opening(config, config.plan(2), torch.device("cpu"), backends, 0).splitlines()
    assert f"passes {passes})" in lines[0]
    assert lines[1:] == (
        ["  the first step compiles kernels, once per machine"] if passes == "Triton" else []
    )


def test_a_machine_without_triton_is_told(choose, monkeypatch):
    monkeypatch.setattr(support, "find_spec", lambda name: None)
    backends = choose((9, 0))
    assert backends.names["passes"] == "torch"
    assert any(
        "Triton is not installed; run `pip install triton`" in warning for warning in backends.warnings
    )


def test_a_cpu_has_no_such_choice(config):
    backends = choose_backends(config.model, "auto", torch.device("cpu"), torch.float32)
    assert backends.names == {"experts": "loop", "attention": "per document"}
    assert len(opening(config, config.plan(2), torch.device("cpu"), backends, 0).splitlines()) == 1
