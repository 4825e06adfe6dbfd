"""README and the pages of docs/, taken apart: code blocks, the commands in them, links."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parent.parent
COMMAND_PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [*COMMAND_PAGES, ROOT / "CHANGELOG.md", ROOT / "benchmarks" / "README.md"]
_NOT_RUN = re.compile(r"#(?:.*;)? not run: (.+)$")


@dataclass(frozen=True)
class Block:
    """A code block: its language, its text, and where it begins."""

    page: Path
    line: int
    language: str
    text: str

    @property
    def name(self) -> str:
        """For people: docs/data.md:12."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"


@dataclass(frozen=True)
class Command:
    """A line of a shell block without its remark, and why it is not run, if so."""

    text: str
    not_run: str | None

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text)


def parse(page: Path):
    return MarkdownIt("gfm-like", {"linkify": False}).parse(page.read_text(encoding="utf-8"))


def blocks(page: Path) -> list[Block]:
    """The fenced code blocks of a page; those of the generator, {toctree} say, are none."""
    fences = (token for token in parse(page) if token.type == "fence")
    found = [Block(page, token.map[0] + 1, token.info.strip(), token.content) for token in fences]
    return [block for block in found if not block.language.startswith("{")]


def commands(block: Block) -> list[Command]:
    """The commands of a shell block; `# not run: REASON` on a line of its own holds for all that follow in it."""
    found, reason = [], None
    for line in block.text.replace("\\\n", " ").splitlines():
        remark = _NOT_RUN.search(line)
        text = re.sub(r"(?:^|\s+)#\s.*$", "", line).strip()
        if not text:
            reason = remark[1] if remark else reason
        else:
            found.append(Command(text, remark[1] if remark else reason))
    return found


def links(page: Path) -> list[str]:
    """Where the links and pictures of a page lead."""
    inline = [child for token in parse(page) for child in token.children or []]
    return [
        str(child.attrs.get("href") or child.attrs.get("src"))
        for child in inline
        if child.type in ("link_open", "image")
    ]
