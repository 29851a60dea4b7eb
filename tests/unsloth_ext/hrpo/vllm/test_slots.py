"""The history of requests, on the host and without vLLM: what is read when, and what a reused slot does not mix."""

import numpy as np
import pytest
import torch

from unsloth_ext.hrpo.vllm.slots import LAG, History


def history(slots=2):
    return History(slots, {"value": (1, torch.float32)})


def record(made, slot, index, value):
    made.record(np.array([slot]), np.array([index]), {"value": torch.tensor([[float(value)]])})


def values(past):
    return past["value"][:, 0].tolist()


def test_a_request_reads_what_was_recorded_of_it():
    made = history()
    for index in range(100):  # longer than the first buffer
        record(made, 1, index, index)
        record(made, 0, index, -index)
    assert values(made.read(1)) == list(range(100))
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
    past = made.read_later(0)
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
