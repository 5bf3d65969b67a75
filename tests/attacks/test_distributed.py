import pytest
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from fastlip import attacks


@pytest.fixture
def one_process(tmp_path):
    if not distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_attacks_do_not_communicate(cnn_problem, one_process):
    """Processes take different numbers of steps, so that a collective in the forward pass would not be answered."""
    model, inputs, labels = cnn_problem
    wrapped = DistributedDataParallel(model)
    calls = []
    wrapped.register_forward_pre_hook(lambda module, args: calls.append(module))
    found = attacks.pgd(wrapped, inputs, labels, eps=0.05, random_start=False)
    assert torch.equal(found, attacks.pgd(model, inputs, labels, eps=0.05, random_start=False))
    assert not calls
    wrapped(inputs).sum().backward()
    assert calls
