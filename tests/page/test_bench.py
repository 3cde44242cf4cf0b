"""What `bench.page` reads out of a trace."""

from __future__ import annotations

from typing import Any

from bench.page import BEGINS, ENDS, FRAME, figures


def event(name: str, at_ms: float, lasts_ms: float = 0.0, thread: int = 1) -> dict[str, Any]:
    return {"name": name, "ph": "X", "pid": 1, "tid": thread, "ts": at_ms * 1000, "dur": lasts_ms * 1000}


def test_frames_and_tasks_of_the_pages_own_thread_count_between_the_marks() -> None:
    frames = [event(FRAME, at) for at in range(-100, 1100, 20)]
    tasks = [event("RunTask", at, 5) for at in range(-100, 1100, 20)]
    others = [event("RunTask", at, 9, thread=2) for at in range(0, 1000, 10)]

    found = figures([event(BEGINS, 0), *frames, *tasks, *others, event(ENDS, 1000)])

    assert found == {"fps": 50.0, "frame_ms_p95": 20.0, "main_thread_busy": 0.25}


def test_a_task_inside_a_task_counts_once() -> None:
    tasks = [event("RunTask", 10, 100), event("RunTask", 20, 50), event("RunTask", 200, 100)]
    frames = [event(FRAME, at) for at in (0, 500, 999)]

    found = figures([event(BEGINS, 0), *tasks, *frames, event(ENDS, 1000)])

    assert found["main_thread_busy"] == 0.2
