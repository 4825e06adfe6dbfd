"""A function for each verb: what it is given and what it returns; the work is done by what the verbs call too.

`prepare`, `plan`, `evaluate`, `export` and `transcribe` work in this process, `train` in others, as the verb does: so
it uses every GPU, a notebook keeps its memory, and a failed training leaves it alive.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asr_train.config import Recipe
from asr_train.errors import CorpusError
from asr_train.recipe import load_recipe
from asr_train.verbosity import at
from wavefleet import training
from wavefleet.results import Planned, Prepared, PreparedSet, Trained, Transcribed

if TYPE_CHECKING:
    from asr_train.export import Exported
    from asr_train.score import SetScore

# torch and what needs it are imported in the functions, so that those who only train never wait for it here.

AnyRecipe = str | os.PathLike[str] | Mapping[str, Any] | Recipe
"""The name of a recipe that ships, a file, plain values as a file holds them, or a `Recipe`."""

Overrides = Mapping[str, Any] | Sequence[str]
"""Changes to a recipe: `{"optim.lr": 1e-5}`, or `["optim.lr=1e-5"]` as on the command line."""

AnyPath = str | os.PathLike[str]


def prepare(recipe: AnyRecipe, overrides: Overrides = (), *, verbose: bool = False) -> Prepared:
    """Make the corpus of a recipe: decoded, checked, indexed. At once where that is done already.

    Args:
        recipe: what to prepare.
        overrides: changes to it.
        verbose: show notes, progress and the report, as the verb does.

    Raises:
        RecipeError: the recipe is wrong; lists every mistake.
        CorpusError: bad input, too many refused rows, an empty set.
        ModelError: the model, whose frames decide what can be aligned, cannot be had.
    """
    from asr_train.prepare import prepare as run  # noqa: PLC0415

    resolved = load_recipe(recipe, overrides)
    with _shown(verbose):
        corpus = run(resolved, progress=verbose)
    sets = {
        name: PreparedSet(rows=entry["rows"], hours=entry["hours"], refused=dict(entry["rejected"]))
        for name, entry in corpus.info["sets"].items()
    }
    return Prepared(path=corpus.path, sets=sets, vocabulary=corpus.vocabulary.tokens, corpus=corpus)


def plan(
    recipe: AnyRecipe,
    overrides: Overrides = (),
    *,
    processes: int | None = None,
    gpu: str | None = None,
    verbose: bool = False,
) -> Planned:
    """What a training would be: steps, padding, balance, memory, time. Prepares the corpus if that is not done.

    Args:
        recipe: what would be trained.
        overrides: changes to it.
        processes: as many as `train` would start on this machine, when None.
        gpu: a GPU's name, `A100-80GB` say, that memory and time are for; this machine's when None.
        verbose: show notes and progress.

    Raises:
        WavefleetError: as `prepare`; or no such GPU is known.
    """
    from asr_train.prepare import prepare as run  # noqa: PLC0415
    from launch import plan_place, plan_training  # noqa: PLC0415

    resolved = load_recipe(recipe, overrides)
    with _shown(verbose):
        run(resolved, progress=verbose)
        found = plan_training.plan_training(resolved, plan_place.here(processes, None, gpu), resolved.name)
    return Planned(
        steps_per_epoch=found.forecast.epoch.num_steps,
        max_steps=found.forecast.max_steps,
        num_epochs=found.forecast.num_epochs,
        epoch=found.forecast.epoch,
        forecast=found.forecast,
        warnings=tuple(warning.text for warning in found.warnings),
    )


def train(
    recipe: AnyRecipe,
    overrides: Overrides = (),
    *,
    processes: int | None = None,
    accelerate: AnyPath | None = None,
    allow_change: bool = False,
    verbose: bool = False,
) -> Trained:
    """Train on this machine, in processes of its own; the same call again goes on where it stopped, or says: done.

    Ctrl-C, or a notebook's stop button, has it save and stop; it stops by itself when this process ends.

    Args:
        recipe: what to train.
        overrides: changes to it.
        processes: how many; one a GPU if not given.
        accelerate: an accelerate config: a file, or a shipped one by name.
        allow_change: go on with a run although its recipe changed.
        verbose: show progress on stderr, line by line.

    Raises:
        RecipeError: the recipe is wrong, or this machine cannot run it so.
        RunError: the run is live, or of another recipe.
        TrainingError: it failed; the message says why.
        CheckpointError: it has checkpoints, and none can be used.
    """
    with _shown(verbose):
        return training.train(
            load_recipe(recipe, overrides),
            processes=processes,
            accelerate=None if accelerate is None else os.fspath(accelerate),
            allow_change=allow_change,
        )


def evaluate(
    target: AnyPath,
    *,
    data: AnyPath | None = None,
    sets: Sequence[str] = (),
    checkpoint: AnyPath = "best",
    out: AnyPath | None = None,
    verbose: bool = False,
) -> "dict[str, SetScore]":
    """WER and CER of a run or a model, from summed edit counts; set name -> its score.

    Args:
        target: a run (what `train` returned, or its directory), or a model folder.
        data: a recipe, whose eval sets are scored; a table of audio and texts; or a folder of audio files with their
            texts. A run's own recipe if not given.
        sets: these sets only.
        checkpoint: of a run: `best`, `newest`, or a path.
        out: folder for a JSONL file a set, with every row, worst first.
        verbose: show notes and progress.

    Raises:
        RunError: the target is neither a run nor a model.
        WavefleetError: the data, the model or a checkpoint cannot be used.
    """
    from asr_train.evaluate import evaluate as run  # noqa: PLC0415
    from asr_train.evaluate import processes  # noqa: PLC0415

    path = Path(target)
    with _shown(verbose), processes(path) as accelerator:
        found = run(
            path,
            accelerator,
            data=None if data is None else os.fspath(data),
            sets=sets,
            checkpoint=os.fspath(checkpoint),
            out=None if out is None else Path(out),
        )
    return {name: score for name, (score, _) in found.items()}


def export(
    run: AnyPath,
    out: AnyPath | None = None,
    *,
    checkpoint: AnyPath = "best",
    push_to_hub: str | None = None,
    verbose: bool = False,
) -> "Exported":
    """Write a run's model, processor and model card to a folder that transformers loads; loaded again and compared.

    Args:
        run: what `train` returned, or a run directory.
        out: the folder; RUN/export if not given.
        checkpoint: `best`, `newest`, or a path.
        push_to_hub: upload it too, to a repository such as `me/my-model`.
        verbose: show notes and progress.

    Raises:
        RunError: no run, or `out` holds something else.
        CheckpointError: no such checkpoint.
        ModelError: what was written does not load to the same model.
        WavefleetError: it could not be written; or the hub refused, the folder is complete.
    """
    from asr_train.export import export as work  # noqa: PLC0415

    with _shown(verbose):
        return work(
            Path(run), None if out is None else Path(out), checkpoint=os.fspath(checkpoint), push_to_hub=push_to_hub
        )


def transcribe(model: AnyPath, inputs: AnyPath | Sequence[AnyPath], *, verbose: bool = False) -> Transcribed:
    """Texts of audio files of any format and length, their words with times; on a GPU if there is one.

    Args:
        model: what `export` returned, a model folder, or one saved by transformers.
        inputs: a file, a folder of audio files, or several of these.
        verbose: show notes and progress.

    Raises:
        CorpusError: none of the files can be read; where some can, the others are in `bad`.
        ModelError: the folder holds no model of this kind.
        RecipeError: a folder without audio files.
    """
    from asr_train.transcribe import BadFile, Transcript, find_audio  # noqa: PLC0415
    from asr_train.transcribe import transcribe as work  # noqa: PLC0415

    given = [inputs] if isinstance(inputs, str | os.PathLike) else inputs
    with _shown(verbose):
        results = list(work(Path(model), list(find_audio([Path(path) for path in given]))))
    bad = tuple(result for result in results if isinstance(result, BadFile))
    if bad and len(bad) == len(results):
        raise CorpusError("no file could be transcribed:" + "".join(f"\n  {item.file}: {item.reason}" for item in bad))
    return Transcribed(transcripts=tuple(result for result in results if isinstance(result, Transcript)), bad=bad)


@contextmanager
def _shown(verbose: bool) -> Iterator[None]:
    """Notes as on the command line, or nothing at all."""
    with at("normal" if verbose else "quiet"):
        yield
