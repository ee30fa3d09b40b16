"""The length of a mask's schedule."""

import pytest
from torch import nn

from sparsemae.data.sampling import BatchPlan
from sparsemae.options.model import SparseConfig
from sparsemae.options.training import TrainerConfig
from sparsemae.sparsity import iter_sparse, sparsify
from sparsemae.tasks.sparse import mask_schedule


@pytest.mark.parametrize("length", [TrainerConfig(epochs=4.0), TrainerConfig(steps=8)], ids=["epochs", "steps"])
def test_a_gradual_schedule_reaches_the_pattern_in_the_middle_of_the_training(length: TrainerConfig) -> None:
    model = nn.Sequential(nn.Linear(32, 2))
    sparsify(model, "2:32", include=["0"])
    plan = BatchPlan.make(images=20, global_batch=10, device_batch=None, world=1)
    masks = mask_schedule(model, SparseConfig(schedule="gradual"), length, plan)
    patterns = []
    for epoch in (0.0, 1.75, 2.0):
        with masks.step(epoch):
            patterns += [str(layer.pattern) for _, layer in iter_sparse(model)]
    assert patterns == ["32:32", "4:32", "2:32"]
