"""What well-known GPUs have: memory, and how fast they multiply at best; from NVIDIA's data sheets and white papers."""

import re
from dataclasses import dataclass
from typing import Final, Literal

from asr_train.errors import RecipeError

_GB, _TFLOPS = 10**9, 10**12


@dataclass(frozen=True)
class Gpu:
    """A model of GPU.

    Attributes:
        name: what it is called here.
        memory_gb: as the data sheet says it; taken as 10^9 bytes, of which drivers show a little more.
        half_tflops: dense matrix products in fp16 and bf16 that add up in fp32; without sparsity.
        fp32_tflops: without tensor cores.
        tf32_tflops: fp32 matrix products that round to tf32; None where there are none.
        has_bf16: whether bf16 is as fast as fp16.
    """

    name: str
    memory_gb: float
    half_tflops: float
    fp32_tflops: float
    tf32_tflops: float | None = None
    has_bf16: bool = True

    @property
    def memory_bytes(self) -> float:
        """All of its memory."""
        return self.memory_gb * _GB

    def peak_flops(self, precision: Literal["fp32", "bf16", "fp16"], *, tf32: bool = False) -> float:
        """The most FLOPs a second in a recipe's precision."""
        if precision == "fp16" or (precision == "bf16" and self.has_bf16):
            return self.half_tflops * _TFLOPS
        is_tf32 = tf32 and self.tf32_tflops is not None and precision == "fp32"
        return ((self.tf32_tflops or 0) if is_tf32 else self.fp32_tflops) * _TFLOPS


KNOWN: Final = (
    # NVIDIA V100 data sheet (SXM2); T4 data sheet: tensor cores that know fp16 alone
    Gpu("V100-16GB", 16, 125, 15.7, has_bf16=False),
    Gpu("V100-32GB", 32, 125, 15.7, has_bf16=False),
    Gpu("T4", 16, 65, 8.1, has_bf16=False),
    # NVIDIA A10 data sheet
    Gpu("A10", 24, 125, 31.2, 62.5),
    # NVIDIA L4 and L40S data sheets, where the larger figures are with sparsity, twice these
    Gpu("L4", 24, 121, 30.3, 60),
    Gpu("L40S", 48, 362, 91.6, 183),
    # NVIDIA A100 data sheet
    Gpu("A100-40GB", 40, 312, 19.5, 156),
    Gpu("A100-80GB", 80, 312, 19.5, 156),
    # NVIDIA H100 (SXM5) and H200 (SXM) data sheets, figures with sparsity halved
    Gpu("H100", 80, 989, 67, 494),
    Gpu("H200", 141, 989, 67, 494),
    # NVIDIA Blackwell architecture brief, HGX B200
    Gpu("B200", 180, 2250, 80, 1100),
    # NVIDIA GA102 and Ada architecture white papers: tensor cores that add up in fp32 run at half rate here
    Gpu("RTX-3090", 24, 71, 35.6, 35.6),
    Gpu("RTX-4090", 24, 165, 82.6, 82.6),
)
"""Of two with the same name and different memory the smaller one stands first."""


def find_gpu(name: str, memory_gb: float = 0) -> Gpu | None:
    """The known GPU that a name means: ours, a driver's (`NVIDIA A100-SXM4-80GB`), or a cluster's (`a100`).

    Args:
        name: in any case.
        memory_gb: least memory, where that is known; of several that the name could mean the smallest that has it.
    """
    words = re.findall("[a-z0-9]+", name.lower().replace("rtx", " "))
    if any(re.fullmatch("[0-9]g|laptop|ti", word) for word in words):  # a slice of a GPU; others of like names
        return None
    sizes = [float(word.removesuffix("gb")) for word in words if re.fullmatch("[0-9]+gb", word)]
    least_gb = max(memory_gb, *sizes, 0.0)
    return next((gpu for gpu in KNOWN if _family(gpu) in words and gpu.memory_gb >= least_gb), None)


def gpu_named(name: str, memory_gb: float = 0) -> Gpu:
    """As `find_gpu`.

    Raises:
        RecipeError: no such GPU is known; lists those that are.
    """
    found = find_gpu(name, memory_gb)
    if found is None:
        raise RecipeError(f"--gpu: {name!r} is not known here; known: {', '.join(gpu.name for gpu in KNOWN)}")
    return found


def _family(gpu: Gpu) -> str:
    """The word of its name that no other model has: `a100`, `3090`."""
    return gpu.name.lower().removeprefix("rtx-").partition("-")[0]
