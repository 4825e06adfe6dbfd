"""Random generators of a process."""

import torch

from asr_train import generators


def test_a_unit_is_seeded_as_torch_seeds():
    torch.manual_seed(5)
    expected = torch.rand(4), torch.randperm(9)
    generators.seed(5, torch.device("cpu"))
    assert torch.equal(torch.rand(4), expected[0])
    assert torch.equal(torch.randperm(9), expected[1])


def test_generators_go_back_to_where_they_were():
    saved = generators.current()
    expected = torch.rand(4)
    torch.rand(4)
    generators.set_current(saved)
    assert torch.equal(torch.rand(4), expected)
