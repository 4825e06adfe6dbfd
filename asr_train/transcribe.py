"""Transcribe files: `python -m asr_train.transcribe MODEL FILES|FOLDER`.

Audio of up to one window gives the text that `transformers.pipeline("automatic-speech-recognition")` gives for the same
16 kHz samples. Longer audio is computed in overlapping windows, each normalised by itself as the pipeline does, and
joined on frames (see `windows`).
"""

import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import soundfile
import torch
from rich.console import Console
from rich.progress import Progress

from asr_train.arguments import transcribe_parser
from asr_train.captions import Word, make_captions, to_srt, to_vtt, words_of_frames
from asr_train.data.audio import AudioError, load_audio
from asr_train.data.text import Vocabulary
from asr_train.errors import EXIT_DONE, EXIT_FAILED, RecipeError, run_main, say
from asr_train.files import write_text
from asr_train.geometry import SAMPLE_RATE
from asr_train.model import SpeechModel, load_exported
from asr_train.verbosity import is_quiet
from asr_train.windows import OVERLAP_S, WINDOW_S, FrameIds, Window, join_frames, make_windows

_WINDOWS_AT_ONCE = 8  # on a GPU: 4 minutes of audio fill it; a CPU gains nothing from more than one


@dataclass(frozen=True)
class Transcript:
    """What was said in a file, and when."""

    file: Path
    duration_s: float
    text: str
    words: tuple[Word, ...]


@dataclass(frozen=True)
class BadFile:
    """A file that cannot be transcribed, and why."""

    file: Path
    reason: str


class Transcriber:
    """Speech in, text out, with one model on one device."""

    def __init__(
        self,
        model: SpeechModel,
        vocabulary: Vocabulary,
        *,
        window_s: float = WINDOW_S,
        overlap_s: float = OVERLAP_S,
        device: torch.device | str = "cpu",
    ) -> None:
        receptive_s = model.geometry.receptive_samples / SAMPLE_RATE
        if not (window_s >= 1 and receptive_s <= overlap_s <= window_s / 2):
            raise RecipeError(
                f"--window-s {window_s:g} --overlap-s {overlap_s:g}: a window should have at least 1 s, and an overlap"
                f" at least a frame ({receptive_s:g} s) and at most half of a window"
            )
        self._model = model.to(device).eval()
        self._vocabulary = vocabulary
        self._device = device
        self._num_at_once = 1 if torch.device(device).type == "cpu" else _WINDOWS_AT_ONCE
        self._window_samples = round(window_s * SAMPLE_RATE)
        self._overlap_samples = round(overlap_s * SAMPLE_RATE)

    def frame_ids(self, waveform: npt.NDArray[np.float32]) -> FrameIds:
        """Best label of each frame, [F], of mono 16 kHz samples float32 [S]."""
        geometry = self._model.geometry
        if len(waveform) < geometry.receptive_samples:
            return np.zeros(0, dtype=np.int32)
        stride = geometry.stride_samples
        windows = make_windows(len(waveform), self._window_samples, self._overlap_samples, stride)
        frames: list[FrameIds] = [
            ids for batch in _of_equal_length(windows, self._num_at_once) for ids in self._best_labels(waveform, batch)
        ]
        quiet = [self._vocabulary.blank_id, self._vocabulary.tokens.index(self._vocabulary.word_delimiter)]
        return join_frames(windows, frames, quiet, stride)

    def text_and_words(self, waveform: npt.NDArray[np.float32]) -> tuple[str, list[Word]]:
        """The text of mono 16 kHz samples, and its words with times."""
        frame_ids = self.frame_ids(waveform)
        frame_s = self._model.geometry.stride_samples / SAMPLE_RATE
        return self._vocabulary.decode_frames(frame_ids), words_of_frames(frame_ids, self._vocabulary, frame_s)

    def _best_labels(self, waveform: npt.NDArray[np.float32], windows: Sequence[Window]) -> Iterator[FrameIds]:
        """Best labels of windows of equal length; no padding, for there are models whose outputs change with it."""
        pieces = [waveform[window.start : window.end] for window in windows]
        if self._model.normalize:
            # transformers' feature extractor, in its precision: Wav2Vec2FeatureExtractor.zero_mean_unit_var_norm
            pieces = [(piece - piece.mean()) / np.sqrt(piece.var() + 1e-7) for piece in pieces]
        values = torch.from_numpy(np.stack(pieces)).to(self._device)
        lengths = torch.full((len(pieces),), values.shape[1], dtype=torch.int64)
        with torch.no_grad():
            logits = self._model(values, lengths, is_padded=False)  # [B, F, V]
        yield from logits.argmax(dim=-1).to(torch.int32).cpu().numpy()


def transcribe(
    model_dir: Path, inputs: Sequence[Path], *, window_s: float = WINDOW_S, overlap_s: float = OVERLAP_S
) -> Iterator[Transcript | BadFile]:
    """Transcribe files, one after the other, on a GPU if there is one; a bad file does not end it.

    Args:
        model_dir: a folder saved by transformers, ours (`export`) or another's.
        inputs: audio files of any format, rate and number of channels.
        window_s: longer audio is computed in windows of this length.
        overlap_s: what two windows share, at most half of a window.

    Raises:
        ModelError: the folder holds no model of this kind.
    """
    model, vocabulary = load_exported(model_dir)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    transcriber = Transcriber(model, vocabulary, window_s=window_s, overlap_s=overlap_s, device=device)
    for file in inputs:
        try:
            waveform = load_audio(file)
        except AudioError as error:
            yield BadFile(file, str(error))
            continue
        text, words = transcriber.text_and_words(waveform)
        yield Transcript(file, len(waveform) / SAMPLE_RATE, text, tuple(words))


