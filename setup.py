"""Builds the compiled library from csrc/ where a C++ compiler is found. pyproject.toml holds everything else.

No Python.h and no torch header is involved: the library is plain C to the outside and is loaded through ctypes.
"""

import logging
import os
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

LIBRARY = "qsharded_kernels.libqsharded"
SOURCES = sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp"))
HEADERS = sorted(str(path) for path in Path("csrc").rglob("*.h"))
# -ffp-contract=off: a fused multiply-add rounds once where the format rounds twice, and bytes would differ
FLAGS = ["-O3", "-std=c++17", "-fPIC", "-shared", "-pthread", "-fvisibility=hidden", "-ffp-contract=off"]


class BuildLibrary(build_ext):
    """Compiles the extension as a plain shared library. A failing compiler is a warning: the library is optional."""

    def build_extension(self, ext: Extension) -> None:
        compiler = find_compiler()
        if compiler is None:
            logging.warning("no C++ compiler found: building without the compiled CPU kernels")
            return
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        compile_library(compiler, ext.sources, target)

    def get_ext_filename(self, fullname: str) -> str:
        """Without the interpreter's ABI tag, for one library serves every Python."""
        return os.path.join(*fullname.split(".")) + ".so"


class PlatformWheel(bdist_wheel):
    """Tags the wheel for the platform, not for one Python version."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def find_compiler() -> str | None:
    candidates = [os.environ.get("CXX"), "g++", "clang++", "c++"]
    return next((name for name in candidates if name and shutil.which(name)), None)


def compile_library(compiler: str, sources: list[str], target: Path) -> None:
    # a temporary name and a rename: a process that has the old library mapped keeps it whole
    unfinished = target.with_suffix(".unfinished")
    try:
        subprocess.run([compiler, *FLAGS, *sources, "-o", str(unfinished)], check=True)
        unfinished.replace(target)
    except (OSError, subprocess.CalledProcessError) as error:
        logging.warning("building without the compiled CPU kernels: %s", error)
        unfinished.unlink(missing_ok=True)


setup(
    ext_modules=[Extension(LIBRARY, SOURCES, depends=HEADERS, optional=True)],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel},
)
