"""Score a run or a model: `python -m asr_train.evaluate RUN|MODEL`, alone or under `accelerate launch`."""

import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import broadcast_object_list
from rich.console import Console
from rich.table import Table
from rich.text import Text

from asr_train.arguments import evaluate_parser
from asr_train.config import EvalSettings, Recipe, TextSettings
from asr_train.data.corpus import CorpusSet
from asr_train.data.text import Normaliser, Vocabulary
from asr_train.errors import EXIT_DONE, RunError, run_main
from asr_train.eval_data import DataName, pick_sets, prepare_source, read_data_name
from asr_train.files import read_jsonl
from asr_train.metrics import render_alignment
from asr_train.model import PADDING_SENSITIVE_OVER, SpeechModel, load_exported, padding_difference
from asr_train.prepare import prepare
from asr_train.recipe import read_resolved
from asr_train.run_dir import RunDir
from asr_train.score import SetScore, add_metrics, evaluate_set
from asr_train.strategy import keep_deepspeed_from_guessing
from asr_train.trained import load_trained

__all__ = ["SetScore", "evaluate", "evaluate_set"]

_PREPARE_LIMIT = timedelta(hours=12)  # ranks wait in a collective while one of them decodes a table
_NUM_WORST = 5
_WIDTH = 120  # where there is no terminal


@dataclass(frozen=True, kw_only=True)
class _Subject:
    """What is scored, and how its references are read."""

    model: SpeechModel
    vocabulary: Vocabulary
    text: TextSettings
    recipe: Recipe | None  # of a run
    run: RunDir | None
    step: int | None


def evaluate(
    target: Path,
    accelerator: Accelerator,
    *,
    data: str | None = None,
    sets: Sequence[str] = (),
    checkpoint: str = "best",
    out: Path | None = None,
) -> dict[str, tuple[SetScore, Path | None]]:
    """Score a run or a model on every set of some data; every rank calls this.

    Args:
        target: a run directory, or a model folder saved by transformers.
        accelerator: the processes that share the work.
        data: see `arguments.DATA_HELP`; a run's own recipe when None.
        sets: names of the recipe's sets; all when empty.
        checkpoint: of a run: `best`, `newest`, or a path.
        out: folder for a JSONL file a set; when None, a run's own sets go to the run directory, others nowhere.

    Returns:
        set name -> its score, and the file of its rows.

    Raises:
        RunError: the target is neither a run nor a model.
        WavefleetError: the data, the model or a checkpoint cannot be used.
    """
    subject = _open(target, checkpoint)
    named = DataName(subject.recipe, None) if data is None else read_data_name(data)
    if named.recipe is None and named.source is None:
        raise RunError(f"{target} is a model, it does not say what to score it on; name it with --data")
    settings = named.recipe.eval if named.recipe is not None else EvalSettings()
    is_sensitive = padding_difference(subject.model) > PADDING_SENSITIVE_OVER
    subject.model.to(accelerator.device)
    found: dict[str, tuple[SetScore, Path | None]] = {}
    with _opened(named, sets, subject, accelerator) as corpus_sets:
        for name, corpus_set in corpus_sets.items():
            rows = _rows_file(subject, name, out, is_own=data is None)
            score = evaluate_set(
                subject.model, corpus_set, subject.vocabulary, Normaliser(subject.text),
                unit_audio_s=settings.unit_audio_s, equal_lengths=is_sensitive, accelerator=accelerator, out=rows,
            )  # fmt: skip
            if rows is not None and named.recipe is not None:
                trust = named.recipe.trust_remote_code
                score = add_metrics(score, settings.metrics, rows, accelerator, trust_remote_code=trust)
            found[name] = score, rows
    return found


def main(argv: Sequence[str]) -> int:
    """Command line of evaluate."""
    arguments = evaluate_parser().parse_intermixed_args(argv)
    stdout = sys.stdout
    with ExitStack() as stack:
        # what libraries and the preparation of data print is no part of the result
        stack.enter_context(redirect_stdout(sys.stderr))
        accelerator = stack.enter_context(processes(arguments.target))
        is_kept = arguments.out is not None or arguments.data is None
        scratch = stack.enter_context(tempfile.TemporaryDirectory())  # the worst rows are shown where none are kept
        found = evaluate(
            arguments.target, accelerator, data=arguments.data, sets=arguments.sets, checkpoint=arguments.checkpoint,
            out=arguments.out if is_kept else Path(_from_rank_0(scratch, accelerator)),
        )  # fmt: skip
        if accelerator.is_main_process:
            with redirect_stdout(stdout):
                _print(found, as_json=arguments.json, is_kept=is_kept)
    return EXIT_DONE


@contextmanager
def processes(target: Path) -> Iterator[Accelerator]:
    """The processes that score a run or a model; forgotten at the end, for another one may have another precision."""
    is_ours = not is_initialized()
    accelerator = _make_accelerator(target)
    yield accelerator
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if is_ours:
        AcceleratorState._reset_state(reset_partial_state=True)


def _make_accelerator(target: Path) -> Accelerator:
    """The processes, in the precision that a run was trained and evaluated in, as far as this machine has it."""
    has_gpu = torch.cuda.is_available()
    keep_deepspeed_from_guessing()
    precision = RunDir(target).recipe().precision if (target / "run.json").exists() else "fp32"
    is_mixed = precision == "bf16" or (precision == "fp16" and has_gpu)
    return Accelerator(
        mixed_precision=precision if is_mixed else "no",
        kwargs_handlers=[InitProcessGroupKwargs(timeout=_PREPARE_LIMIT)],
    )


