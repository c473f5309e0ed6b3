"""Builds the compiled library from csrc/ where a C++ compiler is found, with its CUDA part where nvcc is found too.
pyproject.toml holds everything else.

No Python.h and no torch header is involved: the library is plain C to the outside and is loaded through ctypes.
QSHARDED_CUDA=0 leaves the CUDA part out; CXX and NVCC name other compilers.
"""

import logging
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

LIBRARY = "qsharded_kernels.libqsharded"
_CUDA_TAKES = "which takes a minute or two (QSHARDED_CUDA=0 leaves the CUDA kernels out)"
CPU_SOURCES = sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp"))
CUDA_SOURCES = sorted(str(path) for path in Path("csrc/cuda").glob("*.cu"))
HEADERS = sorted(str(path) for pattern in ("*.h", "*.cuh") for path in Path("csrc").rglob(pattern))
# -ffp-contract=off: a fused multiply-add rounds once where the format rounds twice, and bytes would differ
HOST_FLAGS = ["-fPIC", "-fvisibility=hidden", "-ffp-contract=off"]
FLAGS = ["-O3", "-std=c++17"]
# A100, the RTX 30 and 40 series, Hopper (90a: its warpgroup instructions), data-centre Blackwell, the RTX 50 series;
# each serves later minor versions too. tests/kernels/test_registers.py knows what their kernels may take.
ARCHITECTURES = ["80", "86", "89", "90a", "100", "120"]
PTX = "90"  # for what comes after
# CUDA's runtime inside, its symbols hidden: PyTorch brings another version of the same names
LINK_CUDA = ["-cudart", "static", "-Xlinker", "--exclude-libs,ALL"]


class BuildLibrary(build_ext):
    """Compiles the extension as a plain shared library. A failing compiler is a warning: the library is optional."""

    def build_extension(self, ext: Extension) -> None:
        compiler = find_compiler()
        if compiler is None:
            warn("no C++ compiler found: building without the compiled kernels")
            return
        target, nvcc = Path(self.get_ext_fullpath(ext.name)), find_nvcc()
        tell(f"compiling the kernels with {compiler}" + (f" and {nvcc}, {_CUDA_TAKES}" if nvcc else ""))
        try:
            compile_library(compiler, nvcc, Path(self.build_temp), target)
        except (OSError, subprocess.CalledProcessError) as error:
            warn(f"building without the compiled kernels: {error}")

    def get_ext_filename(self, fullname: str) -> str:
        """Without the interpreter's ABI tag, for one library serves every Python."""
        return os.path.join(*fullname.split(".")) + ".so"


class PlatformWheel(bdist_wheel):
    """Tags the wheel for the platform, not for one Python version."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def tell(text: str) -> None:
    """Say it on the terminal, if there is one: pip shows nothing of what a build prints."""
    try:
        with open("/dev/tty", "w", encoding="utf-8") as terminal:
            terminal.write(f"\n  qsharded: {text}\n")
    except OSError:
        pass


def warn(text: str) -> None:
    logging.warning(text)
    tell(text)


def find_compiler() -> str | None:
    candidates = [os.environ.get("CXX"), "g++", "clang++", "c++"]
    return next((name for name in candidates if name and shutil.which(name)), None)


def find_nvcc() -> str | None:
    if os.environ.get("QSHARDED_CUDA") == "0":
        return None
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    candidates = [os.environ.get("NVCC"), "nvcc", *(f"{home}/bin/nvcc" for home in homes if home)]
    return next((name for name in candidates if name and shutil.which(name)), None)


def compile_library(compiler: str, nvcc: str | None, objects: Path, target: Path) -> None:
    """The library at ``target``; where nvcc fails, the CPU's part alone."""
    target.parent.mkdir(parents=True, exist_ok=True)
    cpu_objects = compile_all([compiler, *FLAGS, *HOST_FLAGS], CPU_SOURCES, objects)
    if nvcc is not None:
        try:
            cuda_objects = compile_all(nvcc_command(nvcc, compiler), CUDA_SOURCES, objects)
            link([*nvcc_linker(nvcc, compiler), *cpu_objects, *cuda_objects], target)
            return
        except (OSError, subprocess.CalledProcessError) as error:
            warn(f"building without the CUDA kernels: {error}")
    link([compiler, *HOST_FLAGS, "-shared", *cpu_objects], target)


def nvcc_command(nvcc: str, compiler: str) -> list[str]:
    codes = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in ARCHITECTURES]
    ptx = f"-gencode=arch=compute_{PTX},code=compute_{PTX}"
    threads = ["--threads", str(os.cpu_count())]  # the architectures of a file side by side
    return [nvcc, "-ccbin", compiler, *FLAGS, *threads, *codes, ptx, "-Xcompiler", ",".join(HOST_FLAGS)]


def nvcc_linker(nvcc: str, compiler: str) -> list[str]:
    return [nvcc, "-ccbin", compiler, "-shared", *LINK_CUDA, "-Xcompiler", ",".join(HOST_FLAGS)]


def compile_all(command: list[str], sources: list[str], folder: Path) -> list[str]:
    """Each source to an object in ``folder``, as many at a time as there are cores."""

    def compile_one(source: str) -> str:
        output = folder / f"{source}.o"
        output.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([*command, "-c", source, "-o", str(output)], check=True)
        return str(output)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_one, sources))


def link(command: list[str], target: Path) -> None:
    # a temporary name and a rename: a process that has the old library mapped keeps it whole
    unfinished = target.with_suffix(".unfinished")
    try:
        subprocess.run([*command, "-o", str(unfinished)], check=True)
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)


setup(
    ext_modules=[Extension(LIBRARY, CPU_SOURCES, depends=[*CUDA_SOURCES, *HEADERS], optional=True)],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel},
)
