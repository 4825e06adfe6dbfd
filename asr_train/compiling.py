"""A model's transformer layers compiled by torch, once for the shapes of all units.

Only the layers: most of the time is spent there, all of a model's have the same code, and what they take, [B, F, H],
differs in B and F alone. So one compilation with symbolic sizes serves every layer and all of the plan's shapes; torch
makes further ones for units of a single utterance, for units without a mask, and while the transformer is frozen.
Feature encoder, masks, dropped layers and the head stay as they are. Evaluation runs the layers uncompiled.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException

from asr_train.errors import ModelError
from asr_train.speech_model import SpeechModel

_BACKEND = "inductor"
_MAX_COMPILATIONS = 16  # with and without: a mask, a second utterance, gradients; and as many again in reserve


def compile_layers(model: SpeechModel) -> None:
    """Have every transformer layer compiled when it is first trained; call it before the model is wrapped.

    Raises:
        ModelError: when a layer is first trained, if torch cannot compile it, or finds no compiler.
    """
    # DDP's optimizer for compiled models cuts graphs at its buckets; layers are cut finer than that already
    torch._dynamo.config.optimize_ddp = False
    torch._dynamo.config.recompile_limit = _MAX_COMPILATIONS
    compiled = torch.compile(_call, dynamic=True, fullgraph=True, backend=_BACKEND)
    for layer in model._layers():
        layer.forward = _forward(layer, compiled)


def _call(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    # found anew each time: FSDP2 puts a class of its own in the layer's
    return type(layer).forward(layer, *args, **kwargs)


def _forward(layer: nn.Module, compiled: Callable[..., Any]) -> Callable[..., Any]:
    """The layer's forward; hooks (dropped layers, FSDP2's) stay around it."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not layer.training:
            return _call(layer, *args, **kwargs)
        try:
            return compiled(layer, *args, **kwargs)
        except TorchDynamoException as error:
            reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise ModelError(
                f"model.compile: torch cannot compile {type(layer).__name__} here: {reason}; set model.compile=false"
            ) from error

    return forward
