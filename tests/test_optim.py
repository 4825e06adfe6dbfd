"""Schedules against their sources, groups of parameters, and Adam's counters around the thaw."""

import copy
import io
import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.distributed as dist
from accelerate.utils import DistributedType
from ranks import run_ranks
from tiny import model
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from asr_train.config import OptimSettings
from asr_train.optim import (
    apply_schedule,
    build_optimizer,
    create_optimizer_state,
    learning_rate,
    may_fuse,
    parameter_groups,
)

torch.set_num_threads(1)

SETTINGS = OptimSettings(lr=1e-3, weight_decay=0.1, schedule="constant")


# --- schedules ---


def of_transformers(schedule, **arguments):
    """Learning rates of each update under transformers' scheduler, from a peak of 1e-3."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-3)
    scheduler = schedule(optimizer, **arguments)
    rates = []
    for _ in range(20):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("warmup", [0, 1, 6, 20])
@pytest.mark.parametrize(
    ("name", "schedule"),
    [
        ("linear", get_linear_schedule_with_warmup),
        ("cosine", get_cosine_schedule_with_warmup),
        ("constant", get_constant_schedule_with_warmup),
    ],
)
def test_schedules_are_those_of_transformers(name, schedule, warmup):
    arguments = {"num_warmup_steps": warmup} | ({} if name == "constant" else {"num_training_steps": 20})
    settings = replace(SETTINGS, schedule=name, warmup_steps=warmup)
    found = [learning_rate(settings, step, 20) for step in range(20)]
    assert found == pytest.approx(of_transformers(schedule, **arguments), abs=1e-15)


def parameters_of(optimizer):
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def test_tri_stage():
    settings = replace(SETTINGS, schedule="tri_stage", tri_stage=(0.1, 0.4, 0.5), tri_stage_scales=(0.01, 0.05))
    found = [learning_rate(settings, step, 100) / settings.lr for step in range(101)]
    assert found[0] == pytest.approx(0.01)
    assert found[5] == pytest.approx(0.505)  # halfway from 0.01 to 1
    assert found[10:51] == pytest.approx([1.0] * 41)
    assert found[75] == pytest.approx(math.sqrt(0.05))  # halfway of an exponential decay
    assert found[100] == pytest.approx(0.05)
    assert learning_rate(settings, 500, 100) == pytest.approx(0.05 * settings.lr)
    assert all(later < earlier for earlier, later in pairwise(found[50:]))


@pytest.mark.parametrize("shares", [(0.0, 0.0, 1.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.3, 0.3, 0.4)])
def test_tri_stage_with_empty_stages_stays_within_its_scales(shares):
    settings = replace(SETTINGS, schedule="tri_stage", tri_stage=shares, tri_stage_scales=(0.01, 0.05))
    for max_steps in (1, 2, 7):
        for step in range(max_steps + 3):
            assert 0.01 <= learning_rate(settings, step, max_steps) / settings.lr <= 1.0


# --- groups ---


def test_matrices_decay_and_nothing_else():
    speech = model(config={"do_stable_layer_norm": True, "conv_bias": True}, model={"freeze_feature_encoder": True})
    names = {parameter: name.removeprefix("hf.") for name, parameter in speech.named_parameters()}
    groups = parameter_groups(speech, SETTINGS)
    found = {(group["head"], group["decays"]): {names[p] for p in group["params"]} for group in groups}
    assert found[True, True] == {"lm_head.weight"}
    assert found[True, False] == {"lm_head.bias"}
    decayed, plain = found[False, True], found[False, False]
    layer = "wav2vec2.encoder.layers.0"
    assert {f"{layer}.attention.q_proj.weight", "wav2vec2.feature_projection.projection.weight"} <= decayed
    assert "wav2vec2.encoder.pos_conv_embed.conv.parametrizations.weight.original1" in decayed
    assert "wav2vec2.encoder.pos_conv_embed.conv.parametrizations.weight.original0" in plain
    assert {f"{layer}.layer_norm.weight", f"{layer}.attention.q_proj.bias", "wav2vec2.masked_spec_embed"} <= plain
    every = [parameter for group in groups for parameter in group["params"]]
    trained = [parameter for parameter in speech.parameters() if parameter.requires_grad]
    assert len(every) == len(trained) == len(set(every))
    assert not any("feature_extractor" in names[parameter] for parameter in every)


def test_biases_of_two_dimensions_do_not_decay():
    speech = model("wav2vec2-conformer", {"position_embeddings_type": "relative"})
    names = {parameter: name for name, parameter in speech.named_parameters()}
    plain = {names[p] for group in parameter_groups(speech, SETTINGS) if not group["decays"] for p in group["params"]}
    assert sum("pos_bias_u" in name or "pos_bias_v" in name for name in plain) == 4


def test_the_state_is_made_without_a_step():
    speech = model()
    before = copy.deepcopy(speech.state_dict())
    optimizer = build_optimizer(speech, SETTINGS)
    create_optimizer_state(optimizer, parameters_of(optimizer))
    _, saved = get_state_dict(speech, optimizer)  # would run a step if there were no state
    trained = {name for name, parameter in speech.named_parameters() if parameter.requires_grad}
    assert set(saved["state"]) == trained
    assert all(float(state["step"]) == 0 for state in saved["state"].values())
    assert all(torch.equal(value, before[name]) for name, value in speech.state_dict().items())


def test_a_state_that_is_there_is_kept():
    body = Body()
    optimizer = build_optimizer(body, SETTINGS)
    create_optimizer_state(optimizer, parameters_of(optimizer))
    train(body, optimizer, range(2))
    before = copy.deepcopy(optimizer.state_dict()["state"])
    create_optimizer_state(optimizer, parameters_of(optimizer))
    after = optimizer.state_dict()["state"]
    assert {float(state["step"]) for state in after.values()} == {1, 2}  # the frozen rest, the head
    assert all(torch.equal(after[i][key], value) for i, state in before.items() for key, value in state.items())


# --- the thaw ---

FREEZE = 3


class Body(nn.Module):
    """A head and a rest, by the names that count."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(2, 2, bias=False, dtype=torch.float64)
        self.lm_head = nn.Linear(2, 2, bias=False, dtype=torch.float64)
        with torch.no_grad():
            self.encoder.weight.copy_(torch.tensor([[1.0, -2.0], [0.5, 3.0]]))
            self.lm_head.weight.copy_(torch.tensor([[-1.0, 2.0], [1.5, 0.25]]))


