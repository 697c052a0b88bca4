"""Runs with a teacher, as a user starts them: beside training, from lessons, stopped, resumed, refused."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import ENVIRONMENT, SMALL, assert_same_run, contents, metrics, python

STUDENT = [*SMALL, "model.hidden_size=32", "distill=teacher", "distill.top_k=8"]


@pytest.fixture(scope="module")
def teacher(corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a larger model."""
    folder = tmp_path_factory.mktemp("teacher")
    done = python("trainer", *SMALL, *corpus, "name=t", "stage.train_tokens=20480", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "runs/t"


@pytest.fixture
def student(corpus: list[str], teacher: Path) -> list[str]:
    """The arguments of a small run with this teacher."""
    return [*STUDENT, *corpus, f"distill.teacher={teacher}"]


@pytest.fixture(scope="module")
def taught(corpus: list[str], teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its lessons, on two ranks."""
    folder = tmp_path_factory.mktemp("lessons")
    keys = [*STUDENT, *corpus, f"distill.teacher={teacher}", "name=s", f"distill.lessons={folder}/said"]
    done = python("trainer.teach", *keys, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "holds the lessons of 64 rows; 1 files are new" in done.stdout
    assert done.stdout.count("\n") < 6, done.stdout
    return folder / "said"


def test_lessons_give_the_run_with_the_teacher_beside_also_after_a_stop(student, taught, teacher, tmp_path):
    beside = python("trainer", *student, "name=beside", cwd=tmp_path)
    assert beside.returncode == 0, beside.stderr
    assert f"teacher: {teacher}/checkpoints/step-00000040/hf" in beside.stdout, "later ones are not meant"
    gone = tmp_path / "gone"
    keys = [f"distill.lessons={taught}", "name=written"]
    written = python("trainer", *student, *keys, cwd=tmp_path)
    assert written.returncode == 0, written.stderr
    assert_same_run(tmp_path / "runs/beside", tmp_path / "runs/written")
    page = (Path(__file__).parents[2] / "docs/monitoring.md").read_text()
    for line in metrics(tmp_path / "runs/written"):
        mixed = 0.1 * line["cross_entropy"] + 0.9 * line["teacher_divergence"]
        assert line["loss"] == pytest.approx(mixed, rel=1e-5)
        documented = ("cross_entropy", "teacher_divergence", "teacher_seconds")
        assert all(key in line and f"| `{key}` |" in page for key in documented)
    # a run that is killed after its checkpoint of step 4 goes on to the same end
    shutil.copytree(tmp_path / "runs/written", gone)
    shutil.rmtree(gone / "checkpoints/step-00000008")
    (gone / "latest").write_text("step-00000004")
    resumed = python("trainer.resume", str(gone), cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert_same_run(tmp_path / "runs/written", gone)


def test_teaching_that_is_killed_goes_on_to_the_same_bytes_on_another_number_of_ranks(
    student, taught, tmp_path
):
    record = json.loads((taught / "teacher.json").read_text())
    assert record["rows_per_file"] == 64  # one file; here there shall be many
    small = tmp_path / "said"
    small.mkdir()
    (small / "teacher.json").write_text(json.dumps(record | {"rows_per_file": 3}))
    keys = ["trainer.teach", *student, "name=s", f"distill.lessons={small}"]
    process = subprocess.Popen([sys.executable, "-m", *keys], cwd=tmp_path, env=ENVIRONMENT)
    deadline = time.monotonic() + 90
    while not (found := list(small.glob("rows-*"))) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert found
    first = found[0].read_bytes()
    done = python(*keys, "parallel.nproc_per_node=1", "parallel.ep_size=1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    files = contents(small)
    assert len([name for name in files if name.startswith("rows-")]) == 22  # 64 rows in files of 3
    assert files[found[0].name] == first, "what was written stays"


def test_lessons_of_other_rows_or_settings_are_refused(student, taught, tmp_path):
    keys = ["trainer", *student, f"distill.lessons={taught}"]
    other_order = python(*keys, "name=a", "seed=5", cwd=tmp_path)
    assert other_order.returncode == 2
    assert "row 0 is not that of this run" in other_order.stdout + other_order.stderr
    longer = python(*keys, "name=d", "distill.temperature=2", "distill.top_k=9", cwd=tmp_path)
    assert longer.returncode == 2
    assert "was made with top_k=8, not 9; set the same" in longer.stderr
    assert "was made with temperature=1.0, not 2.0" in longer.stderr
    assert not (tmp_path / "runs/d").exists()


def test_teach_says_what_it_needs(student, corpus, tmp_path):
    nothing = python("trainer.teach", *SMALL, *corpus, "name=x", cwd=tmp_path)
    assert nothing.returncode == 2
    assert "distill=null: there is no teacher; give distill=teacher" in nothing.stderr
    nowhere = python("trainer.teach", *student, "name=x", cwd=tmp_path)
    assert nowhere.returncode == 2
    assert "distill.lessons=null: there is no folder; give" in nowhere.stderr
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("precious")
    full = python("trainer.teach", *student, "name=x", "distill.lessons=mine", cwd=tmp_path)
    assert full.returncode == 2
    assert "holds something else; name a new folder" in full.stderr
    assert (tmp_path / "mine/thesis.txt").read_text() == "precious"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_demo_student_beats_itself_alone(tmp_path):
    """Ten minutes on two cores: the teacher, the student with it, and the student alone."""
    once = ["output_dir=runs", "data.dir=data", "tracker.wandb=disabled"]
    assert python("data_pipeline", "experiment=demo", *once, cwd=tmp_path, timeout=600).returncode == 0
    losses = {}
    for name, keys in {
        "demo": ["experiment=demo"],
        "with": ["experiment=demo_distill", "name=with"],
        "alone": ["experiment=demo_distill", "name=alone", "distill.weight=0"],
    }.items():
        done = python("trainer", *keys, *once, cwd=tmp_path, timeout=1800)
        assert done.returncode == 0, done.stderr
        lines = map(json.loads, (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines())
        losses[name] = [line["loss/validation"] for line in lines if "loss/validation" in line][-1]
    assert losses["demo"] < losses["with"] < losses["alone"] - 0.2
