"""A stub for PyAV on a machine without it: reading shards with decord does not need PyAV.

gpu_pack.py packs it as ``av.py``. It has every module and every name; each is an exception
class whose attributes are such classes too, so imports, annotations, ``except`` clauses and
constants made of flags work.
"""

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


class _Name(type):
    """The type of every name."""

    def __getattr__(cls, name: str) -> "_Name":
        return __getattr__(name)


def __getattr__(name: str) -> _Name:
    if name.startswith("__"):
        raise AttributeError(name)
    return _Name(name, (Exception,), {})


class _Modules(MetaPathFinder, Loader):
    """Finds any submodule of this one, as an equally empty package."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        below = name.startswith(f"{__name__}.")
        return ModuleSpec(name, self, is_package=True) if below else None

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["__getattr__"] = __getattr__


__path__: list[str] = []
sys.meta_path.append(_Modules())