def gradient(step: int, shape=(2, 2)) -> np.ndarray:
    return np.random.default_rng(step).standard_normal(shape)


def train(body, optimizer, steps, settings=SETTINGS):
    """Updates with gradients known beforehand; zeros for the rest while it is frozen."""
    for step in steps:
        apply_schedule(optimizer, settings, step, max_steps=10, freeze_transformer_steps=FREEZE)
        known = torch.from_numpy(gradient(step))
        body.lm_head.weight.grad = known.clone()
        body.encoder.weight.grad = torch.zeros_like(known) if step < FREEZE else known.clone()
        optimizer.step()


def adam_by_hand(weight, steps, settings=SETTINGS):
    """AdamW of Loshchilov and Hutter, algorithm 2, its counter from 1 at the first of these steps."""
    first, second = np.zeros_like(weight), np.zeros_like(weight)
    b1, b2 = settings.betas
    for count, step in enumerate(steps, start=1):
        lr = learning_rate(settings, step, 10)
        g = gradient(step)
        first, second = b1 * first + (1 - b1) * g, b2 * second + (1 - b2) * g * g
        weight = weight * (1 - lr * settings.weight_decay)
        weight = weight - lr * (first / (1 - b1**count)) / (np.sqrt(second / (1 - b2**count)) + settings.eps)
    return weight


def optimizer_of(body):
    optimizer = build_optimizer(body, SETTINGS)
    create_optimizer_state(optimizer, parameters_of(optimizer))
    return optimizer


@pytest.mark.parametrize(("step", "expected"), [(FREEZE - 1, (0.0, 0.0)), (FREEZE, (SETTINGS.lr, 0.1))])
def test_frozen_groups_have_neither_rate_nor_decay(step, expected):
    optimizer = optimizer_of(Body())
    apply_schedule(optimizer, SETTINGS, step, max_steps=10, freeze_transformer_steps=FREEZE)
    found = {group["head"]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups}
    assert found == {True: (SETTINGS.lr, 0.1), False: expected}


def test_adam_counts_from_the_thaw():
    body = Body()
    start = body.encoder.weight.detach().numpy().copy(), body.lm_head.weight.detach().numpy().copy()
    optimizer = optimizer_of(body)
    train(body, optimizer, range(FREEZE))
    assert np.array_equal(body.encoder.weight.detach().numpy(), start[0])  # neither moved nor decayed
    train(body, optimizer, range(FREEZE, 8))
    assert body.encoder.weight.detach().numpy() == pytest.approx(adam_by_hand(start[0], range(FREEZE, 8)), abs=1e-14)
    assert body.lm_head.weight.detach().numpy() == pytest.approx(adam_by_hand(start[1], range(8)), abs=1e-14)


