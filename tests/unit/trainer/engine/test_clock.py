"""The parts of a step add up to its time; a step that is not logged is not measured."""

import time
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch

from trainer.engine.clock import StepClock


def test_parts_leave_out_the_parts_inside_them_and_add_up():
    clock = StepClock(torch.device("cpu"))
    clock.measuring = True
    with clock.wait("data"):
        time.sleep(0.02)
    with clock.part("backward"):
        time.sleep(0.03)
        clock.timed("communication", time.sleep)(0.05)
        with clock.part("communication"):
            time.sleep(0.01)
    with clock.part("optimizer"):
        time.sleep(0.02)
    elapsed, waits, parts = clock.lap()
    assert waits["data"] >= 0.02
    assert parts["communication"] >= 0.06
    assert parts["backward"] >= 0.03
    assert sum(parts.values()) + sum(waits.values()) == pytest.approx(elapsed, abs=0.01)
    assert parts["backward"] < elapsed - parts["communication"]


def test_a_step_that_is_not_logged_is_not_measured_but_its_waits_count():
    clock = StepClock(torch.device("cpu"))
    with clock.part("forward"), clock.wait("data"):
        time.sleep(0.01)
    elapsed, waits, parts = clock.lap()
    assert parts == {}
    assert elapsed >= waits["data"] >= 0.01
    assert clock.lap()[1] == {}, "each lap starts from zero"


def test_waiting_for_an_asynchronous_collective_is_part_of_it():
    clock = StepClock(torch.device("cpu"))
    clock.measuring = True
    begin = clock.timed("communication", lambda: Work(ThreadPoolExecutor(1).submit(time.sleep, 0.05)))
    with clock.part("forward"):
        work = begin()
        time.sleep(0.02)
        assert work.is_completed() is False
        work.wait()
    _, _, parts = clock.lap()
    assert parts["communication"] == pytest.approx(0.03, abs=0.01)
    assert parts["forward"] == pytest.approx(0.02, abs=0.01)


class Work:
    """Like torch's handle of an asynchronous collective."""

    def __init__(self, future: Future[None]) -> None:
        self._future = future

    def wait(self) -> None:
        self._future.result()

    def is_completed(self) -> bool:
        return self._future.done()
