"""`python -m asr_train.fetch RECIPE`: brings everything that a recipe names on the hub to this machine's cache.

For clusters whose compute nodes have no internet: run where there is some, with HF_HOME on the shared file system, as
`wavefleet submit` does for a profile with a `cache`; jobs then read from there, offline.
"""

import argparse
import fnmatch
import sys
from collections.abc import Sequence

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from transformers.utils import logging

from asr_train.config import Recipe
from asr_train.data.rows import SourceError
from asr_train.data.sources import open_source
from asr_train.errors import EXIT_DONE, ModelError, run_main, say
from asr_train.prepare import is_prepared
from asr_train.recipe import load_recipe, on_hub
from asr_train.trouble import remedy

_SMALL = ["*.json", "*.txt", "*.model", "*.py"]  # configurations, vocabularies, code


def main(argv: Sequence[str]) -> int:
    """Bring model, processor and data sets to the cache."""
    options = _parser().parse_intermixed_args(argv)
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    fetch(load_recipe(options.recipe, options.overrides))
    return EXIT_DONE


def fetch(recipe: Recipe) -> None:
    """Bring everything that a recipe names on the hub to the cache; what is there already is only looked up.

    Raises:
        ModelError: a model or processor cannot be had; names it.
        SourceError: a data set cannot be had, or is a stream, which nothing keeps.
    """
    models, sources = on_hub(recipe)
    for name in models:
        is_model = name == recipe.model.pretrained
        _fetch_model(name, recipe.model.revision if is_model else None, weights=is_model)
    if is_prepared(recipe) is not None:
        return
    if streams := [source.dataset for source in sources if source.streaming]:
        raise SourceError(
            [f"{name}: a stream leaves nothing for jobs without internet; prepare the corpus first" for name in streams]
        )
    for source in sources:
        say(f"fetching data set {source.dataset}")
        open_source(source)


def _fetch_model(name: str, revision: str | None, *, weights: bool) -> None:
    """A model's files: those of torch, in the format that transformers prefers, and nothing of other frameworks."""
    say(f"fetching {name}")
    try:
        files = HfApi().list_repo_files(name, revision=revision)
        best = next((kind for kind in ("*.safetensors", "*.bin") if fnmatch.filter(files, kind)), None)
        if weights and best is None:
            raise ModelError(f"model.pretrained: {name} has no weights of torch, only {', '.join(files)}")
        wanted = [*_SMALL, *([best] if weights and best else [])]
        snapshot_download(name, revision=revision, allow_patterns=wanted)
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise ModelError(f"{name} cannot be fetched from the hub: {remedy(error) or error}") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fetch", description="Bring what a recipe names on the hub to the cache.")
    parser.add_argument("recipe", help="a recipe file, or the name of a shipped one")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


if __name__ == "__main__":
    sys.exit(run_main(main))
