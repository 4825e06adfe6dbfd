"""The CTC loss of each utterance, in float32 whatever the arithmetic of the model."""

from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F  # noqa: N812  the usual name

Backend: TypeAlias = Literal["torch", "cudnn"]

_CUDNN_MAX_LABELS = 255  # of an utterance


def ctc_losses(
    logits: torch.Tensor,
    num_frames: torch.Tensor,
    labels: torch.Tensor,
    num_labels: torch.Tensor,
    blank_id: int,
    *,
    backend: Backend = "torch",
) -> tuple[torch.Tensor, torch.Tensor]:
    """CTC loss of each utterance over its number of labels; their mean over a step's utterances is the training loss.

    An utterance that cannot be aligned has an infinite loss; it is counted, and its loss and gradient are zero. NaN is
    not hidden. The lengths stay on the host: torch's kernels want them there, and a copy back would stall the device.

    Args:
        logits: [B, F, V], any float type; float64 stays float64, all others are taken to float32.
        num_frames: int64 [B], on the host; frames of each utterance that count.
        labels: int64 [sum of num_labels], of all utterances, one after the other.
        num_labels: int64 [B], on the host.
        blank_id: the class that stands for no label.
        backend: whose kernel. `torch` is the same on every device; its CUDA kernel copies the lengths to the GPU three
            times forward and three times backward, and waits for each copy (torch 2.13, aten/native/cuda/LossCTC.cu).
            `cudnn` waits for nothing; where it cannot be used (no GPU, another blank than 0, over 255 labels, fewer
            frames than labels, deterministic algorithms) it is `torch` all the same.

    Returns:
        losses [B]; infinite, bool [B], on the device of the logits.

    Source: Graves et al. 2006, "Connectionist Temporal Classification"; the division by the label count, at least 1,
    is that of torch's `reduction="mean"`, which transformers' `ctc_loss_reduction="mean"` uses.
    """
    with torch.autocast(logits.device.type, enabled=False):
        log_probabilities = F.log_softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        if torch.are_deterministic_algorithms_enabled():
            log_probabilities = log_probabilities.cpu()  # torch's CUDA kernel has no deterministic backward, and raises
        device = log_probabilities.device
        labels = labels.to(device=device, dtype=torch.int64, non_blocking=True)  # int32 could choose cuDNN's
        if backend == "cudnn" and fits_cudnn(log_probabilities, num_frames, num_labels, blank_id):
            losses = _cudnn_losses(log_probabilities, num_frames, labels, num_labels)
        else:
            losses = F.ctc_loss(
                log_probabilities.transpose(0, 1),  # [F, B, V]
                labels,
                num_frames,
                num_labels,
                blank=blank_id,
                reduction="none",
            )
    infinite = torch.isinf(losses)
    if log_probabilities.requires_grad:
        # the gradient of an infinite loss is NaN, also when multiplied by zero
        log_probabilities.register_hook(lambda gradient: gradient.masked_fill(infinite[:, None, None], 0.0))  # type: ignore[no-untyped-call]
    share = num_labels.to(device, non_blocking=True).clamp(min=1).to(losses.dtype)
    losses = losses.masked_fill(infinite, 0.0) / share
    return losses.to(logits.device), infinite.to(logits.device)


def cannot_align(
    num_frames: torch.Tensor, labels: torch.Tensor, num_labels: torch.Tensor, num_all_labels: int
) -> torch.Tensor:
    """Which utterances have fewer frames than labels and the blanks between equal neighbours, bool [B].

    All of them tensors of one device, which is asked for nothing: `num_all_labels` is the length of `labels`.
    """
    utterance = torch.arange(len(num_labels), device=labels.device)
    utterance = utterance.repeat_interleave(num_labels, output_size=num_all_labels)  # [sum of num_labels]
    is_repeat = (labels[1:] == labels[:-1]) & (utterance[1:] == utterance[:-1])
    needed = num_labels.index_add(0, utterance[1:], is_repeat.to(num_labels.dtype))
    return num_frames < needed


def fits_cudnn(
    log_probabilities: torch.Tensor, num_frames: torch.Tensor, num_labels: torch.Tensor, blank_id: int
) -> bool:
    """Whether cuDNN's kernel takes this unit; looks at host tensors only."""
    return (
        log_probabilities.is_cuda
        and log_probabilities.dtype == torch.float32
        and blank_id == 0
        and bool((num_labels <= num_frames).all())  # else it reads memory that is not its own, says torch's source
        and bool((num_frames > 0).all())
        and int(num_labels.max()) <= _CUDNN_MAX_LABELS
    )


def _cudnn_losses(
    log_probabilities: torch.Tensor, num_frames: torch.Tensor, labels: torch.Tensor, num_labels: torch.Tensor
) -> torch.Tensor:
    """Losses [B] by the form of cuDNN's kernel that takes lengths on the device; infinite where none is defined.

    `F.ctc_loss` would copy such lengths back, twice for every utterance, to look at what `fits_cudnn` knows.
    """
    frames, lengths = (count.to(labels.device, non_blocking=True) for count in (num_frames, num_labels))
    kernel: Any = torch.ops.aten._cudnn_ctc_loss.Tensor
    losses: torch.Tensor
    losses, _ = kernel(
        log_probabilities.transpose(0, 1).contiguous(),  # [F, B, V]
        labels.to(torch.int32),
        frames.to(torch.int32),
        lengths.to(torch.int32),
        0,  # the blank
        False,  # deterministic
        False,  # zero_infinity
    )
    return losses.masked_fill(cannot_align(frames, labels, lengths, len(labels)), torch.inf)
