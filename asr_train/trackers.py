"""Where curves go besides metrics.jsonl: accelerate's trackers, so that those of a resumed run go on."""

import importlib
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

from asr_train.config import Recipe
from asr_train.errors import RecipeError
from asr_train.files import read_json, write_json
from asr_train.run_dir import RunDir
from asr_train.trouble import LIBRARIES, need

_DEFAULT: Final = "tensorboard"


def tracker_names(recipe: Recipe) -> list[str]:
    """The trackers of a recipe; where it leaves them open, TensorBoard if it is installed.

    Raises:
        LibraryError, RecipeError: one that it names is not installed, or unknown.
    """
    available = {str(name) for name in get_available_trackers()}
    if recipe.log.trackers is None:
        return [_DEFAULT] if _DEFAULT in available and _is_whole("torch.utils.tensorboard") else []
    for tracker in set(recipe.log.trackers) & set(LIBRARIES):
        need(tracker, f"log.trackers: {tracker}")
    if unknown := sorted(set(recipe.log.trackers) - available):
        known = ", ".join(sorted(available))
        raise RecipeError(f"log.trackers: {', '.join(unknown)}: not installed, or unknown to accelerate; here: {known}")
    return list(recipe.log.trackers)


def _is_whole(module: str) -> bool:
    """Whether it can be imported; what nobody asked for by name may be broken, and ends no training."""
    try:
        importlib.import_module(module)
    except Exception:
        return False
    return True


def open_trackers(accelerator: Accelerator, recipe: Recipe, run: RunDir, step: int) -> None:
    """Begin an attempt's curves at `step`, in the run's own place in each tracker.

    TensorBoard leaves out what an attempt before wrote of later steps, W&B what this one writes of steps that it has
    already; MLflow and trackio have no way to, and show such steps twice.
    """
    folder, name = run.path / "trackers", run.path.name
    init_kwargs: dict[str, dict[str, Any]] = {
        "tensorboard": {"purge_step": step + 1},
        "wandb": {"id": run.run_id, "name": name, "resume": "allow", "dir": str(folder)},
        "mlflow": {"run_id": _mlflow_run(folder), "run_name": name},
        "trackio": {"name": name, "resume": "allow"},
    }
    if accelerator.log_with and accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
    accelerator.init_trackers(recipe.name, init_kwargs=init_kwargs)
    if "mlflow" in map(str, accelerator.log_with) and accelerator.is_main_process:
        write_json(_mlflow_file(folder), {"run_id": accelerator.get_tracker("mlflow", unwrap=True).info.run_id})


def _mlflow_run(folder: Path) -> str | None:
    """The id that MLflow gave this run in an attempt before."""
    with suppress(OSError, ValueError, KeyError):
        return str(read_json(_mlflow_file(folder))["run_id"])
    return None


def _mlflow_file(folder: Path) -> Path:
    return folder / "mlflow.json"
