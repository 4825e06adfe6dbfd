"""Transcripts: normalisation, and characters to label ids and back. No torch, no transformers."""

import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from asr_train.config import TextSettings
from asr_train.errors import CorpusError

APOSTROPHES = "'\u2019\u02bc\uff07"  # typewriter, typographic, modifier letter, full width
_CASES: dict[str, Callable[[str], str]] = {"upper": str.upper, "lower": str.lower, "keep": str}


class Normaliser:
    """A transcript as it is learnt: unicode form, letter case, removed characters, single spaces.

    Removal comes last, so that `remove` is compared with characters as they then are; a character given to `remove`
    in another case or form counts as well.
    """

    def __init__(self, settings: TextSettings) -> None:
        self._settings = settings
        removed = set(settings.remove) | (set(APOSTROPHES) if settings.remove_apostrophes else set())
        formed = (self._formed(character) for character in sorted(removed))
        removed |= {text for text in formed if len(text) == 1}
        self._removed = dict.fromkeys(map(ord, removed))

    def __call__(self, text: str) -> str:
        """The normalised text; may be empty."""
        text = self._formed(text).translate(self._removed)
        if self._settings.remove_digits:
            text = "".join(character for character in text if not character.isdigit())
        return " ".join(text.split())

    def _formed(self, text: str) -> str:
        form = self._settings.unicode_form
        cased = _CASES[self._settings.case](unicodedata.normalize(form, text))
        return unicodedata.normalize(form, cased)  # a change of case can leave the form


