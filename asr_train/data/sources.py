"""Sources of a recipe -> listings of rows: which reader opens which kind of source."""

from collections.abc import Sequence

from asr_train.config import DemoSource, FolderSource, HubSource, TableSource
from asr_train.data.folders import open_folder
from asr_train.data.manifests import open_manifest
from asr_train.data.rows import Listing, SourceError, SpokenAudio, make_table, split_numbers
from asr_train.data.tables import open_table

AnySource = HubSource | TableSource | FolderSource | DemoSource


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


def open_source(source: AnySource) -> Listing:
    """List the rows of a source, or of its part of a random split.

    Raises:
        SourceError: everything that is wrong with it, with file and row.
    """
    listing = _open(source)
    if source.test_fraction is None:
        return listing
    if not listing.random_access:
        raise SourceError([f"{source.kind} source: a stream cannot be split at random; set streaming=false"])
    numbers = split_numbers(len(listing), source.test_fraction, source.split_seed, source.part)
    if not len(numbers):
        raise SourceError([f"{source.kind} source: test_fraction={source.test_fraction:g} of its {len(listing)} rows "
                           f"leaves nothing for part {source.part}"])  # fmt: skip
    return listing.select(numbers)


def _open(source: AnySource) -> Listing:
    match source:
        case TableSource(kind="jsonl" | "csv" | "tsv"):
            return open_manifest(source)
        case TableSource():
            return open_table(source)
        case FolderSource():
            return open_folder(source)
        case HubSource():
            from asr_train.data.hub import open_hub  # noqa: PLC0415 - datasets imports torch, which takes seconds

            return open_hub(source)
        case DemoSource():
            return _demo(source)


def _demo(source: DemoSource) -> Listing:
    """The synthetic corpus: each row is spoken when it is prepared."""
    from asr_train.data.demo import demo_rows  # noqa: PLC0415 - needs the extra `demo`

    rows = demo_rows(source.split)
    table = make_table({"id": row.id, "text": row.text, "source": f"demo/{source.split}"} for row in rows)
    return Listing(table=table, audio=lambda _, numbers: (SpokenAudio(rows[number]) for number in numbers))
