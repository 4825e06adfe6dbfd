"""`python benchmarks/unmasked.py`: what attention without a mask would change where a unit is padded, and how often.

The mask is left out where no frame of a unit is padding; why it stays where few are is in README.md.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from length_sets import LENGTH_SETS, length_set
from measuring import hardware, markdown, versions
from model_shapes import MODEL_SHAPES, TINY_SHAPE
from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

from asr_train.data.lengths import LengthIndex
from asr_train.data.plan import Plan, PlanSettings
from asr_train.errors import EXIT_DONE, run_main
from asr_train.estimate import quadratic_share
from asr_train.files import write_json
from asr_train.geometry import SAMPLE_RATE, FrameGeometry
from asr_train.speech_model import SpeechModel

RESULTS = Path(__file__).resolve().parent / "results" / "unmasked.json"
_NORMS = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}  # models that take a mask
_FRAMES = 499  # ten seconds
_PADDED_SHARES = (0.004, 0.01, 0.02)
_UNIT_S, _UNITS = 200, 480


def main(argv: Sequence[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="benchmarks/unmasked.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="a tiny model, few units: does it run?")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON file to write (default: %(default)s)")
    arguments = parser.parse_args(argv)
    shape = TINY_SHAPE if arguments.smoke else {**MODEL_SHAPES["base"], **_NORMS}
    config = Wav2Vec2Config(**shape, apply_spec_augment=False)
    result = {
        "benchmark": "unmasked",
        "smoke": arguments.smoke,
        "frames": _FRAMES,
        "hardware": hardware(),
        "versions": versions("wavefleet", "torch", "transformers", "numpy"),
        "changes": changes(config),
        "units": [units(name, config, 8 if arguments.smoke else _UNITS) for name in LENGTH_SETS],
    }
    write_json(arguments.out, result)
    print(render(result))
    print(f"written: {arguments.out}")
    return EXIT_DONE


def changes(config: Wav2Vec2Config) -> list[dict[str, Any]]:
    """How far an utterance's logits are from those that it has alone, of their norm: by padding, and by bf16 alone."""
    torch.manual_seed(0)
    model = SpeechModel(Wav2Vec2ForCTC(config), normalize=True, takes_attention_mask=True).eval()
    num_samples = model.geometry.receptive_samples + (_FRAMES - 1) * model.geometry.stride_samples
    wave = torch.randn(1, num_samples)
    length = torch.tensor([num_samples])
    with torch.no_grad():
        alone = model(wave, length)[:, :_FRAMES]

        def change(logits: torch.Tensor) -> float:
            return float((logits[:, :_FRAMES].float() - alone).norm() / alone.norm())

        with torch.autocast("cpu", dtype=torch.bfloat16):
            rows: list[dict[str, Any]] = [{"padded_share": 0.0, "bf16": change(model(wave, length))}]
        for share in _PADDED_SHARES:
            num_padded = round(share / (1 - share) * _FRAMES)
            padded = torch.nn.functional.pad(wave, (0, num_padded * model.geometry.stride_samples))
            with_mask, without = (change(model(padded, length, is_padded=is_padded)) for is_padded in (True, False))
            rows.append({"padded_share": share, "masked": with_mask, "unmasked": without})
    return rows


def units(name: str, config: Wav2Vec2Config, num_units: int) -> dict[str, Any]:
    """Of a set's units in an epoch, how many have no padded frame, and the share of frames that are padding."""
    geometry = FrameGeometry(kernels=tuple(config.conv_kernel), strides=tuple(config.conv_stride))
    mean_samples = float(np.mean(length_set(name, 1000)))
    lengths = length_set(name, round(num_units * _UNIT_S * SAMPLE_RATE / mean_samples)).astype(np.int64)
    settings = PlanSettings(
        unit_audio_s=_UNIT_S,
        unit_utterances=None,
        units_per_step=8,
        order="cost",
        quadratic=quadratic_share(config.to_dict()),
    )
    plan = Plan(LengthIndex.build(lengths), settings, 0)
    num_free, frames, padding = 0, 0, 0
    for step in range(plan.steps_per_epoch):
        for k in range(plan.num_units_in(0, step)):
            unit = plan.unit(0, step, k)
            longest = int(geometry.num_frames(unit.padded_samples))
            padded = int((longest - geometry.num_frames(lengths[unit.ids])).sum())
            num_free += padded == 0
            frames, padding = frames + longest * len(unit.ids), padding + padded
    return {"set": name, "units": plan.statistics().num_units, "unpadded": num_free, "padded_share": padding / frames}


def render(result: dict[str, Any]) -> str:
    """The tables, as Markdown."""
    rounding, *rows = result["changes"]
    lines = markdown(
        ("padded frames, %", "logits change with the mask, %", "without it, %"),
        [
            [f"{100 * row['padded_share']:.1f}", f"{100 * row['masked']:.0e}", f"{100 * row['unmasked']:.2f}"]
            for row in rows
        ],
        num_left=0,
    )
    lines += ["", f"bf16's rounding alone: {100 * rounding['bf16']:.2f} %.", ""]
    lines += markdown(
        ("lengths", "units of 200 s", "without a padded frame", "padded frames, %"),
        [
            [row["set"], str(row["units"]), str(row["unpadded"]), f"{100 * row['padded_share']:.1f}"]
            for row in result["units"]
        ],
    )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_main(main))
