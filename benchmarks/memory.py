"""Predicted against measured memory of training: the tensors that autograd keeps for the backward pass of a unit.

The prediction is `asr_train.memory_estimate`'s, from the config alone. Measured are real forward passes of the real
models, random weights, by hooks that see every saved tensor: each storage once, parameters left out. With gradient
checkpointing the largest part that the backward pass makes anew is added, counted in the same way by running that
layer alone. On a GPU, whole steps are run too, and torch's own peak is held against the predicted total.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from measuring import hardware, markdown, shown_bars, versions

from asr_train.errors import run_main
from asr_train.geometry import SAMPLE_RATE
from asr_train.memory_estimate import MemorySettings, UnitShape, memory

RESULTS = Path(__file__).resolve().parent / "results" / "memory.json"
BAR_PERCENT = 10
LARGE = {
    "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096,
    "feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "wav2vec2 base": ("wav2vec2", {}),
    "wav2vec2 large": ("wav2vec2", LARGE),
    "hubert base": ("hubert", {}),
    "wavlm base": ("wavlm", {}),
}
JUDGED = ("wav2vec2 base", "wav2vec2 large")
SHAPES = ((1, 2.0), (2, 1.0), (4, 0.5))  # utterances, seconds each: forward passes alone, yet bf16 is slow on many CPUs
TINY = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64, "conv_dim": [32] * 7,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
SMOKE_SHAPES = ((2, 0.5),)
GPU_SHAPES = ((1, 30.0), (8, 15.0), (40, 5.0))


@dataclass(frozen=True)
class Case:
    """One way of training one unit."""

    model: str
    checkpointing: bool
    frozen: bool
    precision: str
    attention: str
    utterances: int
    seconds: float

    @property
    def shape(self) -> UnitShape:
        """The unit."""
        return UnitShape(self.utterances, round(self.seconds * SAMPLE_RATE))


def main(argv: Sequence[str]) -> int:
    """Count, write, print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="tiny models of the same kinds: seconds")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the JSON goes")
    options = parser.parse_args(argv)
    import torch  # noqa: PLC0415

    torch.manual_seed(0)
    rows = []
    for name in MODELS:
        for frozen in (True, False):
            print(f"{name}, feature encoder {'frozen' if frozen else 'trained'} ...", file=sys.stderr, flush=True)
            rows += _of_model(name, frozen=frozen, smoke=options.smoke)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    result = {
        "smoke": options.smoke, "gpu": gpu, "hardware": hardware(), "versions": versions("torch", "transformers"),
        "rows": rows, "bars": bars(rows),
    }  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(render(result))
    return 0


def _of_model(name: str, *, frozen: bool, smoke: bool) -> list[dict[str, Any]]:
    """All cases of one model and one state of its feature encoder."""
    import torch  # noqa: PLC0415

    shapes = SMOKE_SHAPES if smoke else SHAPES if name in JUDGED else SHAPES[:1]
    kinds = [("fp32", "sdpa"), ("bf16", "sdpa"), ("fp32", "eager")] if name in JUDGED else [("fp32", "sdpa")]
    rows = []
    for attention in dict.fromkeys(attention for _, attention in kinds):
        model = make_model(name, frozen=frozen, attention=attention, tiny=smoke)
        config = model.hf.config.to_dict()
        for precision, _ in [kind for kind in kinds if kind[1] == attention]:
            for checkpointing in (False, True):
                set_checkpointing(model, checkpointing)
                for utterances, seconds in shapes if attention == "sdpa" else shapes[:1]:
                    case = Case(name, checkpointing, frozen, precision, attention, utterances, seconds)
                    measured = sum(measure(model, case))
                    found = memory(config, case.shape, settings_of(case, "cpu"))
                    predicted = found.saved + found.recomputed
                    rows.append({**asdict(case), "predicted": predicted, "measured": measured})
        if torch.cuda.is_available() and not smoke:
            rows += _on_gpu(model, name, frozen=frozen, attention=attention)
        del model
    return rows


def settings_of(case: Case, device: Any) -> MemorySettings:
    """What the estimate is told."""
    return MemorySettings(
        precision=case.precision,  # type: ignore[arg-type]
        gradient_checkpointing=case.checkpointing,
        feature_encoder_frozen=case.frozen,
        attention=case.attention,
        device=device,
    )


