"""One thread computes; what waits for it is in order, and its errors reach who asked."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from peer.serving.executor import Executor


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

    job = asyncio.create_task(executor.run(hold))
    await asyncio.wait_for(begun.wait(), 10)
    try:
        yield
    finally:
        release.set()
        await job


async def queued(executor: Executor, function: Callable[[], object]) -> asyncio.Task[object]:
    """A call that waits for the thread."""
    before = executor.waiting
    task = asyncio.create_task(executor.run(function))
    while executor.waiting == before:  # noqa: ASYNC110 - the task puts it there when it first runs
        await asyncio.sleep(0)
    return task


async def test_a_call_gives_its_result_from_another_thread(executor: Executor) -> None:
    assert await executor.run(divmod, 17, 5) == (3, 2)
    assert await executor.run(threading.current_thread) is not threading.current_thread()


async def test_all_calls_run_in_the_same_thread(executor: Executor) -> None:
    threads = await asyncio.gather(*(executor.run(threading.get_ident) for _ in range(10)))
    assert len(set(threads)) == 1


async def test_calls_run_in_the_order_in_which_they_were_made(executor: Executor) -> None:
    order: list[str] = []
    async with occupied(executor):
        tasks = [
            await queued(executor, lambda name=name: order.append(name))  # type: ignore[misc]
            for name in "abcd"
        ]
        assert order == []
    await asyncio.gather(*tasks)
    assert order == [*"abcd"]


async def test_an_error_reaches_who_asked_and_the_thread_goes_on(executor: Executor) -> None:
    with pytest.raises(ZeroDivisionError):
        await executor.run(divmod, 1, 0)
    assert await executor.run(max, 3, 4) == 4


async def test_a_call_cancelled_before_it_begins_never_runs(executor: Executor) -> None:
    ran: list[str] = []
    async with occupied(executor):
        dropped = await queued(executor, lambda: ran.append("dropped"))
        kept = await queued(executor, lambda: ran.append("kept"))
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

    task = asyncio.create_task(executor.run(work))
    await asyncio.wait_for(begun.wait(), 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    release.set()

    assert await executor.run(len, "next") == 4
    assert ended == [ending]


async def test_leaving_stops_the_thread() -> None:
    async with Executor() as executor:
        thread = await executor.run(threading.current_thread)
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

        task = asyncio.create_task(executor.run(work))
        await asyncio.wait_for(begun.wait(), 10)
        loop.call_soon(release.set)
    assert ended == [True]
    await task
