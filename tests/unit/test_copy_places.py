from __future__ import annotations

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from v2v_async.copy.places import Places

pytestmark = pytest.mark.anyio


async def test_the_first_that_asks_is_the_first_that_gets() -> None:
    places = Places(4)
    order: list[str] = []

    async def use(name: str, count: int, until: anyio.Event) -> None:
        async with places.taken(count):
            order.append(name)
            await until.wait()

    async with anyio.create_task_group() as group:
        first, second = anyio.Event(), anyio.Event()
        for name, count, until in (
            ("three", 3, first),
            ("large", 4, second),
            ("small", 1, second),  # there is room for it, and it comes after
        ):
            group.start_soon(use, name, count, until)
            await anyio.wait_all_tasks_blocked()
        assert order == ["three"]
        first.set()
        await anyio.wait_all_tasks_blocked()
        assert order == ["three", "large"]
        assert places.taken_now == 4
        second.set()
    assert order == ["three", "large", "small"]
    assert places.taken_now == 0


async def test_more_than_there_is_means_all() -> None:
    places = Places(3)
    async with places.taken(8) as count:
        assert count == places.taken_now == 3
    async with places.taken(0) as count:
        assert count == 1


async def test_one_that_is_cancelled_while_it_waits_holds_up_nobody() -> None:
    places = Places(2)
    entered: list[int] = []

    async def use(count: int) -> None:
        async with places.taken(count):
            entered.append(count)

    async with anyio.create_task_group() as group, places.taken(1):
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as waiting:
                waiting.start_soon(use, 2)
                await anyio.wait_all_tasks_blocked()
                group.start_soon(use, 1)
                await anyio.wait_all_tasks_blocked()
                assert entered == []
                scope.cancel()
        await anyio.wait_all_tasks_blocked()
        assert entered == [1]
    assert places.taken_now == 0


async def test_one_that_is_cancelled_as_its_turn_comes_gives_it_back() -> None:
    places = Places(1)
    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as group:

            async def use() -> None:
                async with places.taken(1):
                    await anyio.sleep_forever()

            async with places.taken(1):
                group.start_soon(use)
                await anyio.wait_all_tasks_blocked()
            # It has its turn and has not run yet.
            assert places.taken_now == 1
            scope.cancel()
    assert places.taken_now == 0


@settings(deadline=None, max_examples=60)
@given(
    total=st.integers(1, 6),
    wanted=st.lists(st.tuples(st.integers(1, 8), st.integers(0, 3)), max_size=20),
    cancelled=st.sets(st.integers(0, 19)),
)
def test_never_more_than_there_are_and_all_come_to_their_turn(
    total: int, wanted: list[tuple[int, int]], cancelled: set[int]
) -> None:
    places = Places(total)
    taken = [0]
    turns: list[int] = []

    async def use(at: int, count: int, steps: int, scope: anyio.CancelScope) -> None:
        with scope:
            async with places.taken(count) as got:
                turns.append(at)
                taken[0] += got
                try:
                    assert taken[0] <= total
                    for _ in range(steps):
                        await anyio.lowlevel.checkpoint()
                finally:
                    taken[0] -= got

    async def run() -> None:
        scopes = [anyio.CancelScope() for _ in wanted]
        async with anyio.create_task_group() as group:
            for at, (count, steps) in enumerate(wanted):
                group.start_soon(use, at, count, steps, scopes[at])
            await anyio.lowlevel.checkpoint()
            for at in cancelled & set(range(len(wanted))):
                scopes[at].cancel()
        assert places.taken_now == 0

    anyio.run(run)
    assert turns == sorted(turns)
    assert set(range(len(wanted))) - cancelled <= set(turns)
