"""Sources of a recipe -> listings of rows: which reader opens which kind of source."""

from collections.abc import Sequence

from asr_train.config import DemoSource, FolderSource, HubSource, TableSource
from asr_train.data.manifests import open_manifest
from asr_train.data.rows import Listing, SourceError, split_numbers

AnySource = HubSource | TableSource | FolderSource | DemoSource


def open_source(source: AnySource) -> Listing:
    """List the rows of a source, or of its part of a random split.

    Raises:
        SourceError: everything that is wrong with it, with file and row.
    """
    listing = _open(source)
    if source.test_fraction is None:
        return listing
    if not listing.random_access:
        raise SourceError([f"{source}: a stream cannot be split at random; set streaming=false"])
    return listing.select(split_numbers(len(listing), source.test_fraction, source.split_seed, source.part))


def open_sources(sources: Sequence[AnySource]) -> list[Listing]:
    """List the rows of every source of a set; ids of several sources are told apart by `0:`, `1:`, ...

    Raises:
        SourceError: everything that is wrong with any of them.
    """
    listings, problems = [], []
    for number, source in enumerate(sources):
        try:
            listing = open_source(source)
        except SourceError as error:
            problems += error.problems
        else:
            listings.append(listing.prefixed(f"{number}:") if len(sources) > 1 else listing)
    if problems:
        raise SourceError(problems)
    return listings


def _open(source: AnySource) -> Listing:
    match source:
        case TableSource(kind="jsonl" | "csv" | "tsv"):
            return open_manifest(source)
    raise SourceError([f"{source.kind}: this kind of source is not there yet"])
