"""`wavefleet new NAME [DATA]`: looks at somebody's data, and writes a commented recipe that prepares and trains it.

What it cannot know it takes from the recipes that ship, and says from which. `choose` decides, `new_file` writes.
"""

import os
import sys
from collections import Counter
from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import Final

from pydantic import TypeAdapter, ValidationError

from asr_train import resources
from asr_train.arguments import new_parser
from asr_train.config import Name
from asr_train.data.find_source import find_source
from asr_train.data.look import Look, look_at, open_all
from asr_train.data.rows import SourceError
from asr_train.errors import EXIT_DONE, CorpusError, run_main, say
from asr_train.geometry import SAMPLE_RATE
from asr_train.new_file import ENGLISH, MULTILINGUAL, SCRATCH, Choice, describe, render
from asr_train.recipe import load_recipe
from asr_train.trouble import remedy

_LONG_S: Final = 30.0  # the recipe's own default of data.max_duration_s
_FEW: Final = 0.02  # share of utterances that may be refused without a word
_REFUSED: Final = 0.05  # the recipe's own default of data.max_rejected_percent
_MANY_LETTERS: Final = 500
_FEW_HOURS: Final = 10.0
_CASES: Final = {"both": "lower", "upper": "upper", "lower": "lower", "none": "keep"}


def main(argv: Sequence[str]) -> int:
    """The command line."""
    options = new_parser().parse_intermixed_args(argv)
    file = options.out or Path(f"{options.name}.yaml")
    problems = _wrong_names(options.name, file)
    if options.data is None and not problems:
        return _write(file, _demo(options.name, str(file)))
    try:
        found = find_source(options.data, audio_column=options.audio_column, text_column=options.text_column)
        look = look_at(found.train)
        sets = open_all(found.sets)
        problems += _wrong_data(look)
    except SourceError as error:
        problems += error.problems
        if any("_column)" in problem for problem in error.problems):
            problems.append("columns of other names: --audio-column COLUMN, --text-column COLUMN")
    if problems:
        raise CorpusError("nothing was written:" + "".join(f"\n  {problem}" for problem in problems))
    choice = choose(look, has_sets=bool(sets), model=options.model)
    text = render(options.name, str(file), found.what, look, sets, choice)
    print("\n".join(describe(found.what, look)))
    for remark in choice.remarks:
        say(f"note: {remark}")
    return _write(file, text)


def _write(file: Path, text: str) -> int:
    with file.open("x", encoding="utf-8") as stream:  # another process may have made it meanwhile
        stream.write(text)
    load_recipe(file)  # what is written is a recipe, or it is a defect to be seen at once
    print(f"written: {file}")
    return EXIT_DONE


def _demo(name: str, file: str) -> str:
    """The demo's recipe under another name, for those who have no data yet."""
    text = resources.find("recipes", "demo").read_text(encoding="utf-8")
    head = (
        f"# wavefleet train {file}\n#\n"
        "# The demo's recipe. For data of your own: `wavefleet new NAME DATA`; or change data.train and eval.sets.\n"
    )
    return head + text.partition("\n#\n")[2].replace("name: demo\n", f"name: {name}\n")


def choose(look: Look, *, has_sets: bool, model: str | None) -> Choice:
    """Settings for some data.

    Args:
        look: what was seen of the training set.
        has_sets: whether the data has evaluation sets of its own.
        model: a pretrained one, or `scratch`; chosen by the script when None.
    """
    remarks = _remarks(look)
    name, why = _model(look) if model is None else (model, "as asked for")
    if model is None and name != SCRATCH and (problem := unreachable(name)) is not None:
        remarks.append(f"{name} should be the model, but cannot be had here: {problem}; a small one stands in for it")
        name, why = SCRATCH, f"stands in for {name}, which could not be had when this was written"
    if name == SCRATCH and look.hours < _FEW_HOURS:
        remarks.append(f"{look.hours:.2g} hours are too few to learn speech from nothing; take a pretrained --model")
    longest = float(look.durations_s[-1])
    is_long = float((look.durations_s > _LONG_S).mean()) > _FEW
    step_s = min(1600.0, max(25.0, look.hours * 3600 / 20)) if look.is_whole else 400.0  # some 20 steps an epoch
    units = 8 if step_s >= 400 else 2
    return Choice(
        model=name,
        model_why=why,
        case=_CASES[look.texts.case],
        remove=look.texts.signs,
        max_duration_s=float(ceil(longest)) if is_long else _LONG_S,
        unit_audio_s=float(max(round(step_s / units), ceil(longest) if is_long else 1)),
        units_per_step=units,
        max_steps=_num_steps(look.hours if look.is_whole else 10.0),
        test_fraction=None if has_sets else 0.1 if look.num_rows < 10_000 else 0.01,
        remarks=tuple(remarks),
    )


