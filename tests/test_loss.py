"""The loss against transformers' own, against a float64 CTC written here, and where there is no alignment."""

import math

import numpy as np
import pytest
import torch
from tiny import VOCABULARY, batch_of, model, no_dropout
from transformers import Wav2Vec2ForCTC

from asr_train.data.batch import input_values
from asr_train.loss import cannot_align, ctc_losses

torch.set_num_threads(1)


def alignments_sum(log_probabilities: np.ndarray, labels: list[int], blank: int) -> float:
    """-log of the summed probability of all alignments, by the forward recursion of Graves et al., in float64."""
    extended = [blank]
    for label in labels:
        extended += [label, blank]
    alpha = np.full(len(extended), -math.inf)
    alpha[0] = log_probabilities[0, blank]
    if len(extended) > 1:
        alpha[1] = log_probabilities[0, extended[1]]
    for frame in log_probabilities[1:]:
        before = alpha.copy()
        for place, symbol in enumerate(extended):
            ways = [before[place]]
            if place >= 1:
                ways.append(before[place - 1])
            if place >= 2 and symbol != blank and symbol != extended[place - 2]:
                ways.append(before[place - 2])
            alpha[place] = np.logaddexp.reduce(ways) + frame[symbol]
    return -float(np.logaddexp.reduce(alpha[-2:]))


def lengths(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("blank", [0, 4])
def test_equals_a_ctc_of_our_own(dtype, tolerance, blank):
    texts = [[1, 2, 2, 3], [], [2], [3, 3]]
    num_frames = [9, 4, 1, 3]
    logits = torch.randn(4, 9, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
    expected = []
    for row, text in enumerate(texts):
        log_probabilities = logits[row, : num_frames[row]].log_softmax(-1).numpy()
        expected.append(alignments_sum(log_probabilities, text, blank) / max(len(text), 1))
    labels = torch.tensor([label for text in texts for label in text])
    losses, infinite = ctc_losses(
        logits.to(dtype), lengths(*num_frames), labels, lengths(*(len(text) for text in texts)), blank
    )
    assert losses.dtype == dtype
    assert not infinite.any()
    assert losses.tolist() == pytest.approx(expected, rel=tolerance)


def test_half_precision_logits_are_scored_in_float32():
    logits = torch.randn(2, 200, 5, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    arguments = lengths(200, 150), torch.tensor([1, 2, 3]), lengths(2, 1), 0
    exact, _ = ctc_losses(logits.double(), *arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses, _ = ctc_losses(logits, *arguments)
    assert losses.dtype == torch.float32
    assert losses.tolist() == pytest.approx(exact.tolist(), rel=1e-5)


def test_equals_transformers_with_reduction_mean():
    speech = model(config=no_dropout()).eval()
    batch = batch_of([8000, 16000, 12000], speech.batch_settings)
    waveforms = input_values(batch)
    logits = speech(waveforms, batch.num_samples)
    losses, _ = ctc_losses(logits, batch.num_frames, batch.labels, batch.num_labels, VOCABULARY.blank_id)

    padded = torch.full((3, int(batch.num_labels.max())), -100)
    for row, text in enumerate(batch.labels.split(batch.num_labels.tolist())):
        padded[row, : len(text)] = text
    peer = Wav2Vec2ForCTC(speech.hf.config.__class__.from_dict(speech.hf.config.to_dict())).eval()
    peer.load_state_dict(speech.hf.state_dict())
    peer.config.ctc_loss_reduction = "mean"
    valid = (torch.arange(16000) < batch.num_samples[:, None]).long()
    found = peer(waveforms, attention_mask=valid, labels=padded)
    assert losses.mean().item() == pytest.approx(found.loss.item(), rel=1e-6)
    assert torch.allclose(logits[1], found.logits[1], atol=1e-6)


def test_an_utterance_that_cannot_be_aligned_is_counted_and_gives_no_gradient():
    logits = torch.randn(3, 6, 5, generator=torch.Generator().manual_seed(2)).requires_grad_()
    labels = torch.tensor([1, 2, 1, 1, 1, 1, 3])  # row 1 needs 4 labels + 3 blanks = 7 of its 6 frames
    losses, infinite = ctc_losses(logits, lengths(6, 6, 6), labels, lengths(2, 4, 1), 0)
    assert infinite.tolist() == [False, True, False]
    assert losses[1] == 0
    losses.sum().backward()
    assert torch.isfinite(logits.grad).all()
    assert (logits.grad[1] == 0).all()
    assert (logits.grad[[0, 2]] != 0).any()


def test_no_frames_at_all():
    logits = torch.randn(2, 3, 5).requires_grad_()
    losses, infinite = ctc_losses(logits, lengths(0, 3), torch.tensor([1, 2]), lengths(1, 1), 0)
    assert infinite.tolist() == [True, False]
    losses.sum().backward()
    assert torch.isfinite(logits.grad).all()


def test_only_empty_texts():
    logits = torch.zeros(2, 3, 4)
    losses, _ = ctc_losses(logits, lengths(3, 2), torch.tensor([], dtype=torch.int64), lengths(0, 0), 0)
    assert losses.tolist() == pytest.approx([3 * math.log(4), 2 * math.log(4)])


def test_nan_is_not_hidden():
    logits = torch.zeros(2, 4, 3)
    logits[0, 1, 1] = math.nan
    losses, infinite = ctc_losses(logits, lengths(4, 4), torch.tensor([1, 1]), lengths(1, 1), 0)
    assert torch.isnan(losses[0])
    assert not infinite.any()
    assert torch.isfinite(losses[1])


def test_what_cannot_be_aligned_is_known_from_lengths_and_repeats_alone():
    """What cuDNN's kernel does not say; by what torch's finds infinite."""
    generator = np.random.default_rng(3)
    texts = [generator.integers(1, 3, generator.integers(0, 6)).tolist() for _ in range(200)]
    num_frames = lengths(*generator.integers(1, 8, len(texts)).tolist())
    labels, num_labels = torch.tensor([label for text in texts for label in text]), lengths(*map(len, texts))
    _, infinite = ctc_losses(torch.zeros(len(texts), 8, 3), num_frames, labels, num_labels, 0)
    assert 20 < infinite.sum() < 180
    assert torch.equal(cannot_align(num_frames, labels, num_labels, len(labels)), infinite)


def test_where_cudnn_cannot_be_used_torchs_kernel_is():
    logits = torch.randn(2, 9, 5, generator=torch.Generator().manual_seed(4))
    arguments = logits, lengths(9, 7), torch.tensor([1, 2, 3]), lengths(2, 1), 0
    for expected, found in zip(ctc_losses(*arguments), ctc_losses(*arguments, backend="cudnn"), strict=True):
        assert torch.equal(found, expected)
