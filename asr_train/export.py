"""Export a run's model as a folder that transformers loads: `python -m asr_train.export RUN`.

Written aside, loaded again with transformers and compared bit by bit, and only then given its name.
"""

import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from transformers import AutoModelForCTC, AutoProcessor

from asr_train.arguments import export_parser
from asr_train.errors import EXIT_DONE, ModelError, RunError, WavefleetError, run_main
from asr_train.files import publish_dir, write_json, write_text
from asr_train.geometry import SAMPLE_RATE
from asr_train.model_card import model_card, public_recipe
from asr_train.run_dir import environment, read_metrics
from asr_train.strategy import keep_deepspeed_from_guessing
from asr_train.trained import Trained, load_trained

_RECORD = "export.json"  # also marks a folder as ours to replace


@dataclass(frozen=True)
class Exported:
    """Where a model is now."""

    folder: Path
    step: int
    url: str | None  # on the hub, when it was pushed

    def __fspath__(self) -> str:
        return str(self.folder)


def export(
    run_dir: Path, out: Path | None = None, *, checkpoint: str = "best", push_to_hub: str | None = None
) -> Exported:
    """Write a run's model, processor and model card to a folder, compare them with what was trained, and publish.

    Args:
        run_dir: the run.
        out: the folder; RUN/export when None. An earlier export there is replaced when the new one is whole.
        checkpoint: `best`, `newest`, or the path of a checkpoint.
        push_to_hub: name of a repository, `me/my-model` say; the token is the hub's own login or `HF_TOKEN`.

    Raises:
        RunError: no run directory, or `out` holds something else.
        CheckpointError: no such checkpoint.
        ModelError: what was written does not load to the same model.
        WavefleetError: it could not be written; or the hub refused, the local folder is complete.
    """
    final = (run_dir / "export" if out is None else out).absolute()
    if final.exists() and not (final / _RECORD).exists() and (not final.is_dir() or any(final.iterdir())):
        raise RunError(f"{final} exists and is no export of this program; choose another --out, or delete it")
    trained = load_trained(run_dir, checkpoint)
    aside = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    try:
        _write(trained, aside)
        check_export(trained, aside)
        _replace(aside, final)
    except SafetensorError as error:  # of a full disk; no OSError
        raise WavefleetError(f"{final} could not be written: {error}; what was there before is untouched") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return Exported(final, trained.checkpoint.step, None if push_to_hub is None else push(final, push_to_hub))


def check_export(trained: Trained, folder: Path) -> None:
    """Load a folder as its users will, and compare weights, logits and text with the trained model, bit by bit.

    Raises:
        ModelError: something differs.
    """
    automatic_model: Any = AutoModelForCTC
    automatic_processor: Any = AutoProcessor
    ours, vocabulary = trained.model.hf, trained.corpus.vocabulary
    loaded = automatic_model.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=ours.config._attn_implementation
    ).eval()
    processor = automatic_processor.from_pretrained(folder)

    expected, found = ours.state_dict(), loaded.state_dict()
    wrong = [name for name in expected | found if not _is_same(expected.get(name), found.get(name))]
    noise = torch.randn(2 * SAMPLE_RATE, generator=torch.Generator().manual_seed(0)) * 0.1
    values = processor(audio=noise.numpy(), sampling_rate=SAMPLE_RATE, return_tensors="pt").input_values
    with torch.no_grad():
        our_logits, their_logits = ours(values).logits[0], loaded(values).logits[0]
    if not torch.equal(our_logits, their_logits):
        wrong.append("logits")
    # each class in turn, twice: repeats are grouped, blanks dropped, delimiters made spaces
    every = torch.arange(vocabulary.size).repeat_interleave(2)
    labels = torch.cat([our_logits.argmax(-1), every]).tolist()
    if processor.tokenizer.decode(labels) != vocabulary.decode_frames(labels):
        wrong.append("text")
    if wrong:
        raise ModelError(f"the exported model is not the trained one; these differ: {', '.join(wrong)}")


def push(folder: Path, repository: str) -> str:
    """Upload an export to the Hugging Face hub; its address.

    Raises:
        WavefleetError: the hub refused.
    """
    hub = HfApi()
    try:
        url = hub.create_repo(repo_id=repository, exist_ok=True)
        hub.upload_folder(repo_id=repository, folder_path=folder, commit_message="Model trained with Wavefleet")
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise WavefleetError(
            f"{folder} is complete, but could not be pushed to {repository!r}: {error}\n"
            "Log in with `hf auth login` or set HF_TOKEN, to an account that may write there, and export again."
        ) from error
    return str(url)


def main(argv: Sequence[str]) -> int:
    """Command line of export."""
    arguments = export_parser().parse_intermixed_args(argv)
    done = export(arguments.run, arguments.out, checkpoint=arguments.checkpoint, push_to_hub=arguments.push_to_hub)
    print(f"{done.folder}: the model of step {done.step}, loaded again and equal")
    if done.url is not None:
        print(done.url)
    return EXIT_DONE


def _write(trained: Trained, folder: Path) -> None:
    """Everything that belongs into the folder."""
    shutil.copytree(trained.corpus.processor_dir, folder)
    keep_deepspeed_from_guessing()
    trained.model.hf.save_pretrained(folder)
    step = trained.checkpoint.step
    scores = {line["set"]: line for line in read_metrics(trained.run) if "set" in line and line["step"] == step}
    versions = environment()["versions"]
    write_text(folder / "README.md", model_card(trained, scores, versions))
    write_text(folder / "recipe.yaml", public_recipe(trained.recipe))
    write_json(
        folder / _RECORD,
        {"format": 1, "name": trained.recipe.name, "step": step, "scores": scores, "versions": versions},
    )


def _replace(aside: Path, final: Path) -> None:
    """Give a finished folder its name; what was there goes away only then."""
    old = aside.with_suffix(".old")
    if final.exists():
        final.rename(old)
    publish_dir(aside, final)
    shutil.rmtree(old, ignore_errors=True)


def _is_same(first: torch.Tensor | None, second: torch.Tensor | None) -> bool:
    return first is not None and second is not None and first.dtype == second.dtype and torch.equal(first, second)


if __name__ == "__main__":
    sys.exit(run_main(main))
