"""What `prepare` reports: rows, hours and refusals of each set, texts before and after, the vocabulary."""

import io
from collections import Counter
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from asr_train.data.text import Vocabulary

_WIDTH = 120  # of summary.txt


def render(summary: dict[str, Any], width: int = _WIDTH) -> str:
    """A summary as text, in lines of at most `width` characters."""
    stream = io.StringIO()
    console = Console(file=stream, width=width)
    console.print(_sets(summary))
    if any(entry["rejected"] for entry in summary["sets"].values()):
        console.print(_reasons(summary))
    console.print(_texts(summary))
    tokens = " ".join(shown(token) for token in summary["vocabulary"]["tokens"])
    console.print(Text(f"vocabulary: {len(summary['vocabulary']['tokens'])} tokens: {tokens}"))
    if summary["unknown_characters"]:
        listed = ", ".join(f"{shown(key)} x{count}" for key, count in summary["unknown_characters"].items())
        console.print(Text(f"training characters outside the vocabulary: {listed}"))
    return stream.getvalue()


def unknown_counts(counts: Counter[str], vocabulary: Vocabulary) -> dict[str, int]:
    """Characters of the training texts that a vocabulary lacks, most frequent first."""
    return {key: count for key, count in counts.most_common() if vocabulary.unknown(key)}


def shown(token: str) -> str:
    """A token for people: characters without a shape as their code point."""
    visible = token.isprintable() and not token.isspace()
    return token if visible else " ".join(f"U+{ord(character):04X}" for character in token)


def _sets(summary: dict[str, Any]) -> Table:
    table = Table(title="sets", title_justify="left")
    for name in ("set", "rows kept", "hours", "rows refused", "refused %"):
        table.add_column(name, justify="left" if name == "set" else "right")
    for name, entry in summary["sets"].items():
        refused = sum(entry["rejected"].values())
        share = f"{100 * refused / max(1, entry['rows'] + refused):.2f}"
        table.add_row(name, f"{entry['rows']:,}", f"{entry['hours']:.2f}", f"{refused:,}", share)
    return table


def _reasons(summary: dict[str, Any]) -> Table:
    table = Table(title="refused rows", title_justify="left")
    for name in ("set", "reason", "rows", "for example"):
        table.add_column(name, justify="right" if name == "rows" else "left")
    for name, entry in summary["sets"].items():
        for reason, count in entry["rejected"].items():
            table.add_row(name, reason, f"{count:,}", Text(entry["examples"][reason]))
    return table


def _texts(summary: dict[str, Any]) -> Table:
    table = Table(title="texts", title_justify="left")
    table.add_column("as it came")
    table.add_column("normalised")
    for raw, text in summary["texts"]:
        table.add_row(Text(raw), Text(text))
    return table
