"""Frozen weights stay zero whoever built the layer, and wherever it goes."""

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from nets import PATTERN, is_plus_zero, sparse_layer, sparse_mlp, train
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel

from sparsemae.sparsity import freeze, hold_masks, iter_sparse, nm_mask, sparsify

pytestmark = pytest.mark.holds("right.1")


def loaded(model: nn.Module) -> nn.Module:
    other = sparse_mlp(seed=1)
    other.load_state_dict(model.state_dict())
    return other


def assigned(model: nn.Module) -> nn.Module:
    other = sparse_mlp(seed=1)
    other.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    return other


def saved_whole(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


BUILDERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "freezing": lambda model: model,
    "loading": loaded,
    "loading, assigned": assigned,
    "deepcopy": copy.deepcopy,
    "pickling": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved_whole,
    "to another dtype and back": lambda model: copy.deepcopy(model).float().double(),
    "a copy of what was loaded": lambda model: copy.deepcopy(loaded(model)),
}


def frozen_with_momentum() -> tuple[nn.Module, dict]:
    """A frozen model, and the state of an optimizer that would move its zeros."""
    model = sparse_mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.3)
    train(model, optimizer, 5)
    freeze(model)
    return model, optimizer.state_dict()


def assert_zeros(model: nn.Module) -> None:
    layers = list(iter_sparse(model))
    assert layers
    for _, layer in layers:
        assert is_plus_zero(layer.weight[~layer.weight_mask])
        assert (layer.weight[layer.weight_mask] != 0).all()


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "compiled"])
@pytest.mark.parametrize("builder", BUILDERS)
def test_item_14_zeros_stay_whoever_built_the_model(builder: str, compiled: bool) -> None:
    frozen, moments = frozen_with_momentum()
    model = BUILDERS[builder](frozen)
    forward = torch.compile(model, backend="aot_eager") if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.3)
    optimizer.load_state_dict(copy.deepcopy(moments))
    before = model[0].weight.detach().clone()
    train(forward, optimizer, 2)
    assert_zeros(model)
    assert not torch.equal(model[0].weight, before)


def test_item_14_a_step_without_a_forward_keeps_the_zeros() -> None:
    frozen, moments = frozen_with_momentum()
    twin = copy.deepcopy(frozen)
    optimizer = torch.optim.AdamW(twin.parameters(), lr=0.05)
    optimizer.load_state_dict(moments)
    for parameter in twin.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert_zeros(twin)


def test_item_14_freezing_again_repairs() -> None:
    model = sparse_mlp()
    freeze(model)
    wanted = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        model[0].weight += torch.where(model[0].weight_mask, 0.0, 0.5)
    assert freeze(model) == ["0", "2"]
    for key, value in model.state_dict().items():
        assert torch.equal(value, wanted[key])
    assert_zeros(model)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_item_14_a_frozen_mask_follows_a_move_to_another_device(compiled: bool) -> None:
    """Fake CUDA tensors refuse, like real ones, to be computed with tensors that stayed on the CPU."""
    model = sparse_mlp(torch.float32)
    freeze(model)
    with FakeTensorMode() as mode:
        twin = model._apply(lambda tensor: mode.from_tensor(tensor).to("cuda"))  # what `cuda` does
        assert twin[0].weight_mask.device.type == "cuda"
        optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9, foreach=False)
        forward = torch.compile(twin, backend="eager") if compiled else twin
        for _ in range(2):
            with torch.no_grad():  # a backward pass would want a real device
                assert forward(torch.randn(8, 16, device="cuda")).device.type == "cuda"
            for parameter in twin.parameters():
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
        assert {parameter.device.type for parameter in twin.parameters()} == {"cuda"}
    with pytest.raises(RuntimeError, match=r"device"), FakeTensorMode():
        torch.where(torch.ones(2, dtype=torch.bool), torch.ones(2, device="cuda"), 0.0)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_item_14_a_frozen_mask_is_no_buffer_of_ddp() -> None:
    model = sparse_mlp()
    freeze(model)
    assert not list(model.buffers())
    wrapped = DistributedDataParallel(model)
    assert not wrapped.modules_buffers
    train(wrapped, torch.optim.AdamW(wrapped.parameters(), lr=0.05), 2)
    assert_zeros(model)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("frozen_before", [False, True])
def test_items_14_and_15_fsdp2(frozen_before: bool) -> None:
    """Sharded on one process, frozen before or after: the weights and masks of the plain model, and zeros that stay."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    plain, model = sparse_mlp(), sparse_mlp()
    if frozen_before:
        freeze(model)
    mesh = init_device_mesh("cpu", (1,))
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.3)
    twin = torch.optim.AdamW(plain.parameters(), lr=0.05, weight_decay=0.3)
    if frozen_before:
        freeze(plain)
    else:
        with hold_masks(model):
            train(model, optimizer, 2)
        with hold_masks(plain):
            train(plain, twin, 2)
        assert freeze(model) == freeze(plain)
    train(model, optimizer, 2)
    train(plain, twin, 2)
    for index in (0, 2):
        weight = model[index].weight.full_tensor()
        assert torch.equal(model[index].weight_mask, plain[index].weight_mask)
        assert is_plus_zero(weight[~model[index].weight_mask])
        torch.testing.assert_close(weight, plain[index].weight)


@pytest.mark.parametrize("frozen", [False, True])
def test_item_15_torch_func(frozen: bool) -> None:
    """`torch.func.grad`, and with `vmap` the gradients of each sample."""
    layer = sparse_layer()
    if frozen:
        freeze(layer)
    parameters = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    x = torch.randn(5, 16, dtype=torch.float64)

    def loss(parameters: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    layer(x).square().sum().backward()
    grads = torch.func.grad(loss)(parameters, x)
    torch.testing.assert_close(grads["weight"], layer.weight.grad)
    torch.testing.assert_close(grads["bias"], layer.bias.grad)
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    torch.testing.assert_close(each["weight"].sum(dim=0), layer.weight.grad)
    assert torch.equal(layer.current_mask(), layer.weight_mask if frozen else nm_mask(layer.weight, PATTERN))


@pytest.mark.usefixtures("process_group")
def test_item_15_a_layer_that_fsdp_has_made_its_own_is_refused() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(nn.Linear(16, 8))
    fully_shard(model[0], mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(ValueError, match=r"^0: wanted a plain nn\.Linear, got a \S*FSDPLinear, "):
        sparsify(model, "2:8", include=["0"])