def unreachable(model: str) -> str | None:
    """Why a pretrained model cannot be had here, from the cache, a folder or the hub; None where it can."""
    from huggingface_hub import HfApi, try_to_load_from_cache  # noqa: PLC0415 - a demo does not need it
    from huggingface_hub.errors import HfHubHTTPError  # noqa: PLC0415

    if Path(model).is_dir() or isinstance(try_to_load_from_cache(model, "config.json"), str):
        return None
    try:
        HfApi().model_info(model, timeout=10)
    except (HfHubHTTPError, OSError, ValueError, RuntimeError) as error:
        return _short(remedy(error) or str(error))
    except Exception as error:  # the hub's client is httpx's, whose errors are of no common kind with ours
        if (known := remedy(error)) is None:
            raise
        return _short(known)
    return None


def _short(text: str) -> str:
    """What is wrong, without what to do."""
    return text.partition("; ")[0].partition(" (")[0]


def _model(look: Look) -> tuple[str, str]:
    if look.texts.letters <= set("abcdefghijklmnopqrstuvwxyz"):
        return ENGLISH, "Latin letters a to z only: English, it seems; of English speech"
    return MULTILINGUAL, "letters beyond a to z; of 128 languages"


def _num_steps(hours: float) -> int:
    """Updates, of the shipped recipe for as much data: minds14, commonvoice_xlsr, librispeech_100h."""
    return 2000 if hours < 2 else 5000 if hours < 50 else 80_000


def _remarks(look: Look) -> list[str]:
    """What somebody should know of their data, none of which stops a training."""
    remarks = []
    if look.unreadable:
        share = len(look.unreadable) / look.num_sampled
        files = f"{len(look.unreadable)} of {look.num_sampled} files ({share:.0%})"
        remarks.append(f"{files} cannot be read: {look.unreadable[0]}")
    if look.num_without_text:
        remarks.append(
            f"{look.num_without_text:,} of {look.num_rows:,} rows have no text; prepare refuses and lists them"
        )
    if low := sorted(rate for rate in map(int, look.counts("rate_hz")) if rate < SAMPLE_RATE):
        rates = ", ".join(map(str, low))
        remarks.append(f"recordings at {rates} Hz hold nothing over {low[-1] // 2} Hz, which a model expects to hear")
    if any(getattr(source, "allow_paths_outside_root", False) for source in look.sources):
        remarks.append("paths of audio lead out of the table's folder, and the recipe allows it; is the table yours?")
    if look.texts.has_digits:
        remarks.append("texts hold digits, which are not written as they are spoken: better spelt out")
    if len(look.texts.letters) > _MANY_LETTERS:
        remarks.append(f"{len(look.texts.letters)} different characters: rare ones will hardly be learnt")
    learnt: Counter[str] = Counter()
    for key, count in look.texts.characters.items():
        learnt[key.lower() if look.texts.case == "both" else key] += count  # as `_CASES` has it
    rare = [key for key, count in learnt.items() if count < 3 and key.isalpha()]
    if rare and len(learnt) > 20:
        remarks.append(f"letters that occur once or twice: {' '.join(sorted(rare)[:20])}; misspellings, perhaps")
    if len(look.texts.scripts) > 1:
        remarks.append(f"several scripts: {', '.join(look.texts.scripts)}")
    return remarks


def _wrong_names(name: str, file: Path) -> list[str]:
    """What is wrong with the names that were given."""
    problems = []
    try:
        TypeAdapter(Name).validate_python(name)
    except ValidationError:
        problems.append(f"NAME: {name!r}: letters, digits, dots, dashes and underlines, the first a letter or digit")
    if file.exists():
        problems.append(f"{file} exists already, and is left as it is; choose another name, or --out FILE")
    elif not file.absolute().parent.is_dir():
        problems.append(f"{file}: there is no folder {file.parent}")
    elif not os.access(file.absolute().parent, os.W_OK):
        problems.append(f"{file}: nothing may be written into {file.absolute().parent}")
    return problems


def _wrong_data(look: Look) -> list[str]:
    """Why `prepare` would refuse the data."""
    problems = []
    if len(look.unreadable) > _REFUSED * look.num_sampled:
        listed = "".join(f"\n    {problem}" for problem in look.unreadable[:5])
        problems.append(f"{len(look.unreadable)} of {look.num_sampled} files cannot be read:{listed}")
    if look.num_without_text > _REFUSED * look.num_rows:
        problems.append(
            f"{look.num_without_text:,} of {look.num_rows:,} rows have no text; "
            "of audio files in a folder, the text of NAME.wav is in NAME.txt beside it"
        )
    return problems


if __name__ == "__main__":
    sys.exit(run_main(main))
