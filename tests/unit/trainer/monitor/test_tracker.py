"""Failures of W&B do not stop training."""

import resource

from trainer.monitor.tracker import Tracker, _wandb_mode


def test_a_home_that_cannot_be_read_means_no_key(tmp_path, monkeypatch):
    (tmp_path / ".netrc").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    assert _wandb_mode("auto") == "offline"


def test_a_full_disk_leaves_no_empty_run_id(tmp_path, run_config):
    """An empty file would be kept, and each later attempt would start another W&B run."""
    said: list[str] = []
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        Tracker(run_config("tracker.wandb=offline"), tmp_path, 1, said.append, is_main=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "W&B has failed" in said[0]
    assert not (tmp_path / "wandb_id").exists()
