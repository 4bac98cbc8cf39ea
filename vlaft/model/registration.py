"""OpenVLA registered with transformers' Auto classes at the moment when somebody imports those.

`import vlaft` alone then suffices for `AutoModelForImageTextToText.from_pretrained`, before or after transformers, and
costs neither torch nor transformers where nobody asks for them. transformers has no entry point for such classes, and
its `register` needs them imported; so a finder waits for the one module that holds the Auto classes of models, and
registers as soon as that has been run. It changes nothing in how the module is found or loaded.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_AUTO_CLASSES = "transformers.models.auto.modeling_auto"
_MODEL = "vlaft.model.openvla"  # registers itself where it is imported


def register_with_transformers() -> None:
    """Register now where transformers' Auto classes are imported already, else as soon as they are."""
    if _AUTO_CLASSES in sys.modules:
        import_module(_MODEL)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Lets the other finders find the Auto classes, and has the model registered after they are loaded."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _AUTO_CLASSES:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(self, spec.loader)
                return spec
        return None


class _Loader(Loader):
    def __init__(self, finder: _Finder, loader: Loader) -> None:
        self._finder, self._loader = finder, loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # The module's own loader from here on: who looks for its source asks that.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)
        import_module(_MODEL)