def _open(target: Path, checkpoint: str) -> _Subject:
    """A run's model, or a model folder's."""
    if (target / "run.json").exists():
        trained = load_trained(target, checkpoint)
        return _Subject(
            model=trained.model, vocabulary=trained.corpus.vocabulary, text=trained.recipe.text,
            recipe=trained.recipe, run=trained.run, step=trained.checkpoint.step,
        )  # fmt: skip
    if not (target / "config.json").exists():
        raise RunError(f"{target} is neither a run directory (no run.json) nor a model folder (no config.json)")
    model, vocabulary = load_exported(target)
    text = _text_settings(target, vocabulary)
    return _Subject(model=model, vocabulary=vocabulary, text=text, recipe=None, run=None, step=None)


def _text_settings(model_dir: Path, vocabulary: Vocabulary) -> TextSettings:
    """How references are normalised for a model: as its recipe says, else in the letter case of its vocabulary."""
    recipe_file = model_dir / "recipe.yaml"
    if recipe_file.exists():
        return read_resolved(recipe_file).text
    letters = "".join(token for token in vocabulary.tokens if token not in vocabulary.special)
    if letters == letters.lower() or vocabulary.do_lower_case:
        return TextSettings(case="lower")
    return TextSettings(case="upper" if letters == letters.upper() else "keep")


@contextmanager
def _opened(
    named: DataName, sets: Sequence[str], subject: _Subject, accelerator: Accelerator
) -> Iterator[Mapping[str, CorpusSet]]:
    """The sets that were named, decoded; a table's are decoded to a temporary folder, by rank 0."""
    if named.recipe is not None:
        names = pick_sets(list(named.recipe.eval.sets), sets)
        corpus = prepare(named.recipe, progress=accelerator.is_main_process and sys.stderr.isatty())
        yield {name: corpus.sets[name] for name in names}
        return
    assert named.source is not None
    pick_sets([named.set_name], sets)
    with ExitStack() as stack:
        folder = Path(_from_rank_0(stack.enter_context(tempfile.TemporaryDirectory()), accelerator))
        if accelerator.is_main_process:
            prepare_source(
                named.source, folder, text=subject.text, vocabulary=subject.vocabulary,
                geometry=subject.model.geometry, progress=sys.stderr.isatty(),
            )  # fmt: skip
        accelerator.wait_for_everyone()
        yield {named.set_name: CorpusSet(folder / "data")}
        accelerator.wait_for_everyone()


def _rows_file(subject: _Subject, name: str, out: Path | None, *, is_own: bool) -> Path | None:
    if out is not None:
        return out / f"{name}.jsonl"
    if is_own and subject.run is not None and subject.step is not None:
        return subject.run.evaluation(subject.step, name)
    return None


def _from_rank_0(value: str, accelerator: Accelerator) -> str:
    if accelerator.num_processes == 1:
        return value
    values = [value]
    broadcast_object_list(values)
    return values[0]


def _print(found: Mapping[str, tuple[SetScore, Path | None]], *, as_json: bool, is_kept: bool) -> None:
    """Print scores, confusions, and the worst utterances with their alignments; or the scores as one JSON object."""
    if as_json:
        print(json.dumps({name: score.to_json() for name, (score, _) in found.items()}, ensure_ascii=False))
        return
    console = Console(width=None if sys.stdout.isatty() else _WIDTH, highlight=False)
    console.print(_score_table({name: score for name, (score, _) in found.items()}))
    for name, (score, rows) in found.items():
        if score.confusions:
            pairs = ", ".join(f"{left or '∅'} → {right or '∅'} {count}" for left, right, count in score.confusions)
            console.print(Text(f"{name}, most frequent confusions: {pairs}"))
        if rows is None:
            continue
        for row in islice((row for row in read_jsonl(rows) if row["num_errors"]), _NUM_WORST):
            console.print(Text(f"\n{row['id']}  WER {row['wer']:.0%}, {row['duration_s']} s"))
            for lines in render_alignment([tuple(edit) for edit in row["alignment"]], console.width - 5):
                for label, line in zip(("ref", "hyp", ""), lines, strict=True):
                    console.print(Text(f"{label:<4} {line.rstrip()}"))
        if is_kept:
            console.print(Text(f"every row, worst first: {rows}"))


def _score_table(scores: Mapping[str, SetScore]) -> Table:
    table = Table(title="errors against normalised references; raw: against references as they came")
    for column in ("set", "WER", "CER", "raw WER", "raw CER", "S", "D", "I", "words", "rows scored", "refused"):
        table.add_column(column, justify="left" if column == "set" else "right", no_wrap=True)
    for score in scores.values():
        for metric in score.metrics:
            if metric not in [column.header for column in table.columns]:
                table.add_column(metric, justify="right")
    for name, score in scores.items():
        rates = (f"{rate:.2%}" for rate in (score.wer, score.cer, score.wer_raw, score.cer_raw))
        words = score.words
        counts = (words.substitutions, words.deletions, words.insertions, words.num_reference)
        rows = (score.num_rows, score.num_refused)
        more = (f"{value:.4g}" for value in score.metrics.values())
        table.add_row(name, *rates, *(f"{count:,}" for count in (*counts, *rows)), *more)
    return table


if __name__ == "__main__":
    sys.exit(run_main(main))
