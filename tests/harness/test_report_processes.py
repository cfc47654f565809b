import math
import os

import pytest

from harness.report.processes import map_in_processes


def test_results_come_in_the_order_of_the_items_whatever_the_number_of_processes():
    items = list(range(7))
    for processes in (1, 2, 3, 7):
        assert map_in_processes(math.factorial, items, processes) == [math.factorial(item) for item in items]


def test_an_exception_of_a_call_is_raised_here():
    with pytest.raises(ValueError, match="negative"):
        map_in_processes(math.factorial, [3, -1, 2], 2)


def test_a_process_that_dies_is_an_error_and_no_hang():
    with pytest.raises(RuntimeError, match="exit code 3"):
        map_in_processes(os._exit, [3, 3], 2)


def test_what_a_call_prints_does_not_get_between(capfd):
    assert map_in_processes(print, ["a", "b"], 2) == [None, None]
    assert capfd.readouterr().out == ""
