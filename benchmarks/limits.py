"""`python benchmarks/limits.py`: how fast a GPU trains at most, what a step does, which units fit; from configs alone.

Counts FLOPs (asr_train/estimate.py) and bytes (asr_train/memory_estimate.py), and measures nothing; docs/performance.md
holds the tables.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from length_sets import length_set
from measuring import markdown
from model_shapes import MODEL_SHAPES
from transformers import Wav2Vec2Config

from asr_train.auto_unit import ESTIMATE_HEADROOM, worst_shapes
from asr_train.data.lengths import LengthIndex
from asr_train.data.plan import PlanSettings
from asr_train.errors import EXIT_DONE, run_main
from asr_train.estimate import ForwardFlops, quadratic_share, training_flops_per_s
from asr_train.memory_estimate import MemorySettings, UnitShape, memory

UTTERANCE_S = 14.8  # LibriSpeech's, weighted as attention weighs them
FRAMES_PER_S = 50
# TFLOP/s: dense products of 16-bit floats, accumulated in float32. The H200's was measured by products of large
# matrices; its data sheet says 989. The others are NVIDIA's data sheets': V100 (SXM2), A100, H100 (SXM), L40S.
PEAKS = {"V100 (fp16)": 125.0, "A100": 312.0, "L40S": 362.0, "H100": 989.0, "H200 (measured)": 788.0}
EXPECTED = {"base": 10_000, "large": 4_000, "xls-r-300m": 4_000}  # audio-s/s, benchmarks/gpu.py
EXPECTED_ON = "H200 (measured)"

# GB, of the data sheets. T4 and V100 have no bf16 units: fp16 there, which takes as many bytes.
MEMORY_GB = {
    "T4, V100 16 GB": 16, "RTX 3090, 4090": 24, "V100 32 GB": 32, "A100 40 GB": 40, "L40S": 48, "A100, H100 80 GB": 80,
    "H200": 141,
}  # fmt: skip
_CONTEXT_GB = 1.0  # CUDA's own, and its libraries'
_UNITS_S = (5, 10, 25, 50, 100, 150, 200, 300, 400, 600, 800, 1000)
_LENGTHS = "LibriSpeech-like"
_NUM_UTTERANCES = 4_000


def limit(gigaflops: float, gpu: str) -> float:
    """Audio-seconds a second at which a GPU's peak is reached."""
    return PEAKS[gpu] * 1000 / gigaflops


def rows() -> list[dict[str, Any]]:
    """A row a model: GFLOP a second of audio, their parts, and the limit on each GPU."""
    found = []
    for name, config in _configs().items():
        gigaflops, whole = (
            training_flops_per_s(config, utterance_s=UTTERANCE_S, feature_encoder_frozen=frozen) / 1e9
            for frozen in (True, False)
        )
        found.append(
            {
                "model": name,
                "gigaflops": gigaflops,
                "unfrozen_gigaflops": whole,
                "encoder_share": ForwardFlops.of(config).feature_encoder * FRAMES_PER_S / 1e9 / gigaflops,
                "attention_share": 1 - 1 / (1 + quadratic_share(config) * FRAMES_PER_S * UTTERANCE_S),
                "limits": {gpu: limit(gigaflops, gpu) for gpu in PEAKS},
                "expected_share": EXPECTED[name] / limit(gigaflops, EXPECTED_ON) if name in EXPECTED else None,
            }
        )
    return found


def parts(config: Mapping[str, Any]) -> dict[str, float]:
    """Shares of the arithmetic of a step, by what it is for; the feature encoder is frozen, so forward alone."""
    whole = ForwardFlops.of(config)
    # what is left when a part has no channels, or no layers, is not that part's
    no_feed_forward = ForwardFlops.of({**config, "intermediate_size": 0}).transformer
    no_layers = ForwardFlops.of({**config, "num_hidden_layers": 0}).transformer
    flops = {
        "feature encoder, forward": whole.feature_encoder,
        "feed-forward": 3 * (whole.transformer - no_feed_forward),
        "attention's projections": 3 * (no_feed_forward - no_layers),
        "attention's scores": 3 * whole.attention * FRAMES_PER_S * UTTERANCE_S,
        "positions, head": 3 * no_layers,
    }
    return {name: value / sum(flops.values()) for name, value in flops.items()}


