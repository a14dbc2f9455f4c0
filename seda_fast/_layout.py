"""Find the package's parts when Python imports it from a source checkout.

Installed, all parts lie in one folder. In a checkout the kernels lie beside the package in ``kernels/``, and
the compiled extension ``_C`` may exist only in an installed copy that ``./seda_fast`` hides from Python.
"""

import importlib.metadata
import importlib.util
import pkgutil
import sys
import warnings
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path


def complete(package: str, path: list[str], version: str) -> None:
    """Make ``package.kernels`` and ``package._C`` importable from a checkout; leave an installed copy alone.

    Args:
        package: import name of the package whose ``__init__`` is running.
        path: its ``__path__``; an installed copy's folder is appended where only that one has the extension.
        version: its ``__version__``. An extension of another version is left out with one warning.
    """
    own = Path(path[0])
    # setup.py tells a checkout from a site-packages folder, where ``kernels`` is somebody else's package.
    if (own / "kernels").is_dir() or not (own.parent / "setup.py").is_file():
        return
    _adopt_kernels(package, own.parent / "kernels")
    if not _has_extension(own):
        _adopt_extension(package, path, version)


def _adopt_kernels(package: str, folder: Path) -> None:
    """Import ``folder`` under its installed name; that costs nothing, its ``__init__`` is one docstring."""
    name = f"{package}.kernels"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    if spec is None or spec.loader is None:
        raise ImportError(f"{folder} cannot be imported as {name}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    sys.modules[package].__dict__["kernels"] = module


def _adopt_extension(package: str, path: list[str], version: str) -> None:
    for folder in pkgutil.extend_path(list(path), package)[len(path) :]:
        if not _has_extension(Path(folder)):
            continue
        found = importlib.metadata.distributions(name=package, path=[str(Path(folder).parent)])
        installed = next((distribution.version for distribution in found), "unknown")
        if installed == version:
            path.append(folder)
            return
        warnings.warn(
            f"{package} {version} in {path[0]} runs without the compiled extension in {folder}, whose version"
            f" is {installed}; install the checkout again to use it.",
            RuntimeWarning,
            stacklevel=4,
        )


def _has_extension(folder: Path) -> bool:
    return any((folder / f"_C{suffix}").is_file() for suffix in EXTENSION_SUFFIXES)
