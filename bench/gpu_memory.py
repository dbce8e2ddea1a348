"""How much memory a training takes: what CUDA's allocator tells or, on a CPU, the tensors that are alive."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Memory(TorchDispatchMode):
    """The most bytes of tensors that are alive at once: what CUDA's allocator tells, or by looking at every operation.

    The latter sees what torch's operations return, on a CPU; what they use inside, and hand back, it does not.
    """

    def __init__(self, device: str, watch: bool = True) -> None:
        super().__init__()
        self.cuda, self.watch = device == "cuda", watch
        self.alive = self.most = 0
        self.known: dict[int, tuple[Any, int]] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Memory:
        if self.cuda:
            self.reset()
        elif self.watch:
            super().__enter__()
            self._stack.enter_context(self._resizing())
        return self

    def __exit__(self, *told: Any) -> None:  # noqa: ANN401
        if not self.cuda and self.watch:
            self._stack.close()
            super().__exit__(*told)

    def reset(self) -> None:
        """Forget what was highest before."""
        self.most = self.alive
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()

    @property
    def peak(self) -> float:
        """Bytes."""
        return float(torch.cuda.max_memory_allocated() if self.cuda else self.most)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # and its own parts come by
        found = func(*args, **(kwargs or {}))
        for each in tree_leaves(found):
            if isinstance(each, Tensor) and not isinstance(each, DTensor) and each.device.type != "meta":
                self._see(each.untyped_storage())
        return found

    def _see(self, storage: Any) -> None:  # noqa: ANN401
        key, size = storage._cdata, storage.nbytes()  # noqa: SLF001 - the address is 0 where memory was given back
        known = self.known.get(key)
        if known and known[1] == size:
            return
        self.alive += size - (known[1] if known else 0)
        self.most = max(self.most, self.alive)
        self.known[key] = (weakref.ref(storage, partial(self._gone, key)), size)

    def _gone(self, key: int, _: Any) -> None:  # noqa: ANN401
        self.alive -= self.known.pop(key, (None, 0))[1]

    @contextlib.contextmanager
    def _resizing(self) -> Iterator[None]:
        """FSDP2 gives the memory of gathered weights back without giving up the tensors."""
        real = torch.UntypedStorage.resize_

        def resize(storage: Any, size: int) -> Any:  # noqa: ANN401
            found = real(storage, size)
            self._see(storage)
            return found

        torch.UntypedStorage.resize_ = resize
        try:
            yield
        finally:
            torch.UntypedStorage.resize_ = real
