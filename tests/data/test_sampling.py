import random
from collections import Counter

import numpy as np
import pytest
import torch

from sparsemae.data.draws import stream
from sparsemae.data.sampling import BatchPlan, EvaluationSampler, TrainingSampler, seeding


def keys(plan: BatchPlan, rank: int, start: int, stop: int) -> list[list[tuple[int, int]]]:
    return list(TrainingSampler(plan, seed=3, rank=rank, start=start, stop=stop))


def test_an_epoch_holds_each_image_at_most_once_and_the_rest_differs() -> None:
    plan = BatchPlan.make(images=23, global_batch=5, device_batch=None, world=1)
    assert plan.steps_per_epoch == 4
    epochs = [[key for batch in keys(plan, 0, 4 * e, 4 * e + 4) for key in batch] for e in range(3)]
    for epoch, seen in enumerate(epochs):
        assert {e for e, _ in seen} == {epoch}
        assert max(Counter(index for _, index in seen).values()) == 1
    assert {i for _, i in epochs[0]} != {i for _, i in epochs[1]}


@pytest.mark.parametrize("start", [0, 1, 3, 4, 7])
def test_any_start_continues_the_same_sequence(start: int) -> None:
    plan = BatchPlan.make(17, 4, 2, 1)
    assert keys(plan, 0, 0, 9)[2 * start :] == keys(plan, 0, start, 9)


def test_micro_batches_are_the_same_on_any_number_of_processes() -> None:
    alone = keys(BatchPlan.make(40, 8, 2, 1), 0, 0, 6)
    for world in (2, 4):
        plan = BatchPlan.make(40, 8, 2, world)
        ranks = [keys(plan, rank, 0, 6) for rank in range(world)]
        together = [ranks[k % world][k // world] for k in range(len(alone))]
        assert together == alone


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((100, 10, None, 3), "global_batch: wanted a multiple of the 3 processes, got 10"),
        ((100, 12, 5, 2), r"wanted devices x device_batch x accumulation = 12, but 2 x 5"),
        ((7, 8, None, 1), "wanted at most the 7 training images, got 8"),
    ],
)
def test_batches_that_do_not_divide_are_refused_with_all_numbers(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BatchPlan.make(*arguments)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("images", [1, 7, 12])
def test_evaluation_takes_each_image_once(images: int, world: int) -> None:
    samplers = [EvaluationSampler(images, 4, rank, world) for rank in range(world)]
    seen = [index for sampler in samplers for batch in sampler for index in batch]
    assert sorted(seen) == list(range(images))
    assert [len(sampler) for sampler in samplers] == [len(list(sampler)) for sampler in samplers]


def draws() -> tuple:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_seeding_is_a_function_of_its_arguments_and_leaves_no_trace() -> None:
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = [draws(), draws()]
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    first = draws()
    with seeding(5, [(1, 2), (1, 3), (1, 2)]) as keys:
        inside, other, again = (draws() for _ in keys)
    assert [first, draws()] == expected
    assert inside == again
    assert all(a != b for a, b in zip(inside, other, strict=True))


def test_streams_differ_in_every_counter() -> None:
    values = {float(stream(*counters).random()) for counters in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)]}
    assert len(values) == 4