def make_model(name: str, *, frozen: bool, attention: str, tiny: bool = False) -> Any:
    """The training program's own model, of a kind, with random weights and transformers' dropouts; masks on."""
    from transformers import AutoConfig, AutoModelForCTC  # noqa: PLC0415

    from asr_train.data.spec_augment import MaskSettings  # noqa: PLC0415
    from asr_train.speech_model import SpeechModel  # noqa: PLC0415

    architecture, fields = MODELS[name]
    config = AutoConfig.for_model(architecture, vocab_size=32, **{**fields, **(TINY if tiny else {})})
    if architecture == "wavlm":
        attention = "eager"  # it has its own, as `model.build_model` says
    hf = AutoModelForCTC.from_config(config, attn_implementation=attention)
    masks = MaskSettings(
        time_prob=0.05, time_length=10, time_min_masks=2, feature_prob=0.0, feature_length=10, feature_min_masks=0
    )
    model = SpeechModel(
        hf, normalize=True, takes_attention_mask=config.feat_extract_norm == "layer", masks=masks, layerdrop=0.1
    )
    if frozen:
        model.freeze_feature_encoder()
    return model.train()


def set_checkpointing(model: Any, on: bool) -> None:
    """Gradient checkpointing as the recipe's field sets it."""
    hf = model.hf
    if on:
        enable = getattr(hf, "activation_checkpointing_enable", None) or hf.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    else:
        (getattr(hf, "activation_checkpointing_disable", None) or hf.gradient_checkpointing_disable)()


def measure(model: Any, case: Case) -> tuple[int, int]:
    """Bytes saved at the end of a unit's forward pass, and the most that a checkpointed layer saves when run again."""
    import torch  # noqa: PLC0415

    calls: dict[str, Any] = {}

    def remember(name: str) -> Any:
        def hook(module: Any, args: Any, kwargs: Any) -> None:
            calls.setdefault(name, (module, args, kwargs))

        return hook

    firsts = {"layer": model._layers()[0], "convolution": model.hf.base_model.feature_extractor.conv_layers[0]}
    hooks = [module.register_forward_pre_hook(remember(name), with_kwargs=True) for name, module in firsts.items()]
    with count_saved(model) as saved:
        forward(model, case, torch.device("cpu"))
    for hook in hooks:
        hook.remove()
    if not case.checkpointing:
        return saved.bytes, 0
    again = []
    for name, (module, args, kwargs) in calls.items():
        if name == "convolution" and case.frozen:
            continue
        module.gradient_checkpointing = False
        inputs = tuple(arg.detach().requires_grad_() if isinstance(arg, torch.Tensor) else arg for arg in args)
        with count_saved(model, inputs) as inside, autocast("cpu", case.precision):
            module(*inputs, **kwargs)
        module.gradient_checkpointing = True
        again.append(inside.bytes)
    return saved.bytes, max(again)


def forward(model: Any, case: Case, device: Any) -> Any:
    """Forward pass and loss of a unit of noise, as the training loop runs them."""
    import torch  # noqa: PLC0415

    from asr_train.loss import ctc_losses  # noqa: PLC0415

    utterances, samples = case.utterances, case.shape.padded_samples
    lengths = np.full(utterances, samples, dtype=np.int64) - 320 * (np.arange(utterances) % 5)
    frames = model.geometry.num_frames(samples)
    num_labels = max(1, int(0.3 * frames))
    with autocast(device.type, case.precision):
        logits = model(
            torch.zeros(utterances, samples, device=device),
            torch.tensor(lengths),
            time_mask=torch.zeros(utterances, frames, dtype=torch.bool, device=device),
            keep_layers=torch.ones(model.num_layers, dtype=torch.bool, device=device),
        )
    losses, _ = ctc_losses(
        logits,
        torch.tensor(model.geometry.num_frames(lengths)),
        torch.ones(utterances * num_labels, dtype=torch.int64, device=device),
        torch.full((utterances,), num_labels),
        0,
    )
    return losses.sum()


def autocast(device: str, precision: str) -> Any:
    """Autocast as accelerate sets it for a recipe's precision."""
    import torch  # noqa: PLC0415

    kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return torch.autocast(device, dtype=kind if precision != "fp32" else None, enabled=precision != "fp32")


