"""What lets SGLang start on a CPU. Python imports this by itself where the folder is on its path.

There is no kernel package for a CPU without AMX: SGLang imports names of it when it starts, and
calls none of them on the way that these tests take. And torchvision's operators are in a library
that needs CUDA; its Python half declares what they return, and cannot if they do not exist.
"""

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Sequence
from typing import Any

KERNELS = "sgl_kernel"


class Absent:
    """A kernel, or something that holds some."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> "Absent":
        if name.startswith("__"):
            raise AttributeError(name)
        return Absent(f"{self._name}.{name}")

    def __call__(self, *_args: Any, **_options: Any) -> Any:
        raise NotImplementedError(f"{self._name} is a kernel, and only a stub of it is here")


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Makes the kernel package, and what torchvision needs before it is imported."""

    _library: Any = None

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """A spec for kernels; None, as to anybody who asks, for the rest."""
        if fullname.split(".")[0] == KERNELS:
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        if fullname == "torchvision" and self._library is None:
            self._declare()
        return None

    def exec_module(self, module: types.ModuleType) -> None:
        """Let any name be found in a module of kernels."""
        module.__dict__["__version__"] = "0.0.0"
        module.__dict__["__getattr__"] = Absent(module.__name__).__getattr__

    def _declare(self) -> None:
        import torch

        self._library = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
        for name in ("nms", "qnms"):
            self._library.define(f"{name}(Tensor dets, Tensor scores, float threshold) -> Tensor")


sys.meta_path.insert(0, Finder())
