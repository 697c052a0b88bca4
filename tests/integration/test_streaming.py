"""A run on text that was not prepared trains, stops and resumes exactly."""

import signal
from pathlib import Path

from commands import assert_same_run, last_step, python
from test_runs import interrupt


def streamed(small: list[str]) -> list[str]:
    """The overrides of a run that reads the raw text of the prepared corpus through relative paths."""
    folder = next(Path(a.split("=")[1]) for a in small if a.startswith("data.dir=")).parent
    own = [a.replace(f"{folder}/", "corpus/") for a in small if "vocab_size=512" not in a or "model" in a]
    settings = ["data.mode=streaming", "data.tokenizer=corpus/prepared", "data.tokenizer_vocab_size=null"]
    return [*own, *settings, "evaluate.every_steps=0", "deepspeed=zero1"]


def test_a_streaming_run_goes_on_exactly(corpus, small, tmp_path):
    folder = next(Path(a.split("=")[1]) for a in corpus if a.startswith("data.dir=")).parent
    (tmp_path / "corpus").symlink_to(folder)
    straight = python(*streamed(small), "name=straight", cwd=tmp_path)
    assert straight.returncode == 0, straight.stdout + straight.stderr
    run_dir = tmp_path / "runs/broken"
    code = interrupt(
        [*streamed(small), "name=broken"], tmp_path, run_dir, 2, lambda run: run.send_signal(signal.SIGTERM)
    )
    assert code == 0
    assert last_step(run_dir) < 8, "the run must stop before its end"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    finished = python("trainer.resume", str(run_dir), cwd=elsewhere)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert_same_run(tmp_path / "runs/straight", run_dir)
    hf = run_dir / "checkpoints/step-00000008/hf/tokenizer.json"
    assert hf.read_bytes() == (folder / "prepared/tokenizer.json").read_bytes()
    refused = python("trainer.evaluate", str(run_dir), cwd=tmp_path)
    assert refused.returncode == 2
    assert "trained with data.mode=streaming, which keeps no held-out rows" in refused.stderr


def test_what_a_streaming_run_lacks_is_named(corpus, small, tmp_path):
    folder = next(Path(a.split("=")[1]) for a in corpus if a.startswith("data.dir=")).parent
    (tmp_path / "corpus").symlink_to(folder)
    done = python(*streamed(small), "name=a", "evaluate.every_steps=4", "data.packing=best_fit", cwd=tmp_path)
    assert done.returncode == 2
    assert (
        "evaluate.every_steps=4 needs held-out rows, which data.mode=streaming does not keep" in done.stderr
    )
    assert "data.mode=streaming: data.packing=best_fit needs all lengths" in done.stderr
    assert "Traceback" not in done.stderr
    done = python(*streamed(small), "name=a", "data.sources.text.paths=[corpus/nothing.jsonl]", cwd=tmp_path)
    assert (done.returncode, "corpus/nothing.jsonl matches no file" in done.stderr) == (2, True)
