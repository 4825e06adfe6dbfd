"""A manifest with every kind of row that is refused."""

import json

import numpy as np
from conftest import RATE, encoded, speech, write_jsonl

TONE = speech("good text", 1.0)


def noise(seconds):
    return (0.1 * np.random.default_rng(0).standard_normal(round(seconds * RATE))).astype(np.float32)


# name -> bytes of the audio file (None: there is none), text, reason in training, reason in evaluation
BAD_ROWS = {
    "good": (encoded(TONE), "good text", None, None),
    "gone": (None, "good text", "missing file", "missing file"),
    "garbage": (b"garbage" * 99, "good text", "unreadable audio", "unreadable audio"),
    "cut": (encoded(noise(1))[:9_000], "good text", "truncated audio", "truncated audio"),
    "cut-flac": (encoded(noise(1), form="FLAC")[:9_000], "good text", "truncated audio", "truncated audio"),
    "empty": (encoded(TONE[:0]), "good text", "no samples", "no samples"),
    "nan": (encoded(np.append(TONE, np.float32(np.nan)), subtype="FLOAT"), "good text", "NaN", "NaN"),
    "silent": (encoded(0 * TONE), "good text", "silence", None),
    "short": (encoded(TONE[:800]), "go", "too short", None),
    "no-frame": (encoded(TONE[:300]), "g", "too short", None),
    "long": (encoded(noise(4)), "good text", "too long", None),
    "no-text": (encoded(TONE), None, "empty text", "empty text"),
    "only-removed": (encoded(TONE), " ?! ", "empty text", "empty text"),
    "crowded": (encoded(TONE[:4_000]), "oodd teg " * 3, "unalignable", None),
}


def bad_manifest(folder):
    folder.mkdir()
    rows = []
    for name, (data, text, _, _) in BAD_ROWS.items():
        if data is not None:
            (folder / f"{name}.wav").write_bytes(data)
        rows.append({"id": name, "audio": f"{name}.wav", "text": text})
    return str(write_jsonl(folder / "m.jsonl", rows))


def rejected(path):
    return [json.loads(line) for line in (path / "rejected.jsonl").open()]
