from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from v2v_async.copy.shares import Budget, divide

DISKS = st.lists(st.tuples(st.integers(0, 10**13), st.integers(1, 20)), min_size=1, max_size=20)


@given(total=st.integers(1, 64), disks=DISKS)
def test_nobody_goes_without_and_nobody_gets_more_than_it_can_use(
    total: int, disks: list[tuple[int, int]]
) -> None:
    remaining, most = [left for left, _ in disks], [limit for _, limit in disks]
    shares = divide(total, remaining, most)
    assert len(shares) == len(disks)
    assert all(1 <= share <= limit for share, limit in zip(shares, most, strict=True))
    # With fewer connections than disks each still has one; the engine then runs fewer disks.
    assert sum(shares) == max(len(disks), min(total, sum(most)))


@given(total=st.integers(1, 64), disks=DISKS)
def test_no_connection_would_do_more_elsewhere(total: int, disks: list[tuple[int, int]]) -> None:
    """The longest wait can't be shortened by taking a connection from another disk."""
    remaining, most = [left for left, _ in disks], [limit for _, limit in disks]
    shares = divide(total, remaining, most)
    waits = [left / share for left, share in zip(remaining, shares, strict=True)]
    slowest = max(range(len(disks)), key=lambda at: waits[at])
    if shares[slowest] == most[slowest]:
        return
    for at, share in enumerate(shares):
        if at != slowest and share > 1:
            assert remaining[at] / (share - 1) >= waits[slowest]


@pytest.mark.parametrize(
    ("total", "remaining", "most", "wanted"),
    [
        (8, [100, 100], [8, 8], [4, 4]),
        (8, [300, 100], [8, 8], [6, 2]),
        (8, [2048, 256, 256, 256], [8, 8, 8, 8], [5, 1, 1, 1]),
        (8, [100, 100], [1, 8], [1, 7]),
        (8, [100, 100], [2, 3], [2, 3]),
        (9, [100, 100], [8, 8], [5, 4]),
        (2, [1, 1, 1], [8, 8, 8], [1, 1, 1]),
        (8, [0, 100], [8, 8], [1, 7]),
        (4, [], [], []),
    ],
)
def test_shares_follow_what_is_left(
    total: int, remaining: list[int], most: list[int], wanted: list[int]
) -> None:
    assert divide(total, remaining, most) == wanted


def test_a_budget_says_no_when_it_is_empty() -> None:
    budget = Budget(100)
    assert budget.take(60)
    assert not budget.take(41)
    assert budget.taken == 60
    assert budget.take(40)
    budget.give_back(60)
    assert budget.take(60)
    assert budget.most_taken == budget.taken == 100


def test_a_first_buffer_is_had_even_so() -> None:
    budget = Budget(100)
    assert budget.take(130)
    assert not budget.take(1)
    budget.give_back(130)
    assert budget.taken == 0
    assert budget.most_taken == 130


def test_parts_count_in_the_whole_and_hold_up_nobody_else() -> None:
    whole = Budget(100)
    one, other = whole.part(50), whole.part(50)
    assert one.take(50)
    assert not one.take(1)
    assert other.take(20)
    assert (whole.taken, one.taken, other.taken) == (70, 50, 20)
    one.give_back(50)
    assert (whole.taken, one.taken) == (20, 0)
    assert not other.take(31)
    other.give_back(20)
    assert (whole.taken, whole.most_taken) == (0, 70)


@given(
    parts=st.lists(st.integers(10, 50), min_size=1, max_size=6),
    asks=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 10), st.booleans()), max_size=80),
)
def test_all_parts_together_keep_to_the_whole(
    parts: list[int], asks: list[tuple[int, int, bool]]
) -> None:
    whole = Budget(sum(parts))
    made = [whole.part(limit) for limit in parts]
    held: list[tuple[Budget, int]] = []
    for at, length, is_taking in asks:
        part = made[at % len(made)]
        if is_taking and part.take(length):
            held.append((part, length))
        elif held:
            giving, length = held.pop(0)
            giving.give_back(length)
        assert whole.taken == sum(length for _, length in held)
    assert whole.most_taken <= whole.limit


@given(st.lists(st.integers(1, 40), max_size=60))
def test_a_budget_is_never_exceeded(lengths: list[int]) -> None:
    budget = Budget(100)
    held: list[int] = []
    for length in lengths:
        had = budget.taken
        if budget.take(length):
            held.append(length)
        else:
            assert had + length > 100
            while held:
                budget.give_back(held.pop())
        assert budget.taken == sum(held) <= budget.most_taken <= 100


def test_threads_never_take_more_than_there_is() -> None:
    budget = Budget(10)
    seen: list[int] = []

    def work() -> None:
        for _ in range(2000):
            if budget.take(3):
                seen.append(budget.taken)
                budget.give_back(3)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert budget.taken == 0
    assert 3 <= max(seen) <= 9
    assert budget.most_taken <= 9
