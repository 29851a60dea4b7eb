"""The history of requests, on the host and without vLLM: what is read when, and what a reused slot does not mix."""

import numpy as np
import pytest
import torch

from unsloth_ext.hrpo.vllm.slots import LAG, PAGE, History


def history(slots=2):
    return History(slots, {"value": (1, torch.float32)})


def record(made, slot, index, value):
    made.record(np.array([slot]), np.array([index]), {"value": torch.tensor([[float(value)]])})


def values(past):
    return past["value"][:, 0].tolist()


def test_a_request_reads_what_was_recorded_of_it():
    made = history()
    for index in range(PAGE + 36):  # longer than a page
        record(made, 1, index, index)
        record(made, 0, index, -index)
    assert values(made.read(1)) == list(range(PAGE + 36))
    assert values(made.read(0, 2, 5)) == [-2, -3, -4]


def test_nothing_is_kept_of_a_prompt_that_is_not_complete():
    made = history()
    record(made, 0, -1, 7)
    record(made, 0, 0, 8)
    assert values(made.read(0)) == [8]


@pytest.mark.parametrize("steps", [0, 1, LAG, LAG + 3])
def test_a_slot_that_is_read_later_is_read_before_it_is_used_again(steps):
    made = history()
    for index in range(4):
        record(made, 0, index, index)
    past = made.empty_later(0, wanted=True)
    assert not past  # nothing waited for the last steps
    made.length[0] = 0
    for index in range(steps):
        record(made, 0, index, 100 + index)
    made.flush()
    assert values(past) == [0, 1, 2, 3]
    assert values(made.read(0)) == [100 + index for index in range(steps)]


def test_a_preempted_request_goes_on_in_another_slot():
    made = history()
    for index in range(5):
        record(made, 0, index, index)
    past = made.read(0)
    record(made, 1, 0, 50)
    made.restore(1, past, 3)  # the last two are decoded again
    record(made, 1, 3, 33)
    assert values(made.read(1)) == [0, 1, 2, 33]
    assert values(made.read(0)) == [0, 1, 2, 3, 4]


def test_memory_is_that_of_the_tokens_of_running_requests():
    slots, length = 50, 3 * PAGE + 1
    made = history(slots)
    for request in range(200):  # one after the other, each in another slot
        slot = request % slots
        for index in range(length):
            record(made, slot, index, request * index)
        past = made.empty_later(slot, wanted=request % 2 == 0)
        made.length[slot] = 0
        made.flush()
        assert values(past) == [request * index for index in range(length)] if request % 2 == 0 else not past
    assert len(made._data["value"]) <= 2 * 4  # pages of one request, and as many for growth


def test_running_requests_do_not_share_pages():
    made = history(4)
    for index in range(2 * PAGE + 5):
        for slot in range(4):
            record(made, slot, index, 1000 * slot + index)
        if index == PAGE:  # slot 2 ends in the middle, and another request takes its place
            made.empty_later(2, wanted=False)
    assert values(made.read(2, PAGE + 1)) == [2000 + index for index in range(PAGE + 1, 2 * PAGE + 5)]
    for slot in (0, 1, 3):
        assert values(made.read(slot)) == [1000 * slot + index for index in range(2 * PAGE + 5)]
