"""One thread computes; what waits for it is in order, and its errors reach who asked."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from peer.serving.executor import DECODE, PREFILL, Executor


@pytest.fixture
async def executor() -> AsyncIterator[Executor]:
    async with Executor() as executor:
        yield executor


@asynccontextmanager
async def occupied(executor: Executor) -> AsyncIterator[None]:
    """While this lasts, the thread is busy with a job."""
    begun, release = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def hold() -> None:
        loop.call_soon_threadsafe(begun.set)
        assert release.wait(10)

    job = asyncio.create_task(executor.run(DECODE, hold))
    await asyncio.wait_for(begun.wait(), 10)
    try:
        yield
    finally:
        release.set()
        await job


async def queued(executor: Executor, priority: int, function: Callable[[], object]) -> asyncio.Task[object]:
    """A call that waits for the thread."""
    before = executor.waiting
    task = asyncio.create_task(executor.run(priority, function))
    while executor.waiting == before:  # noqa: ASYNC110 - the task puts it there when it first runs
        await asyncio.sleep(0)
    return task


async def test_a_call_gives_its_result_from_another_thread(executor: Executor) -> None:
    assert await executor.run(DECODE, divmod, 17, 5) == (3, 2)
    assert await executor.run(DECODE, threading.current_thread) is not threading.current_thread()


async def test_all_calls_run_in_the_same_thread(executor: Executor) -> None:
    threads = await asyncio.gather(
        *(executor.run(priority, threading.get_ident) for priority in (PREFILL, DECODE) * 5)
    )
    assert len(set(threads)) == 1


async def test_decode_goes_before_prefill_and_equals_keep_their_order(executor: Executor) -> None:
    order: list[str] = []
    async with occupied(executor):
        tasks = [
            await queued(executor, priority, lambda name=name: order.append(name))  # type: ignore[misc]
            for priority, name in [(PREFILL, "p1"), (DECODE, "d1"), (PREFILL, "p2"), (DECODE, "d2")]
        ]
        assert order == []
    await asyncio.gather(*tasks)
    assert order == ["d1", "d2", "p1", "p2"]


async def test_an_error_reaches_who_asked_and_the_thread_goes_on(executor: Executor) -> None:
    with pytest.raises(ZeroDivisionError):
        await executor.run(DECODE, divmod, 1, 0)
    assert await executor.run(DECODE, max, 3, 4) == 4


async def test_a_call_cancelled_before_it_begins_never_runs(executor: Executor) -> None:
    ran: list[str] = []
    async with occupied(executor):
        dropped = await queued(executor, DECODE, lambda: ran.append("dropped"))
        kept = await queued(executor, DECODE, lambda: ran.append("kept"))
        dropped.cancel()
        with pytest.raises(asyncio.CancelledError):
            await dropped
    await kept
    assert ran == ["kept"]


@pytest.mark.parametrize("ending", ["well", "badly"])
async def test_a_call_cancelled_after_it_began_runs_to_its_end_unheard(
    executor: Executor, ending: str
) -> None:
    begun, release = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()
    ended: list[str] = []

    def work() -> None:
        loop.call_soon_threadsafe(begun.set)
        assert release.wait(10)
        ended.append(ending)
        if ending == "badly":
            raise ValueError(ending)

    task = asyncio.create_task(executor.run(DECODE, work))
    await asyncio.wait_for(begun.wait(), 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    release.set()

    assert await executor.run(DECODE, len, "next") == 4
    assert ended == [ending]


async def test_leaving_stops_the_thread() -> None:
    async with Executor() as executor:
        thread = await executor.run(DECODE, threading.current_thread)
        assert thread.is_alive()
    assert not thread.is_alive()


async def test_leaving_waits_for_the_call_that_runs() -> None:
    ended: list[bool] = []
    release = threading.Event()
    async with Executor() as executor:
        begun = asyncio.Event()
        loop = asyncio.get_running_loop()

        def work() -> None:
            loop.call_soon_threadsafe(begun.set)
            assert release.wait(10)
            ended.append(True)

        task = asyncio.create_task(executor.run(PREFILL, work))
        await asyncio.wait_for(begun.wait(), 10)
        loop.call_soon(release.set)
    assert ended == [True]
    await task
