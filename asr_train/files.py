"""The one place for atomic writes, append-only lines, and hashes."""

import errno
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Literal, Self

import xxhash

HashName = Literal["xxh3_128", "sha256"]
_HASHES: Final[dict[HashName, Callable[[], Any]]] = {"xxh3_128": xxhash.xxh3_128, "sha256": hashlib.sha256}
_CHUNK_BYTES = 1 << 20


def fsync_dir(path: Path) -> None:
    """Flush a directory's entries to disk, so that a rename in it survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Give an `OSError` of the block, of a full disk say, the file's name where the system gave none."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


@contextmanager
def atomic_file(path: Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a file that appears under `path` only when the block ends well: written aside, fsynced, renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with _naming(path), aside.open(mode, encoding=None if "b" in mode else "utf-8") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(aside, path)
        fsync_dir(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, in UTF-8."""
    with atomic_file(path, "w") as stream:
        stream.write(text)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically, indented, keys in the order given."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def append_jsonl(path: Path, record: dict[str, Any]) -> None:
    """Append one object as one line, in a single write, so that lines of several processes never mix.

    A torn last line, left by a full disk or a power cut, is closed first, so that it costs no other line.

    Raises:
        OSError: the disk is full; a part of the line may have been written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    line = (json.dumps(_finite(record), ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")
    with _naming(path), path.open("ab+", buffering=0) as stream:
        size = stream.seek(0, os.SEEK_END)
        if size:
            stream.seek(size - 1)
            if stream.read(1) != b"\n":
                line = b"\n" + line
        if stream.write(line) != len(line):  # the kernel takes what fits, and fails at the next write only
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _finite(value: Any) -> Any:
    """The value with null for numbers that JSON does not know: NaN and infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Read the objects of a JSON-lines file; torn lines, left by a full disk or a power cut, are passed over."""
    if not path.exists():
        return
    with path.open("rb") as stream:
        for line in stream:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            yield record


class HashedFile:
    """A new file that is hashed while it is written, and is on disk when the block ends well.

    Attributes:
        size: bytes written.
        failure: the operating system's refusal to write, which who writes may hide behind an error of its own.
    """

    def __init__(self, path: Path, algorithm: HashName) -> None:
        self.path = path
        self.size = 0
        self.failure: OSError | None = None
        self._hash = _HASHES[algorithm]()
        self._stream = path.open("xb", buffering=_CHUNK_BYTES)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            with suppress(OSError):  # of the write that failed already
                self._stream.close()
            return
        self.close()

    def write(self, data: Any) -> int:
        """Append bytes."""
        try:
            with _naming(self.path):
                num_bytes = self._stream.write(data)
        except OSError as error:
            self.failure = self.failure or error
            raise
        self._hash.update(data)
        self.size += num_bytes
        return num_bytes

    def tell(self) -> int:
        """Where the next byte goes."""
        return self.size

    def flush(self) -> None:
        """Nothing: a file is flushed when it is closed, once."""

    def close(self) -> None:
        """Flush, then fsync."""
        if self._stream.closed:
            return
        with _naming(self.path):
            self._stream.flush()
            os.fsync(self._stream.fileno())
            if hasattr(os, "posix_fadvise"):  # so that who reads it again reads the disk
                os.posix_fadvise(self._stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            self._stream.close()

    @property
    def digest(self) -> str:
        """Hash of what was written, in hex."""
        return str(self._hash.hexdigest())


def file_hash(path: Path, algorithm: HashName) -> str:
    """Hash of a file, in hex."""
    found = _HASHES[algorithm]()
    with path.open("rb", buffering=0) as stream:
        buffer = memoryview(bytearray(_CHUNK_BYTES))
        while num_bytes := stream.readinto(buffer):
            found.update(buffer[:num_bytes])
    return str(found.hexdigest())


def publish_dir(aside: Path, final: Path) -> None:
    """Give a finished directory its final name: fsync every file in it, rename, fsync the parent."""
    for path in sorted(aside.rglob("*")):
        if path.is_dir():
            fsync_dir(path)
        else:
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
    fsync_dir(aside)
    os.rename(aside, final)
    fsync_dir(final.parent)


def hash_json(value: Any) -> str:
    """SHA-256, in hex, of a JSON value; keys are sorted, so that their order does not matter."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