@dataclass(frozen=True)
class Vocabulary:
    """Tokens and their ids, with the text that `Wav2Vec2CTCTokenizer` of the same tokens would give.

    `pad` is the CTC blank. Tokens of several characters, as some pretrained tokenizers have them, are taken longest
    first, as transformers does; unlike there, the spaces around them stay.
    """

    tokens: tuple[str, ...]  # index = id
    pad: str = "[PAD]"
    unk: str | None = "[UNK]"
    word_delimiter: str = "|"
    bos: str | None = None
    eos: str | None = None
    do_lower_case: bool = False  # transformers' meaning: text is upper-cased to encode, lower-cased when decoded

    def __post_init__(self) -> None:
        missing = [token for token in (self.pad, self.unk, self.word_delimiter) if token and token not in self._ids]
        if missing:
            raise CorpusError(f"the vocabulary lacks {', '.join(missing)} among its {len(self.tokens)} tokens")
        if len(self._ids) != len(self.tokens):
            twice = sorted({token for token in self.tokens if self.tokens.count(token) > 1})
            raise CorpusError(f"the vocabulary has these tokens twice: {', '.join(twice)}")

    @classmethod
    def build(cls, texts: Iterable[str]) -> Self:
        """The characters of normalised training texts. The blank has id 0, as cuDNN's CTC wants it.

        Raises:
            CorpusError: a text holds the word delimiter or a special token, which could not be told apart.
        """
        characters: set[str] = set()
        collisions: dict[str, str] = {}  # what collides -> the first text with it
        for text in texts:
            characters.update(text)
            for token in ("|", "[PAD]", "[UNK]"):
                if token in text:
                    collisions.setdefault(token, text)
        if collisions:
            raise CorpusError(collision_message(collisions))
        return cls(("[PAD]", "[UNK]", "|", *sorted(characters - {" "})))

    @classmethod
    def from_tokenizer_dir(cls, path: Path) -> Self:
        """The vocabulary of a folder that a transformers CTC tokenizer or processor was saved to.

        Raises:
            CorpusError: no vocab.json, ids with holes, or special tokens that this program has no use for.
        """
        try:
            ids = json.loads((path / "vocab.json").read_text(encoding="utf-8"))
            config = json.loads((path / "tokenizer_config.json").read_text(encoding="utf-8"))
            if not (isinstance(ids, dict) and isinstance(config, dict)):
                raise ValueError("vocab.json and tokenizer_config.json should be objects")
        except (OSError, ValueError) as error:
            raise CorpusError(f"{path} is not the folder of a saved CTC tokenizer: {error}") from None
        if config.get("target_lang") is not None:
            ids = ids[config["target_lang"]]
        by_id = {number: token for token, number in ids.items()}
        for number, token in config.get("added_tokens_decoder", {}).items():
            by_id.setdefault(int(number), token["content"])
        if sorted(by_id) != list(range(len(by_id))):
            holes = sorted(set(range(max(by_id, default=0))) - set(by_id))[:10]
            raise CorpusError(f"{path / 'vocab.json'}: ids should count from 0 without holes; missing: {holes}")
        if config.get("replace_word_delimiter_char", " ") != " ":
            raise CorpusError(f"{path}: words are joined by {config['replace_word_delimiter_char']!r}, not by a space")
        special = {name: _token(config.get(f"{name}_token")) for name in ("pad", "unk", "bos", "eos")}
        known = {name: token if token in ids or token in by_id.values() else None for name, token in special.items()}
        return cls(
            tokens=tuple(by_id[number] for number in range(len(by_id))),
            pad=known["pad"] or "<pad>",
            unk=known["unk"],
            word_delimiter=_token(config.get("word_delimiter_token")) or "|",
            bos=known["bos"],
            eos=known["eos"],
            do_lower_case=bool(config.get("do_lower_case", False)),
        )

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """What `to_json` gave."""
        return cls(**{**value, "tokens": tuple(value["tokens"])})

    def to_json(self) -> dict[str, Any]:
        """Plain values, for a JSON file."""
        return {**asdict(self), "tokens": list(self.tokens)}

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {token: number for number, token in enumerate(self.tokens)}

    @cached_property
    def _pieces(self) -> re.Pattern[str]:
        """One token or one character; longer tokens first."""
        long = sorted((token for token in self.tokens if len(token) > 1), key=len, reverse=True)
        return re.compile("|".join([*map(re.escape, long), "."]), re.DOTALL)

    @property
    def size(self) -> int:
        """Number of tokens: the width of a model's head."""
        return len(self.tokens)

    @property
    def blank_id(self) -> int:
        """Id of the CTC blank."""
        return self._ids[self.pad]

    @property
    def unk_id(self) -> int | None:
        """Id of the unknown token, if there is one."""
        return None if self.unk is None else self._ids[self.unk]

    @property
    def special(self) -> frozenset[str]:
        """Tokens that are no text: blank, unknown, word delimiter, begin and end."""
        return frozenset({self.pad, self.unk, self.word_delimiter, self.bos, self.eos} - {None})  # type: ignore[arg-type]

    def _split(self, text: str) -> list[str]:
        text = text.upper() if self.do_lower_case else text
        return self._pieces.findall(text.replace(" ", self.word_delimiter))

    def encode(self, text: str) -> list[int]:
        """Label ids of a normalised text; characters it lacks become the unknown token.

        Raises:
            CorpusError: a character is lacking, and so is an unknown token.
        """
        pieces = self._split(text)
        if self.unk is None and (lacking := self.unknown(text)):
            raise CorpusError(f"no token for {' '.join(lacking)} in {text!r}, and the vocabulary has no unknown token")
        return [self._ids.get(piece, -1 if self.unk_id is None else self.unk_id) for piece in pieces]

    def unknown(self, text: str) -> list[str]:
        """Characters of a normalised text that it lacks, in order, once each."""
        return list(dict.fromkeys(piece for piece in self._split(text) if piece not in self._ids))

    def without_unknown(self, text: str) -> str:
        """A normalised text without the characters that it lacks."""
        return " ".join(self._text(piece for piece in self._split(text) if piece in self._ids).split())

    def collisions(self, text: str) -> list[str]:
        """Special tokens, and the word delimiter, that stand in a text as if they were text."""
        return sorted(token for token in self.special if token in text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of label ids: no grouping, blanks dropped."""
        return self._text(self.tokens[number] for number in ids)

    def decode_frames(self, frame_ids: Sequence[int] | npt.NDArray[np.integer]) -> str:
        """Text of the best id of each frame: repeats grouped, then blanks dropped (greedy CTC)."""
        return self._text(self.tokens[int(number)] for number, _ in groupby(frame_ids))

    def _text(self, tokens: Iterable[str]) -> str:
        spaced = (" " if token == self.word_delimiter else token for token in tokens if token != self.pad)
        text = "".join(spaced).strip()
        return text.lower() if self.do_lower_case else text


def collision_message(collisions: dict[str, str]) -> str:
    """What to say of texts with the word delimiter or a special token in them."""
    listed = "".join(f"\n  {token!r} in {text!r}" for token, text in sorted(collisions.items()))
    remedy = "remove these characters (text.remove) or mend the transcripts"
    return f"transcripts hold tokens that mean something else to the model; {remedy}:{listed}"


def _token(value: str | dict[str, Any] | None) -> str | None:
    """A token in a tokenizer's config: a string, or an AddedToken's fields."""
    return value["content"] if isinstance(value, dict) else value
