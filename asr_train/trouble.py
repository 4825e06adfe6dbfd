"""What is missing, said with its remedy: a library, a login or a way to the hub; room on a disk is in `disk`."""

import importlib.util
from collections.abc import Iterator
from typing import Final, NamedTuple

from asr_train.disk import is_full, no_room
from asr_train.errors import LibraryError


class _Library(NamedTuple):
    """A library that is not always installed."""

    install: str
    remark: str = ""


_LIBRARIES: Final = {
    "deepspeed": _Library("pip install 'wavefleet[deepspeed]'", "Without it: --accelerate fsdp2 shards too."),
    "espeakng_loader": _Library("pip install 'wavefleet[demo]'"),
    "flash_attn": _Library("pip install flash-attn --no-build-isolation", "Without it: model.attention=sdpa."),
    "tensorboard": _Library("pip install 'wavefleet[trackers]'"),
    "wandb": _Library("pip install wandb", "Then `wandb login`."),
    "mlflow": _Library("pip install mlflow"),
    "trackio": _Library("pip install trackio"),
}
"""Module -> how it is had, and what works without it."""

_LOGIN: Final = "log in with `hf auth login`, or set HF_TOKEN"
_REMEDIES: Final = {
    "GatedRepoError": f"it is gated: accept its conditions on its page on the hub, then {_LOGIN}",
    "RepositoryNotFoundError": f"the hub has no such repository, or a private one; check the name, or {_LOGIN}",
    "DatasetNotFoundError": f"the hub has no such data set, or a private one; check the name, or {_LOGIN}",
    "OfflineModeIsEnabled": (
        "HF_HUB_OFFLINE is set, and it is not in the cache; unset it, or name a folder on this machine"
    ),
}
"""Name of an exception, of huggingface_hub's, datasets' or Python's -> what to do."""
_UNREACHABLE_REMEDY: Final = (
    "the hub cannot be reached from here, and it is not in the cache; fetch it where there is internet with "
    "`python -m asr_train.fetch RECIPE` and the same HF_HOME, or name a folder on this machine"
)
_UNREACHABLE: Final = {"LocalEntryNotFoundError", "ConnectionError", "ConnectError", "TimeoutException", "gaierror"}


LIBRARIES: Final = tuple(_LIBRARIES)
"""Those that `need` knows."""


def need(module: str, what_for: str) -> None:
    """Refuse what needs a library that is not installed.

    Args:
        module: that it is imported as.
        what_for: the recipe's field, or the option, that asks for it.

    Raises:
        LibraryError: with how to install it.
    """
    if importlib.util.find_spec(module) is None:
        library = _LIBRARIES[module]
        name = module.replace("_", "-")
        text = f"{what_for}: needs {name}, which is not installed: {library.install}. {library.remark}"
        raise LibraryError(text.strip())


def remedy(error: BaseException) -> str | None:
    """What an error of a library means and what to do, with its own first line; None where that is not known."""
    causes = list(_causes(error))
    for cause in causes:
        for kind in type(cause).__mro__:
            if (known := _REMEDIES.get(kind.__name__)) is not None:
                return f"{known} ({_first_line(error)})"
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if status in (401, 403):
            return f"the hub refused ({status}): {_LOGIN}, to an account that may read it ({_first_line(error)})"
        if isinstance(cause, OSError) and is_full(cause):
            return no_room(cause)
    if any(kind.__name__ in _UNREACHABLE for cause in causes for kind in type(cause).__mro__):
        return f"{_UNREACHABLE_REMEDY} ({_first_line(error)})"
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error and those that it came from."""
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        yield found
        found = found.__cause__ or found.__context__


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