class count_saved:  # noqa: N801  a context, used like a function
    """Counts the bytes of all tensors that autograd saves inside: each storage once, without the model's own.

    Attributes:
        bytes: so far.
    """

    def __init__(self, model: Any, others: Sequence[Any] = ()) -> None:
        import torch  # noqa: PLC0415

        own = [*model.parameters(), *model.buffers(), *(each for each in others if isinstance(each, torch.Tensor))]
        self.bytes = 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in own}
        self._kept: list[Any] = []  # so that no storage's address is given to another
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def __enter__(self) -> "count_saved":
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)
        self._kept.clear()

    def _pack(self, tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self._kept.append(tensor)
            self.bytes += storage.nbytes()
        return tensor


def _on_gpu(model: Any, name: str, *, frozen: bool, attention: str) -> list[dict[str, Any]]:
    """Torch's peak of whole steps, optimizer included, beside the predicted total; bf16 and fp32."""
    import torch  # noqa: PLC0415

    from asr_train.config import OptimSettings  # noqa: PLC0415
    from asr_train.optim import build_optimizer  # noqa: PLC0415

    device = torch.device("cuda")
    model.to(device)
    optimizer = build_optimizer(model, OptimSettings())
    rows = []
    for precision in ("fp32", "bf16"):
        for checkpointing in (False, True):
            set_checkpointing(model, checkpointing)
            for utterances, seconds in GPU_SHAPES:
                case = Case(name, checkpointing, frozen, precision, attention, utterances, seconds)
                for _ in range(2):  # the first makes gradients and Adam's state
                    torch.cuda.reset_peak_memory_stats()
                    forward(model, case, device).backward()
                    optimizer.step()
                    for parameter in model.parameters():
                        if parameter.grad is not None:
                            parameter.grad.zero_()
                predicted = memory(model.hf.config.to_dict(), case.shape, settings_of(case, "cuda")).total
                peak = torch.cuda.max_memory_allocated()
                rows.append({**asdict(case), "on_gpu": True, "predicted": predicted, "measured": peak})
    model.to("cpu")
    return rows


# --- what is shown ----------------------------------------------------------------------------------------------


def difference(row: dict[str, Any]) -> float:
    """How far the prediction is off, in percent of what was measured."""
    return 100 * (row["predicted"] / row["measured"] - 1)


def bars(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Within so many percent in every case, for each model and precision."""
    entries = []
    for name in JUDGED:
        for precision in ("fp32", "bf16"):
            chosen = [row for row in rows if (row["model"], row["precision"]) == (name, precision)]
            found = max(abs(difference(row)) for row in chosen if not row.get("on_gpu"))
            entries.append((f"{name}, {precision}, CPU: largest difference, %", round(found, 2)))
    return [{"bar": bar, "at_most": BAR_PERCENT, "found": found, "met": found <= BAR_PERCENT} for bar, found in entries]


def render(result: dict[str, Any]) -> str:
    """The table, and the bars, as Markdown."""
    lines = []
    for row in result["rows"]:
        lines.append(
            [
                row["model"],
                "trained" if not row["frozen"] else "frozen",
                "on" if row["checkpointing"] else "off",
                row["precision"],
                row["attention"],
                "peak on the GPU" if row.get("on_gpu") else "saved",
                f"{row['utterances']} of {row['seconds']:g} s",
                f"{row['predicted'] / 1e6:,.1f}",
                f"{row['measured'] / 1e6:,.1f}",
                f"{difference(row):+.1f}",
            ]
        )
    columns = (
        "model", "feature encoder", "checkpointing", "precision", "attention", "what", "unit", "MB, predicted",
        "MB, measured", "%",
    )  # fmt: skip
    machine = result["hardware"]
    where = f"{machine['cpu']}, {machine['cores']} cores" + (f"; {result['gpu']}" if result["gpu"] else "; no GPU")
    about = f"{'Tiny models. ' if result['smoke'] else ''}{where}; torch {result['versions']['torch']}."
    return "\n".join([*markdown(columns, lines, num_left=6), "", about, "", *shown_bars(result["bars"])])


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(run_main(main))
