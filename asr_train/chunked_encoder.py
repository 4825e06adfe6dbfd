"""A frozen feature encoder, a few utterances of a unit at a time, so that it does not set the peak of memory.

The first convolution puts out 512 channels every 5 samples: 6.5 MB a second of audio in fp32, many times what a layer
of the transformer makes of it. Where the encoder is never trained, nothing of that is needed later.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from asr_train.memory_estimate import FROZEN_CHUNK_BYTES


def run_in_chunks(feature_encoder: nn.Module, *, chunk_bytes: int = FROZEN_CHUNK_BYTES) -> None:
    """Make a frozen feature encoder take its utterances in chunks, without gradients.

    transformers would keep the input of each convolution under gradient checkpointing, though nothing is trained there.

    Args:
        feature_encoder: transformers' module `feature_extractor`: waveforms [B, S] in, features [B, C, F] out.
        chunk_bytes: what its widest layer may put out at once, unless one utterance alone takes more.
    """
    whole: Callable[[torch.Tensor], torch.Tensor] = feature_encoder.forward

    def forward(waveforms: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """Features [B, C, F] of waveforms [B, S]; every utterance is worked on by itself, chunk or not."""
        size = max(1, chunk_bytes // widest_bytes(feature_encoder, waveforms))
        num_chunks = -(-len(waveforms) // size)
        with torch.no_grad():
            if num_chunks == 1:
                return whole(waveforms)
            # sizes differ by at most one, so that a unit has two shapes of convolutions at most
            return torch.cat([whole(chunk) for chunk in torch.tensor_split(waveforms, num_chunks)])

    feature_encoder.forward = forward


def widest_bytes(feature_encoder: nn.Module, waveforms: torch.Tensor) -> int:
    """Bytes that the first convolution, whose output is the widest, puts out for one of the waveforms [B, S]."""
    first = next(module for module in feature_encoder.modules() if isinstance(module, nn.Conv1d))
    frames = (waveforms.shape[1] - first.kernel_size[0]) // first.stride[0] + 1
    kind = waveforms.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else waveforms.dtype
    return first.out_channels * max(1, frames) * dtype.itemsize
