"""`python benchmarks/limits.py`: how fast a model could train if a GPU did nothing but its matrix products.

Counts FLOPs from the model's config (asr_train/estimate.py) and measures nothing. docs/performance.md holds the table.
"""

import sys
from collections.abc import Sequence
from typing import Any

from measuring import markdown
from model_shapes import MODEL_SHAPES
from transformers import Wav2Vec2Config

from asr_train.errors import EXIT_DONE, run_main
from asr_train.estimate import ForwardFlops, quadratic_share, training_flops_per_s

UTTERANCE_S = 14.8  # LibriSpeech's, weighted as attention weighs them
FRAMES_PER_S = 50
# TFLOP/s: dense products of 16-bit floats, accumulated in float32. The H200's was measured by products of large
# matrices; its data sheet says 989. The others are NVIDIA's data sheets': V100 (SXM2), A100, H100 (SXM), L40S.
PEAKS = {"V100 (fp16)": 125.0, "A100": 312.0, "L40S": 362.0, "H100": 989.0, "H200 (measured)": 788.0}
EXPECTED = {"base": 10_000, "large": 4_000, "xls-r-300m": 4_000}  # audio-s/s, benchmarks/gpu.py
EXPECTED_ON = "H200 (measured)"


def limit(gigaflops: float, gpu: str) -> float:
    """Audio-seconds a second at which a GPU's peak is reached."""
    return PEAKS[gpu] * 1000 / gigaflops


def rows() -> list[dict[str, Any]]:
    """A row a model: GFLOP a second of audio, their parts, and the limit on each GPU."""
    found = []
    for name, shape in MODEL_SHAPES.items():
        config = Wav2Vec2Config(**shape).to_dict()
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


def render() -> str:
    """The table, as Markdown."""
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


def main(_: Sequence[str]) -> int:
    """The command line: no arguments."""
    print(render())
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(run_main(main))
