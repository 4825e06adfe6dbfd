"""A run's result: its recipe, its corpus, and its model with the weights of one checkpoint."""

from dataclasses import dataclass
from pathlib import Path

from asr_train import checkpoint as checkpoints
from asr_train.checkpoint import Checkpoint
from asr_train.config import Recipe
from asr_train.data.corpus import Corpus
from asr_train.errors import CheckpointError
from asr_train.model import SpeechModel, build_model
from asr_train.prepare import prepare
from asr_train.run_dir import RunDir


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
    checkpoints.load_weights(checkpoint, model)
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
        return found
    named = checkpoints.open_checkpoint(Path(which))
    if named is None:
        raise CheckpointError(f"{which!r} is neither best, nor newest, nor the path of a whole checkpoint")
    return named
