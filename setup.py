"""Where the packages lie and how csrc/ is compiled; everything else about the project stands in pyproject.toml."""

import sys
from pathlib import Path

from setuptools import find_packages, setup

sys.path.insert(0, str(Path(__file__).resolve().parent / "csrc"))
from seda_fast_build import BuildExtension, BuildPython, extensions

# The top-level name ``kernels`` belongs to another package on PyPI, so the folder is installed inside ours.
KERNELS = "seda_fast.kernels"

setup(
    packages=[
        *find_packages(include=["seda_fast", "seda_fast.*"]),
        KERNELS,
        *(f"{KERNELS}.{name}" for name in find_packages("kernels")),
    ],
    package_dir={KERNELS: "kernels"},
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExtension, "build_py": BuildPython},
)
