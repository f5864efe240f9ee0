"""What is required is made ready once, first, and an error of looking ahead is not final."""

from __future__ import annotations

import threading
import time

import pytest

from megahybrid.data.fetching import Fetcher
from megahybrid.errors import UserError


def wait_for(condition):
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def test_an_error_of_looking_ahead_is_tried_again():
    tries = []

    def fetch(number):
        tries.append(number)
        if len(tries) in (1, 3):
            raise UserError(f"try {len(tries)}")

    fetcher = Fetcher(fetch, str, threads=1, seconds=10)
    fetcher.look_ahead([7])
    wait_for(lambda: 7 in fetcher._errors)
    fetcher.require(7)
    with pytest.raises(UserError, match="try 3"):
        fetcher.require(8)
    fetcher.require(8)
    fetcher.require(7)
    assert tries == [7, 7, 8, 8]
    fetcher.forget(7)
    fetcher.require(7)
    assert tries[-1] == 7
    fetcher.close()


def test_what_is_required_comes_before_what_lies_ahead():
    order, go = [], threading.Event()

    def fetch(number):
        order.append(number)
        go.wait(10)

    fetcher = Fetcher(fetch, str, threads=1, seconds=10)
    fetcher.look_ahead([1, 2, 3])
    wait_for(lambda: order == [1])
    needed = threading.Thread(target=fetcher.require, args=(9,))
    needed.start()
    wait_for(lambda: fetcher._required)
    go.set()
    needed.join(10)
    wait_for(lambda: len(order) == 4)
    assert order == [1, 9, 2, 3]
    fetcher.close()
    for thread in fetcher._threads:
        thread.join(10)
        assert not thread.is_alive()
