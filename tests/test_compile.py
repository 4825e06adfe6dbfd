"""`model.compile`: the same losses, one compilation for all shapes of units, under every strategy that takes it.

One test compiles for real, with torch's C++; the others stop before the generated code (`aot_eager`), which leaves what
could go wrong here: whether a layer can be traced, how often, and what the wrapping around it does.
"""

import shutil
from functools import partial

import pytest
import tiny
import torch
from test_runs import NOTHING_EVALUATED, assert_close, losses, recipe, run_on  # noqa: F401  recipe is a fixture
from test_strategies import train_fsdp2
from torch._dynamo.utils import counters

from asr_train import compiling
from asr_train.config import OptimSettings
from asr_train.data.batch import input_values
from asr_train.errors import ModelError
from asr_train.loss import ctc_losses
from asr_train.optim import build_optimizer
from asr_train.train import train

SHAPES = [[20_000, 15_000], [30_000, 20_000, 10_000], [12_000, 12_000], [24_000, 9_000, 16_000, 16_000]]
ALONE = [18_000]


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    """What one test compiled, or set, is not there in the next."""
    torch.compiler.reset()
    counters.clear()
    with torch._dynamo.config.patch(optimize_ddp=True, recompile_limit=8):
        yield


@pytest.fixture
def traced_only(monkeypatch):
    monkeypatch.setattr(compiling, "_BACKEND", "aot_eager")


def num_compilations():
    return counters["stats"]["unique_graphs"]


def trained_losses(model, shapes):
    """Losses of a step on each batch, dropped layers and masks on; the model is changed."""
    optimizer = build_optimizer(model, OptimSettings(lr=1e-3))
    found = []
    for number, lengths in enumerate(shapes):
        batch = tiny.batch_of(lengths, model.batch_settings, seed=number + 1)
        torch.manual_seed(batch.seed)
        logits = model(
            input_values(batch),
            batch.num_samples,
            time_mask=batch.time_mask,
            feature_mask=batch.feature_mask,
            keep_layers=batch.keep_layers,
        )
        each, _ = ctc_losses(logits, batch.num_frames, batch.labels, batch.num_labels, 0)
        loss = each.mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def two_models(architecture="wav2vec2", config=None, **groups):
    """The same model twice, the second one compiled."""
    masks = {"time_prob": 0.3, "time_length": 3}
    groups = {"spec_augment": masks, **groups}
    plain, compiled = (tiny.model(architecture, tiny.no_dropout(**(config or {})), **groups) for _ in range(2))
    compiling.compile_layers(compiled)
    return plain, compiled


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="needs a C++ compiler")
def test_a_compiled_model_trains_like_the_other_and_is_compiled_once_for_all_shapes():
    plain, compiled = two_models(model={"layerdrop": 0.3})
    expected = trained_losses(plain, SHAPES)
    assert expected[0] != pytest.approx(expected[-1], rel=1e-2)  # else there would be nothing to follow
    assert trained_losses(compiled, SHAPES) == pytest.approx(expected, rel=1e-5)
    assert num_compilations() == 1
    assert len(plain._layers()) > 1
    for name, weight in plain.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[name], weight, rtol=1e-3, atol=1e-5)


def saved_bytes(model):
    """What autograd keeps of a forward for its backward."""
    sizes = []
    batch = tiny.batch_of([40_000, 40_000], model.batch_settings)

    def pack(tensor):
        sizes.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_values(batch), batch.num_samples).sum().backward()
    return sum(sizes)


@pytest.mark.usefixtures("traced_only")
def test_gradient_checkpointing_recomputes_in_compiled_layers_too():
    plain, compiled = two_models(model={"gradient_checkpointing": True, "layerdrop": 0.3})
    assert trained_losses(compiled, SHAPES) == pytest.approx(trained_losses(plain, SHAPES), rel=1e-5)
    assert num_compilations() == 1
    _, keeping = two_models()
    assert saved_bytes(compiled) < 0.7 * saved_bytes(keeping)


@pytest.mark.usefixtures("traced_only")
def test_single_utterances_and_frozen_layers_are_compiled_once_more_and_evaluation_never():
    plain, compiled = two_models()
    expected = trained_losses(plain, [*SHAPES, ALONE, [9_000], *SHAPES])
    assert trained_losses(compiled, [*SHAPES, ALONE, [9_000], *SHAPES]) == pytest.approx(expected, rel=1e-5)
    assert num_compilations() == 2
    compiled.transformer_frozen = True
    trained_losses(compiled, SHAPES)
    assert num_compilations() == 3
    compiled.eval()
    trained_losses(compiled, [*SHAPES, ALONE])
    assert num_compilations() == 3


@pytest.mark.usefixtures("traced_only")
def test_wavlm_whose_layers_hand_on_a_position_bias_trains_compiled_too():
    plain, compiled = two_models("wavlm")
    assert trained_losses(compiled, SHAPES[:2]) == pytest.approx(trained_losses(plain, SHAPES[:2]), rel=1e-5)
    assert num_compilations() == 2  # the first layer makes the bias


@pytest.mark.usefixtures("traced_only")
def test_what_torch_cannot_compile_is_refused_by_name(monkeypatch):
    _, compiled = two_models()
    layer = compiled._layers()[0]

    def forward(self, hidden, **_):
        return hidden if hidden.sum() > 0 else -hidden  # a value on the device decides

    monkeypatch.setattr(type(layer), "forward", forward)
    with pytest.raises(ModelError, match=f"model.compile: torch cannot compile {type(layer).__name__} here: .*false"):
        trained_losses(compiled, SHAPES[:1])


def train_traced(program, recipe):  # noqa: F811
    compiling._BACKEND = "aot_eager"
    code = program(recipe)
    assert num_compilations() > 0
    return code


@pytest.mark.parametrize("program", [train, train_fsdp2], ids=["ddp", "fsdp2"])
def test_compiled_on_2_ranks_makes_the_run_of_1_process(recipe, program):  # noqa: F811
    """Dropout on too: traced layers draw what the others draw."""
    changes = {**NOTHING_EVALUATED, "max_steps": 3, "unit_audio_s": 6, "model.gradient_checkpointing": True}
    one = losses(run_on(1, recipe("one", changes)))
    two = recipe("two", {**changes, "model.compile": True})
    assert_close(losses(run_on(2, two, partial(train_traced, program))), one)
