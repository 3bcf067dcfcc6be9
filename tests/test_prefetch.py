"""Prefetching: order and number of items, errors, and clean-up."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from pipelines import PATIENCE_S

from pipeline.data.prefetch import prefetch, prefetch_in_thread

PREFETCHERS = [prefetch, prefetch_in_thread]


def count_to_ten(drawn: list[int], reached: threading.Event, target: int):
    """Yield 0, 1, ...; set `reached` when `target` is drawn."""
    for number in range(10):
        drawn.append(number)
        if number == target:
            reached.set()
        yield number


@pytest.mark.parametrize("draw", PREFETCHERS)
@pytest.mark.parametrize("buffer_size", [0, 1, 3, 10, 20])
def test_items_keep_their_order(draw, buffer_size):
    assert list(draw(range(10), buffer_size)) == list(range(10))
    assert list(draw([], buffer_size)) == []


@pytest.mark.parametrize("draw", PREFETCHERS)
@pytest.mark.parametrize("buffer_size", [0, 1, 3])
def test_as_many_are_drawn_ahead_as_are_asked_for_and_no_more(draw, buffer_size):
    drawn: list[int] = []
    reached = threading.Event()
    threads = set(threading.enumerate())
    items = draw(count_to_ten(drawn, reached, 2 + buffer_size), buffer_size)
    assert [next(items) for _ in range(3)] == [0, 1, 2]
    assert reached.wait(PATIENCE_S)
    for thread in set(threading.enumerate()) - threads:
        thread.join(0.1)  # time to draw more
    assert drawn == list(range(3 + buffer_size))
    items.close()
    assert set(threading.enumerate()) <= threads
    assert drawn == list(range(3 + buffer_size))


def test_what_is_not_begun_when_the_consumer_ends_is_not_drawn(monkeypatch):
    drawn, ended = [], threading.Event()

    class Pool(ThreadPoolExecutor):
        def shutdown(self, wait=True, *, cancel_futures=False):
            super().shutdown(wait=False, cancel_futures=cancel_futures)
            ended.set()
            super().shutdown(wait)

    def slow():
        for number in range(10):
            drawn.append(number)
            assert number == 0 or ended.wait(PATIENCE_S)
            yield number

    monkeypatch.setattr("pipeline.data.prefetch.ThreadPoolExecutor", Pool)
    items = prefetch_in_thread(slow(), 3)
    assert next(items) == 0
    items.close()
    assert drawn in ([0], [0, 1])


def test_an_error_in_the_thread_is_raised_after_the_items_before_it():
    def broken():
        yield from (0, 1)
        raise ValueError("the third")

    threads = set(threading.enumerate())
    items = prefetch_in_thread(broken(), 3)
    assert [next(items), next(items)] == [0, 1]
    with pytest.raises(ValueError, match="the third"):
        next(items)
    assert set(threading.enumerate()) <= threads


def test_items_are_drawn_in_another_thread_or_in_this_one():
    def here():
        yield threading.get_ident()

    assert list(prefetch(here(), 1)) == [threading.get_ident()]
    assert list(prefetch_in_thread(here(), 1)) != [threading.get_ident()]
