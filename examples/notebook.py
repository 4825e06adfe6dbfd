# %% [markdown]
# # A speech recogniser in a notebook
#
# The cells of this file (VS Code, PyCharm and Jupytext show them as a notebook) prepare speech, train a model on it,
# look at its errors, and have it write down what somebody says. Every function has a verb of the same name:
# `wavefleet.train(...)` is `wavefleet train ...`. They print nothing unless told to, and return what can be looked at.

# %%
import tempfile
from pathlib import Path

import soundfile

import wavefleet

# %% tags=["parameters"]
recipe = "demo"  # a shipped recipe, a file of yours (`wavefleet new` writes one), or a dict
changes = {}  # fields to change: {"optim.lr": 1e-3, "max_steps": 500}

# %% [markdown]
# ## Data
#
# The corpus is decoded and checked once; the second time this returns at once. Refused rows are counted by reason.

# %%
prepared = wavefleet.prepare(recipe, changes)
for name, found in prepared.sets.items():
    print(f"{name}: {found.rows} utterances, {found.hours:.2f} h, refused: {dict(found.refused) or 'none'}")

# %%
utterances = prepared.corpus.train
print(utterances.text(0))
waveform = utterances.waveform(0)  # int16, 16 kHz: IPython.display.Audio(waveform, rate=16_000) plays it
print(f"{len(waveform) / 16_000:.1f} s")

# %% [markdown]
# ## What a training would be

# %%
planned = wavefleet.plan(recipe, changes)
print(f"{planned.max_steps} steps, {planned.steps_per_epoch} an epoch, {planned.num_epochs:.1f} epochs")
print(f"{planned.epoch.padded_share:.1%} of the audio in its batches is padding")
for warning in planned.warnings:
    print(warning)

# %% [markdown]
# ## Training
#
# In processes of its own, on every GPU there is. The stop button saves and stops; the same cell goes on from there.

# %%
try:
    run = wavefleet.train(recipe, changes)
except wavefleet.TrainingError as error:
    print(f"it failed: {error}")
    raise
print(f"{run.ended} after step {run.step}, loss {run.loss:.3f}, best {run.best_metric}: {run.best_value:.1%}")

# %% [markdown]
# ## How well it does

# %%
for name, score in wavefleet.evaluate(run).items():
    print(f"{name}: WER {score.wer:.1%}, CER {score.cer:.1%}, {score.num_rows} utterances")
    for reference, hypothesis, count in score.confusions[:3]:
        print(f"  {reference or '(nothing)'} -> {hypothesis or '(nothing)'}, {count} times")

# %% [markdown]
# ## Using it
#
# The exported folder is an ordinary model folder of transformers: `pipeline("automatic-speech-recognition", folder)`
# loads it too.

# %%
model = wavefleet.export(run)
print(model.folder)

# %%
with tempfile.TemporaryDirectory() as folder:
    recording = Path(folder) / "recording.wav"
    soundfile.write(recording, waveform, 16_000)
    (transcript,) = wavefleet.transcribe(model, recording).transcripts
print(transcript.text)
for word in transcript.words[:5]:
    print(f"{word.start_s:6.2f} s  {word.text}")
