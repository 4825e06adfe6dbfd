"""What a training hands to the fast paths of model and optimizer, which give the same numbers without it."""

import numpy as np
from ranks import run_ranks

import asr_train.train
from asr_train.speech_model import SpeechModel


def test_units_without_padding_are_trained_without_a_mask_and_the_optimizer_is_fused_where_it_may_be(
    tiny_recipe, tmp_path, monkeypatch
):
    recipe = tiny_recipe(
        run_dir=str(tmp_path / "run"), num_workers=0, unit_audio_s=3, max_steps=8, **{"eval.every": 100}
    )
    real_forward, real_build = SpeechModel.forward, asr_train.train.build_optimizer

    def program():
        found, fused = [], []

        def forward(model, waveforms, num_samples, *args, is_padded=True, **kwargs):
            if model.training:
                frames = model.geometry.num_frames(num_samples.numpy())
                found.append((is_padded, bool(np.any(frames < model.geometry.num_frames(waveforms.shape[1])))))
            return real_forward(model, waveforms, num_samples, *args, is_padded=is_padded, **kwargs)

        def build(*args, **kwargs):
            optimizer = real_build(*args, **kwargs)
            fused.append(optimizer.defaults["fused"])
            return optimizer

        monkeypatch.setattr(SpeechModel, "forward", forward)
        monkeypatch.setattr(asr_train.train, "build_optimizer", build)
        monkeypatch.setattr(asr_train.train, "may_fuse", lambda accelerator: True)
        asr_train.train.train(recipe)
        return found, fused

    found, fused = run_ranks(1, program)[0]
    assert {is_padded for is_padded, _ in found} == {True, False}, "units of both kinds"
    assert all(said == is_so for said, is_so in found)
    assert fused == [True]