@pytest.mark.parametrize("stop", [1, 2, FREEZE - 1, FREEZE, FREEZE + 1, FREEZE + 2])
def test_a_stop_before_at_and_after_the_thaw_changes_nothing(stop):
    whole = Body()
    train(whole, optimizer_of(whole), range(8))

    body = Body()
    optimizer = optimizer_of(body)
    train(body, optimizer, range(stop))
    disk = io.BytesIO()
    torch.save({"model": body.state_dict(), "optimizer": optimizer.state_dict()}, disk)
    disk.seek(0)
    resumed = Body()
    optimizer = optimizer_of(resumed)
    saved = torch.load(disk, weights_only=True)
    resumed.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    train(resumed, optimizer, range(stop, 8))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name])


def test_a_changed_recipe_goes_before_what_a_checkpoint_holds():
    body = Body()
    optimizer = optimizer_of(body)
    train(body, optimizer, range(5))
    saved = optimizer.state_dict()
    optimizer = build_optimizer(body, SETTINGS)
    optimizer.load_state_dict(saved)
    changed = replace(SETTINGS, lr=0.5, weight_decay=0.0, betas=(0.5, 0.6), eps=1e-3)
    lr = apply_schedule(optimizer, changed, 5, max_steps=10, freeze_transformer_steps=FREEZE)
    assert lr == 0.5
    for group in optimizer.param_groups:
        assert (group["lr"], group["weight_decay"], group["betas"], group["eps"]) == (0.5, 0.0, (0.5, 0.6), 1e-3)


# --- the fused kernel ---


class FakeAccelerator:
    def __init__(self, device, mixed_precision, distributed_type):
        self.device, self.mixed_precision = torch.device(device), mixed_precision
        self.distributed_type = distributed_type


@pytest.mark.parametrize(
    ("device", "precision", "kind", "expected"),
    [
        ("cuda", "bf16", DistributedType.NO, True),
        ("cuda", "no", DistributedType.MULTI_GPU, True),
        ("cuda", "bf16", DistributedType.FSDP, True),
        ("cuda", "fp16", DistributedType.NO, False),
        ("cuda", "bf16", DistributedType.DEEPSPEED, False),
        ("cpu", "no", DistributedType.NO, False),
    ],
)
def test_the_fused_kernel_is_for_gpus_where_nothing_else_decides_about_a_step(device, precision, kind, expected):
    assert may_fuse(FakeAccelerator(device, precision, kind)) is expected


def fused_of(body):
    optimizer = build_optimizer(body, SETTINGS, fused=True)
    create_optimizer_state(optimizer, parameters_of(optimizer))
    return optimizer


def test_the_fused_kernel_is_adam_through_the_thaw_and_goes_on_from_either_ones_state():
    whole = Body()
    start = whole.encoder.weight.detach().numpy().copy(), whole.lm_head.weight.detach().numpy().copy()
    train(whole, fused_of(whole), range(8))
    assert whole.encoder.weight.detach().numpy() == pytest.approx(adam_by_hand(start[0], range(FREEZE, 8)), abs=1e-14)
    assert whole.lm_head.weight.detach().numpy() == pytest.approx(adam_by_hand(start[1], range(8)), abs=1e-14)
    for first, then in ((fused_of, fused_of), (optimizer_of, fused_of), (fused_of, optimizer_of)):
        body = Body()
        before = first(body)
        train(body, before, range(5))
        after = then(body)
        for parameter in parameters_of(after):
            for name, value in before.state[parameter].items():
                after.state[parameter][name].copy_(value)
        train(body, after, range(5, 8))
        for name, value in whole.state_dict().items():
            if first is then:
                assert torch.equal(value, body.state_dict()[name])
            assert torch.allclose(value, body.state_dict()[name], rtol=0, atol=1e-14)


def sharded_weights(fused):
    """The weights of a body sharded by FSDP2 over the ranks, after a few updates with gradients known beforehand."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    body = Body()
    fully_shard(body, mesh=mesh)
    optimizer = build_optimizer(body, SETTINGS, fused=fused)
    create_optimizer_state(optimizer, parameters_of(optimizer))
    for step in range(FREEZE + 2):
        apply_schedule(optimizer, SETTINGS, step, max_steps=10, freeze_transformer_steps=FREEZE)
        for name, parameter in body.named_parameters():
            known = torch.from_numpy(gradient(step)) * (1 if "lm_head" in name or step >= FREEZE else 0)
            parameter.grad = distribute_tensor(known, mesh, [Shard(0)])
        optimizer.step()
    return [parameter.full_tensor().detach().numpy() for parameter in body.parameters()]


def test_the_fused_kernel_takes_the_shards_of_fsdp2():
    fused, lists = run_ranks(2, sharded_weights, True), run_ranks(2, sharded_weights, False)
    for rank in range(2):
        for found, expected in zip(fused[rank], lists[rank], strict=True):
            assert found == pytest.approx(expected, abs=1e-14)
