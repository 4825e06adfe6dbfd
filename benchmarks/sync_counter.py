"""Counts where a program makes the host wait for the device: on a GPU, and on a CPU as if it were one.

A GPU works through what it was given while Python goes on, until Python asks for a value: then the host waits for all
that was asked before. On a CPU nothing waits, but the same calls are made; so they can be counted there, once it is
known which tensors would be on the device. Here memory is on the device if

- `.to` was given a `torch.device`, or a tensor that is on the device: what comes back is a copy then, as on a GPU;
- a tensor was made with a `torch.device` as its `device`;
- an operation made it of a tensor on the device, in the backward pass too.

`"cpu"`, as text, is the host. So a program must name its device by an object, as accelerate's `device` is one.

Not counted: waits inside a kernel, CTC's copies of its lengths say (`KERNEL_WAITS` says how many); and copies to the
device that do not wait (`non_blocking=True`).
"""

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Calls that need a value of a tensor on the device, by name; what they are called in the tables.
_READS = {
    "item": "item", "tolist": "tolist", "numpy": "numpy", "__array__": "numpy", "cpu": "cpu",
    "__bool__": "truth value", "is_nonzero": "truth value", "equal": "truth value", "allclose": "truth value",
    "__contains__": "truth value", "__int__": "item", "__float__": "item", "__index__": "item", "__complex__": "item",
    "__format__": "item", "__repr__": "item",
    "nonzero": "nonzero", "argwhere": "nonzero", "masked_select": "boolean indexing", "unique": "nonzero",
    "unique_consecutive": "nonzero", "bincount": "nonzero",
}  # fmt: skip
_MAKERS = ("tensor", "as_tensor", "asarray", "new_tensor")  # of values on the host
_OPERATIONS = {
    "aten::_local_scalar_dense": "_local_scalar_dense",
    "aten::nonzero": "nonzero",
    "aten::masked_select": "boolean indexing",
    "aten::equal": "truth value",
    "aten::_unique2": "nonzero",
}
KERNEL_WAITS = {"aten::_ctc_loss": 3, "aten::_ctc_loss_backward": 3}
"""Copies of lengths that torch's CUDA kernels make and wait for, by their source: aten/native/cuda/LossCTC.cu."""


class SyncCounter:
    """Counts while it is entered.

    Args:
        is_gpu: whether the device is a real GPU; else it is the CPU, and what lies on it is tracked.

    Attributes:
        counts: kind of call -> times the host waited.
        kernel_waits: waits inside kernels that would come on a GPU; by their source, not observed.
        warned: on a GPU, times torch itself said that a call waits (`torch.cuda.set_sync_debug_mode`).
    """

    def __init__(self, *, is_gpu: bool) -> None:
        self.counts: Counter[str] = Counter()
        self.kernel_waits = 0
        self.warned = 0
        self._is_gpu = is_gpu
        self._on_device: dict[int, StorageWeakRef] = {}
        self._is_quiet = False
        self._modes = (_Functions(self), _Operations(self))

    def __enter__(self) -> Self:
        if self._is_gpu:
            torch.cuda.set_sync_debug_mode("warn")
            self._show_warning, warnings.showwarning = warnings.showwarning, self._warning
            warnings.filterwarnings("always", "called a synchronizing CUDA operation")
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(kind, error, trace)
        if self._is_gpu:
            torch.cuda.set_sync_debug_mode("default")
            warnings.showwarning = self._show_warning

    def is_on_device(self, tensor: object) -> bool:
        """Whether a value is a tensor on the device, real or not."""
        if not isinstance(tensor, torch.Tensor):
            return False
        if self._is_gpu:
            return tensor.is_cuda
        try:
            reference = self._on_device.get(tensor.untyped_storage()._cdata)
        except (NotImplementedError, RuntimeError):  # sparse, functorch's, and others without memory of their own
            return False
        return reference is not None and not reference.expired()

    def forget_freed(self) -> None:
        """Let go of memory that is free by now; between steps."""
        self._on_device = {key: reference for key, reference in self._on_device.items() if not reference.expired()}

    def _put(self, value: Any) -> None:
        if not self._is_gpu:
            for tensor in _tensors(value):
                storage = tensor.untyped_storage()
                self._on_device[storage._cdata] = StorageWeakRef(storage)

    def _count(self, kind: str) -> None:
        if not self._is_quiet:
            self.counts[kind] += 1

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """A call that has been counted: what it does inside is not counted again."""
        before, self._is_quiet = self._is_quiet, True
        try:
            yield
        finally:
            self._is_quiet = before

    def _warning(self, message: Any, *arguments: Any, **named: Any) -> None:
        if "synchronizing CUDA operation" in str(message):
            self.warned += 1
        else:
            self._show_warning(message, *arguments, **named)

    # what torch's functions do, as Python calls them

    def _call(self, function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        name = getattr(function, "__name__", "")
        on_device = [self.is_on_device(leaf) for leaf in args[:2]]
        first = bool(on_device) and on_device[0]
        if name in ("to", "cuda"):
            return self._move(function, args, kwargs)
        if name == "copy_" and len(args) > 1 and self.is_on_device(args[0]) != self.is_on_device(args[1]):
            return self._counted(None if _may_run_on(args[2:], kwargs) else "copy_", function, args, kwargs)
        if name in _READS and any(on_device):
            found = self._counted(_READS[name], function, args, kwargs)
            return self._copied_to_host(found) if name == "cpu" else found
        if name == "where" and len(args) == 1 and first:
            return self._counted("nonzero", function, args, kwargs)
        if name == "__getitem__" and first and _has_mask(args[1]):
            return self._counted("boolean indexing", function, args, kwargs)
        found = function(*args, **kwargs)
        if self._is_device(kwargs.get("device")) and not first:
            if name in _MAKERS:
                self._count("to the device")
            self._put(found)
        return found

    def _counted(
        self, kind: str | None, function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]
    ) -> Any:
        if kind is not None:
            self._count(kind)
        with self._quiet():
            return function(*args, **kwargs)

    def _move(self, function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """`.to`: between host and device it is a copy, which waits unless `non_blocking`."""
        tensor = args[0]
        before = self.is_on_device(tensor)
        after = self._target(tensor, [*args[1:], *kwargs.values()])
        if before == after:
            return function(*args, **kwargs)
        found = self._counted(
            None if _may_run_on(args[1:], kwargs) else "to the device" if after else "to the host",
            function, args, kwargs,
        )  # fmt: skip
        if self._is_gpu:
            return found
        if not after:
            return self._copied_to_host(found)
        with self._quiet():
            if found.untyped_storage()._cdata == tensor.untyped_storage()._cdata:
                found = found.clone()
        self._put(found)
        return found

    def _copied_to_host(self, found: torch.Tensor) -> torch.Tensor:
        if self._is_gpu:
            return found
        with self._quiet():
            copy = found.clone()
        self._on_device.pop(copy.untyped_storage()._cdata, None)
        return copy

    def _target(self, tensor: torch.Tensor, arguments: Sequence[Any]) -> bool:
        """Whether `.to` was asked for the device."""
        for value in arguments:
            if isinstance(value, torch.Tensor):
                return self.is_on_device(value)
            if isinstance(value, str | torch.device | int) and not isinstance(value, bool):
                return self._is_device(value)
        return self.is_on_device(tensor)  # another type, in the same place

    def _is_device(self, value: object) -> bool:
        if self._is_gpu:
            return value is not None and torch.device(value).type == "cuda"  # type: ignore[call-overload,no-any-return]
        return isinstance(value, torch.device) and value.type == "cpu"

    # what torch's operations do, whoever calls them

    def _operate(self, operation: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        found = operation(*args, **kwargs)
        if not any(self.is_on_device(tensor) for tensor in _tensors((args, kwargs))):
            return found
        name = operation.name().partition(".")[0]
        if not self._is_quiet:
            if kind := _OPERATIONS.get(name):
                self._count(kind)
            elif name in ("aten::index", "aten::index_put_", "aten::index_put") and _is_boolean(name, args):
                self._count("boolean indexing")
        self.kernel_waits += KERNEL_WAITS.get(name, 0)
        written = [tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))]
        self._put([tensor for tensor in _tensors(found) if tensor.untyped_storage()._cdata not in written])
        return found


