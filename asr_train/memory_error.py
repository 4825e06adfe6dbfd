"""Out of memory in training: which unit it was, and what to set."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from asr_train.config import Recipe
from asr_train.errors import UnitMemoryError

_MAX_CHARACTERS = 160  # of torch's own text, which goes on about its allocator
# torch's CPU allocator raises a plain RuntimeError
_ON_HOST = ("DefaultCPUAllocator", "can't allocate memory", "not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch could not have the memory that it asked for, on a device or on the host."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in _ON_HOST)
    )


@contextmanager
def names_what_was_too_large(recipe: Recipe, where: Callable[[], str]) -> Iterator[None]:
    """Turn an out-of-memory error inside into a message that says where it was and which settings help.

    Args:
        recipe: of the run.
        where: asked only then: `unit 3 of ...`.

    Raises:
        UnitMemoryError: in place of torch's.
    """
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if not is_out_of_memory(error):
            raise
        said = " ".join(str(error).split())[:_MAX_CHARACTERS]
        raise UnitMemoryError(f"out of memory in {where()}: {said}\n{_what_helps(recipe)}") from error


def _what_helps(recipe: Recipe) -> str:
    """Settings that are not used up yet, those that keep the run's plan of the data first."""
    going_on = []
    if not recipe.model.gradient_checkpointing:
        going_on.append("model.gradient_checkpointing=true")
    if recipe.precision == "fp32":
        going_on.append("precision=bf16")
    if not recipe.model.freeze_feature_encoder:
        going_on.append("model.freeze_feature_encoder=true")
    if recipe.model.attention == "eager":
        going_on.append("model.attention=sdpa")
    first = f"--allow-change goes on with {' or '.join(going_on)}; " if going_on else ""
    size = "unit_utterances" if recipe.unit_utterances is not None else "unit_audio_s"
    value = recipe.unit_utterances if recipe.unit_utterances is not None else f"{recipe.unit_audio_s:g}"
    return (
        f"What helps: {first}a config that shards the model (fsdp2) or a larger GPU need no change; lower {size} (now"
        f" {value}) with as many times more units_per_step in a new run, for that is another plan of the data."
    )