def find_audio(inputs: Sequence[Path]) -> dict[Path, Path]:
    """Files as given, and the audio files in folders; each with its name, or its path from that folder.

    Raises:
        RecipeError: a folder holds no audio files.
    """
    suffixes = {f".{name.lower()}" for name in soundfile.available_formats()} | {".aif", ".oga", ".opus"}
    found: dict[Path, Path] = {}
    for path in inputs:
        if not path.is_dir():
            found.setdefault(path, Path(path.name))
            continue
        inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in suffixes and file.is_file())
        if not inside:
            raise RecipeError(f"{path} holds no audio files ({', '.join(sorted(suffixes))})")
        for file in inside:
            found.setdefault(file, file.relative_to(path))
    return found


def render(transcript: Transcript, form: str) -> str:
    """A transcript as the content of a file: text, jsonl (one line), srt or vtt."""
    match form:
        case "text":
            return transcript.text + "\n"
        case "jsonl":
            words = [asdict(word) for word in _rounded(transcript.words)]
            line = {"file": str(transcript.file), "duration_s": round(transcript.duration_s, 3)}
            return json.dumps({**line, "text": transcript.text, "words": words}, ensure_ascii=False) + "\n"
        case "srt":
            return to_srt(make_captions(transcript.words))
        case _:
            return to_vtt(make_captions(transcript.words))


def main(argv: Sequence[str]) -> int:
    """Command line of transcribe."""
    arguments = transcribe_parser().parse_intermixed_args(argv)

    files = find_audio(arguments.inputs)
    targets = _targets(files, arguments.out, arguments.format) if arguments.out else {}
    results = transcribe(arguments.model, list(files), window_s=arguments.window_s, overlap_s=arguments.overlap_s)
    bad: list[BadFile] = []
    num_empty = 0
    for result in _with_progress(results, len(files), is_text_elsewhere=bool(targets) or not sys.stdout.isatty()):
        if isinstance(result, BadFile):
            bad.append(result)
            continue
        num_empty += not result.text
        if targets:
            write_text(targets[result.file], render(result, arguments.format))
        else:
            _print(result, arguments.format, is_only=len(files) == 1)
    if num_empty:
        why = "silence, or a model that has learnt too little"
        say(f"note: nothing was heard in {num_empty} of {len(files)} files: {why}")
    if bad:
        listed = "".join(f"\n  {item.file}: {item.reason}" for item in bad)
        print(f"error: {len(bad)} of {len(files)} files could not be transcribed:{listed}", file=sys.stderr)
    return EXIT_FAILED if bad else EXIT_DONE


def _with_progress(
    results: Iterator[Transcript | BadFile], total: int, *, is_text_elsewhere: bool
) -> Iterator[Transcript | BadFile]:
    """Show a bar on a terminal that the transcripts themselves do not go to."""
    console = Console(stderr=True)
    # rich would redirect stdout to the bar's console, and so take the transcripts out of a pipe
    with Progress(
        console=console,
        redirect_stdout=False,
        disable=is_quiet() or not (console.is_terminal and is_text_elsewhere),
    ) as progress:
        yield from progress.track(results, total=total, description="transcribing")


def _print(transcript: Transcript, form: str, *, is_only: bool) -> None:
    """Write to stdout; where there are several inputs, each text says whose it is."""
    if form == "text" and not is_only:
        sys.stdout.write(f"{transcript.file}\t")
    elif form in ("srt", "vtt") and not is_only:
        sys.stdout.write(f"==> {transcript.file} <==\n")
    sys.stdout.write(render(transcript, form))
    sys.stdout.flush()


def _targets(files: Mapping[Path, Path], out: Path, form: str) -> dict[Path, Path]:
    """Where each file's transcript goes: its name with another suffix, or with one more where two would collide."""
    suffix = ".txt" if form == "text" else f".{form}"
    replaced = Counter(name.with_suffix(suffix) for name in files.values())
    targets = {
        file: out / (name.with_suffix(suffix) if replaced[name.with_suffix(suffix)] == 1 else f"{name}{suffix}")
        for file, name in files.items()
    }
    uses = Counter(targets.values())
    if collisions := [file for file, target in targets.items() if uses[target] > 1]:
        listed = "".join(f"\n  {file}" for file in collisions)
        raise RecipeError(f"--out {out}: these files have the same name, and so would their transcripts:{listed}")
    return targets


def _of_equal_length(windows: Sequence[Window], num_at_once: int) -> Iterator[Sequence[Window]]:
    """Windows in batches; only the last one of a waveform has another length."""
    full = [window for window in windows if window.num_samples == windows[0].num_samples]
    for start in range(0, len(full), num_at_once):
        yield full[start : start + num_at_once]
    if len(full) < len(windows):
        yield windows[len(full) :]


def _rounded(words: Sequence[Word]) -> Iterator[Word]:
    for word in words:
        yield Word(word.text, round(word.start_s, 3), round(word.end_s, 3))


if __name__ == "__main__":
    sys.exit(run_main(main))
