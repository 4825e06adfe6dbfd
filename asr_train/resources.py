"""Files that ship with the project, found by name: from a checkout, an editable install, or a wheel."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_ROOTS = (_PACKAGE.parent, _PACKAGE / "share")  # a checkout; an installed wheel


def shipped(folder: str, suffix: str = ".yaml") -> dict[str, Path]:
    """Name -> path of every file that ships in a folder (`recipes`, `accelerate_configs`)."""
    for root in _ROOTS:
        if (root / folder).is_dir() and (root is not _PACKAGE.parent or (root / "pyproject.toml").exists()):
            return {path.stem: path for path in sorted((root / folder).glob(f"*{suffix}"))}
    return {}


def find(folder: str, name: str, suffix: str = ".yaml") -> Path:
    """A path as given, or the shipped file of that name.

    Raises:
        FileNotFoundError: neither exists; the message lists the names that ship.
    """
    given = Path(name).expanduser()
    if given.is_file():
        return given
    known = shipped(folder, suffix)
    stem = name.removesuffix(suffix)
    if stem in known:
        return known[stem]
    hint = f"; did you mean {given}{suffix}?" if Path(f"{given}{suffix}").is_file() else ""
    raise FileNotFoundError(f"no file {name!r}, and no shipped one of that name in {folder}: {', '.join(known)}{hint}")
