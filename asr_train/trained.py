"""A run's result: its recipe, its corpus, and its model with the weights of one checkpoint."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file

from asr_train import checkpoints
from asr_train.checkpoints import Checkpoint
from asr_train.config import Recipe
from asr_train.data.corpus import Corpus
from asr_train.errors import CheckpointError, RecipeError
from asr_train.model import SpeechModel, build_model
from asr_train.optim import is_head
from asr_train.prepare import prepare
from asr_train.restore import load_weights
from asr_train.run_dir import RunDir

_OTHER_HEAD = ", without their head, which is for another vocabulary"


@dataclass(frozen=True)
class Trained:
    """What a run learnt, on the CPU, in evaluation mode."""

    run: RunDir
    recipe: Recipe
    corpus: Corpus
    model: SpeechModel
    checkpoint: Checkpoint


def load_trained(run_dir: Path, which: str = "best") -> Trained:
    """Load the model of a run.

    Args:
        run_dir: a run directory.
        which: `best`, `newest`, or the path of a checkpoint.

    Raises:
        RunError: the folder is no run directory.
        CheckpointError: no such checkpoint, or none that is whole.
        CorpusError: the corpus, whose vocabulary is the model's, is gone and cannot be made again.
    """
    run = RunDir(run_dir)
    recipe = run.recipe()
    checkpoint = find_checkpoint(run, which)
    corpus = prepare(recipe, progress=False)
    model = build_model(recipe, corpus.vocabulary, say=lambda _: None)
    load_weights(checkpoint, model)
    return Trained(run, recipe, corpus, model.eval(), checkpoint)


def find_checkpoint(run: RunDir, which: str) -> Checkpoint:
    """The `best` or the `newest` checkpoint of a run, or the one at a path.

    Raises:
        CheckpointError: there is none.
    """
    choose = {"best": checkpoints.best, "newest": checkpoints.newest}.get(which)
    if choose is not None:
        found = choose(run.checkpoints)
        if found is None:
            raise CheckpointError(f"{run.path} has no checkpoint yet; train it first")
        return _verified(found)
    if not (Path(which) / checkpoints.MANIFEST).exists():
        raise CheckpointError(f"{which!r} is neither best, nor newest, nor the path of a checkpoint")
    return _verified(checkpoints.open_checkpoint(Path(which)))


def _verified(checkpoint: Checkpoint) -> Checkpoint:
    verified = checkpoints.verify(checkpoint)
    if verified.problem is not None:
        raise CheckpointError(f"{checkpoint.path} is damaged: {verified.problem}. Name another one.")
    return verified


def load_init(source: str, model: SpeechModel, say: Callable[[str], None]) -> None:
    """Load the weights that `model.init_from` names into an unwrapped model.

    Args:
        source: a run directory, whose best checkpoint is taken; a checkpoint; or an exported folder.
        model: whose weights are replaced; a CTC head for another vocabulary keeps its own.
        say: tells the user what was taken.

    Raises:
        RecipeError: it is none of these.
        CheckpointError: it is damaged, or of another model.
    """
    path = Path(source)
    is_run, is_checkpoint = (path / "run.json").exists(), (path / checkpoints.MANIFEST).exists()
    if is_run or is_checkpoint:
        checkpoint = find_checkpoint(RunDir(path), source if is_checkpoint else "best")
        resized = load_weights(checkpoint, model, may_resize_head=True)
        say(f"weights from {checkpoint.path}" + (_OTHER_HEAD if resized else ""))
        return
    if not (path / "model.safetensors").exists():
        raise RecipeError(f"model.init_from: {source!r}: is no run, no checkpoint, and no exported folder")
    weights = load_file(path / "model.safetensors")
    own = model.hf.state_dict()
    others = [name for name in weights if is_head(name) and name in own and weights[name].shape != own[name].shape]
    wrong = sorted(
        name for name in weights.keys() | own.keys()
        if name not in others and (name not in weights or name not in own or weights[name].shape != own[name].shape)
    )  # fmt: skip
    if wrong:
        listed = ", ".join(wrong[:5]) + (", ..." if len(wrong) > 5 else "")
        raise CheckpointError(f"model.init_from: {path} is of another model, in: {listed}; nothing was loaded")
    for name in others:
        weights[name] = own[name]
    model.hf.load_state_dict(weights)
    say(f"weights from {path}" + (_OTHER_HEAD if others else ""))