class _Functions(TorchFunctionMode):
    def __init__(self, counter: SyncCounter) -> None:
        super().__init__()
        self._counter = counter

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self._counter._call(func, args, kwargs or {})


class _Operations(TorchDispatchMode):
    def __init__(self, counter: SyncCounter) -> None:
        super().__init__()
        self._counter = counter

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self._counter._operate(func, args, kwargs or {})


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _may_run_on(args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether a copy was asked for that the host does not wait for; `True` by place is `non_blocking`, in `to` too."""
    return bool(kwargs.get("non_blocking", next((value for value in args if isinstance(value, bool)), False)))


def _has_mask(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, torch.Tensor) and part.dtype in (torch.bool, torch.uint8) for part in parts)


def _is_boolean(name: str, args: Sequence[Any]) -> bool:
    """Whether an indexing needs to know where its mask is true; one number put everywhere does not."""
    if not any(tensor.dtype in (torch.bool, torch.uint8) for tensor in _tensors(args[1])):
        return False
    return name == "aten::index" or args[2].numel() > 1


# --- the self-test ----------------------------------------------------------------------------------------------


def self_test(device: torch.device) -> dict[str, int]:
    """Count one of each kind, and none of what does not wait.

    Raises:
        AssertionError: the counter does not see what it must, or sees what is not there.
    """
    counter = SyncCounter(is_gpu=device.type == "cuda")
    with counter:
        values = torch.arange(3.0).to(device, non_blocking=True)
        host = torch.arange(3.0)
        ones: dict[str, Callable[[], Any]] = {
            "item": values[0].item,
            "tolist": values.tolist,
            "numpy": lambda: _numpy(values, device),
            "cpu": values.cpu,
            "to the host": lambda: values.to("cpu"),
            "to the device": lambda: host.to(device),
            "copy_": lambda: host.clone().copy_(values),
            "truth value": lambda: bool(values[0] > 0),
            "nonzero": values.nonzero,
            "boolean indexing": lambda: values[values > 0],
            "_local_scalar_dense": lambda: torch.ops.aten._local_scalar_dense(values[0]),
        }
        for kind, call in ones.items():
            before = counter.counts.copy()
            call()
            seen = dict(counter.counts - before)
            assert seen == {kind: 1}, f"one {kind} was made, and {seen} counted"
        before = counter.counts.copy()
        host.tolist(), host[host > 0], bool(host[0] > 0), host.to(torch.float64), host.numpy()
        values[values > 0] = 0.0  # a fill by a mask
        values[0] += 1
        assert counter.is_on_device(torch.where(values > 0, values, values + 1).sum())
        assert not counter.is_on_device(values.cpu() + 1)
        seen = dict(counter.counts - before)
        assert seen == {"cpu": 1}, f"nothing waited but one copy, and {seen} was counted"
    if device.type == "cuda":
        assert counter.warned >= len(ones) - 1, f"torch itself saw {counter.warned}"
    return dict.fromkeys(ones, 1)


def _numpy(values: torch.Tensor, device: torch.device) -> Any:
    """A GPU's tensor refuses `numpy`, a copy is made first; here the call by itself."""
    return values.numpy(force=True) if device.type == "cuda" else values.numpy()
