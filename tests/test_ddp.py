"""What DDP does with gradients: where they lie, and how they travel, in fp32 or rounded to bf16."""

import pytest
import tiny
import torch
from ranks import run_ranks
from test_runs import NOTHING_EVALUATED, assert_close, losses, recipe, run_on  # noqa: F401  recipe is a fixture
from test_strategies import train_fsdp2

from asr_train import strategy
from asr_train.data.batch import input_values
from asr_train.optim import build_optimizer
from asr_train.train import train

LENGTHS = ([16_000, 12_000], [9_000, 20_000])  # of each rank's unit


def gradients(*, bf16_gradients):
    """This rank's gradients before and after they were summed, and what DDP is."""
    asked = tiny.recipe(bf16_gradients=bf16_gradients, model={"layerdrop": 0.5}, spec_augment={"time_prob": 0.0})
    accelerator = strategy.make_accelerator(asked, "unused")
    model = tiny.model(config=tiny.no_dropout())
    parallel = strategy.prepare(accelerator, model, build_optimizer(model, asked.optim), asked)
    batch = tiny.batch_of(LENGTHS[parallel.rank], model.batch_settings)

    def backward(is_last):
        with parallel.unit(is_last=is_last):
            logits = parallel.model(input_values(batch), batch.num_samples)
            parallel.backward(logits.square().sum())
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}

    alone = backward(is_last=False)
    parallel.stepper.zero_grad()
    summed = backward(is_last=True)
    places = {
        parameter.grad.untyped_storage().data_ptr() for parameter in model.parameters() if parameter.requires_grad
    }
    return alone, summed, len(places), parallel.model.find_unused_parameters


@pytest.fixture(scope="module")
def both():
    return {kind: run_ranks(2, lambda kind=kind: gradients(bf16_gradients=kind)) for kind in (False, True)}


def test_gradients_are_summed_in_few_buckets_without_a_search_for_unused_parameters(both):
    (first, summed, num_places, searches), (second, summed_there, *_) = both[False]
    assert not searches
    assert num_places < len(summed) / 4  # they lie in DDP's buckets, not beside them
    for name, total in summed.items():
        torch.testing.assert_close(total, first[name] + second[name], rtol=1e-5, atol=1e-6)
        assert torch.equal(total, summed_there[name])


def test_bf16_gradients_are_the_sum_of_rounded_ones(both):
    (first, summed, *_), (second, summed_there, *_) = both[True]
    for name, total in summed.items():
        assert total.dtype == torch.float32
        expected = first[name].bfloat16() + second[name].bfloat16()
        assert torch.equal(total, expected.float()), name
        assert torch.equal(total, summed_there[name])
    exact = both[False][0][1]
    assert any(not torch.equal(total, exact[name]) for name, total in summed.items())


@pytest.mark.parametrize("program", [train, train_fsdp2], ids=["ddp", "fsdp2"])
def test_a_run_with_bf16_gradients_differs_from_the_other_by_their_rounding(recipe, program):  # noqa: F811
    changes = {**NOTHING_EVALUATED, "max_steps": 8}
    plain = losses(run_on(2, recipe("plain", changes), program))
    rounded = losses(run_on(2, recipe("rounded", {**changes, "bf16_gradients": True}), program))
    assert rounded[1] == plain[1]  # nothing has been updated yet
    assert rounded[8] != plain[8]  # to the bit, as a run with nothing changed is
    assert_close(rounded, plain, relative=1e-3)