def largest_units(config: Mapping[str, Any], *, gradient_checkpointing: bool) -> dict[str, int | None]:
    """GPU -> the largest unit, in seconds of audio, that is predicted to fit; None where not even the smallest does."""
    index = LengthIndex.build(length_set(_LENGTHS, _NUM_UTTERANCES))
    settings = MemorySettings(
        precision="bf16", gradient_checkpointing=gradient_checkpointing, feature_encoder_frozen=True
    )

    def bytes_of(shape: UnitShape) -> int:
        return memory(config, shape, settings).total

    needed = {}
    for unit_s in _UNITS_S:
        plan = PlanSettings(
            unit_audio_s=unit_s, unit_utterances=None, units_per_step=8, order="cost", quadratic=quadratic_share(config)
        )
        needed[unit_s] = max(map(bytes_of, worst_shapes(index, plan, 0, bytes_of)))
    found = {}
    for gpu, size_gb in MEMORY_GB.items():
        room = (size_gb - _CONTEXT_GB) * 1e9 * (1 - ESTIMATE_HEADROOM)
        found[gpu] = max((unit_s for unit_s in _UNITS_S if needed[unit_s] <= room), default=None)
    return found


def limits_table() -> str:
    """How fast at most, as Markdown."""
    headings = ["model", "GFLOP a second of audio", "feature encoder trained too", "feature encoder, %", "scores, %",
                *(f"limit, {gpu}" for gpu in PEAKS), "expected / limit, H200, %"]  # fmt: skip
    cells = [
        [
            row["model"],
            f"{row['gigaflops']:.0f}",
            f"{row['unfrozen_gigaflops']:.0f}",
            f"{100 * row['encoder_share']:.0f}",
            f"{100 * row['attention_share']:.0f}",
            *(f"{value:,.0f}" for value in row["limits"].values()),
            "" if row["expected_share"] is None else f"{100 * row['expected_share']:.0f}",
        ]
        for row in rows()
    ]
    return "\n".join(markdown(headings, cells))


def parts_table() -> str:
    """What the arithmetic of a step is for, as Markdown."""
    shares = {name: parts(config) for name, config in _configs().items()}
    kinds = next(iter(shares.values()))
    cells = [[kind, *(f"{100 * found[kind]:.0f}" for found in shares.values())] for kind in kinds]
    return "\n".join(markdown(["% of a step's FLOPs", *shares], cells))


def units_table() -> str:
    """Which units fit on which GPU, without and with gradient checkpointing, as Markdown."""
    columns = {}
    for name, config in _configs().items():
        without, with_it = (largest_units(config, gradient_checkpointing=is_on) for is_on in (False, True))
        columns[name] = {gpu: f"{_unit(without[gpu])} / {_unit(with_it[gpu])}" for gpu in MEMORY_GB}
    cells = [[gpu, *(column[gpu] for column in columns.values())] for gpu in MEMORY_GB]
    return "\n".join(markdown(["unit_audio_s, at most", *columns], cells))


def _unit(unit_s: int | None) -> str:
    return "\u2013" if unit_s is None else f"{unit_s:,}"


def _configs() -> dict[str, dict[str, Any]]:
    return {name: Wav2Vec2Config(**shape).to_dict() for name, shape in MODEL_SHAPES.items()}


def main(argv: Sequence[str]) -> int:
    """The command line: no arguments."""
    argparse.ArgumentParser(prog="benchmarks/limits.py", description=__doc__).parse_args(argv)
    print("\n\n".join((limits_table(), parts_table(), units_table())))
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(run_main(main))
