"""`python -m asr_train.data.telephone MANIFEST`: Debian's recorded telephone prompts as a manifest of JSON lines.

The packages asterisk-core-sounds-en-wav (8 kHz recordings of one speaker, 25 minutes) and asterisk-core-sounds-en
(their texts, `name: text` a line). What stands in brackets describes a sound and is not spoken: it is left out, so that
recordings of sounds alone have an empty text, which `prepare` refuses by name.
"""

import argparse
import gzip
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from asr_train.errors import EXIT_DONE, CorpusError, run_main
from asr_train.files import atomic_file

SOUNDS = Path("/usr/share/asterisk/sounds/en_US_f_Allison")
TEXTS = Path("/usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz")
_NOT_SPOKEN = re.compile(r"\[[^]]*\]|\([^)]*\)|<[^>]*>")


def rows(texts: Path, sounds: Path) -> Iterator[dict[str, str]]:
    """One row a line of the list of texts, in its order; and one, without a text, for each recording it lacks.

    Raises:
        CorpusError: a package is not installed.
    """
    if not texts.is_file() or not sounds.is_dir():
        missing = sounds if texts.is_file() else texts
        raise CorpusError(
            f"{missing} is not there; install the packages: apt-get install asterisk-core-sounds-en-wav "
            "asterisk-core-sounds-en"
        )
    with gzip.open(texts, "rt", encoding="utf-8") as lines:
        named = [line.strip().partition(":") for line in lines if ":" in line and not line.startswith(";")]
    for name, _, text in named:
        yield {"id": name, "audio_filepath": f"{name}.wav", "text": " ".join(_NOT_SPOKEN.sub(" ", text).split())}
    recorded = {path.relative_to(sounds).with_suffix("").as_posix() for path in sounds.rglob("*.wav")}
    for name in sorted(recorded - {name for name, _, _ in named}):
        yield {"id": name, "audio_filepath": f"{name}.wav", "text": ""}


def main(argv: Sequence[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="telephone", description="List recorded telephone prompts as JSON lines.")
    parser.add_argument("manifest", type=Path, help="the file to write")
    parser.add_argument("--sounds", type=Path, default=SOUNDS, help="folder of the recordings")
    parser.add_argument("--texts", type=Path, default=TEXTS, help="their texts, gzipped")
    arguments = parser.parse_args(argv)
    listed = list(rows(arguments.texts, arguments.sounds))
    with atomic_file(arguments.manifest, "w") as stream:
        stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in listed)
    print(f"{arguments.manifest}: {len(listed)} rows; audio_root is {arguments.sounds}")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(run_main(main))
