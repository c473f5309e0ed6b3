"""Registers and spills of every kernel on every architecture that setup.py builds for, as ptxas reports them.

No GPU is needed, but nvcc, and some minutes: `pytest --slow tests/kernels/test_registers.py`.
"""

import ast
import re
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
REGISTERS_OF_AN_SM = 65536
MOST_REGISTERS = 255  # of a thread
EMPTY = 4  # registers that a kernel without code is reported with
STATIC_SHARED_BYTES = 48 << 10

# Threads of an SM: kernels that memory bounds should fill it, or nearly.
THREADS_OF_AN_SM = {"80": 2048, "86": 1536, "89": 1536, "90a": 2048, "100": 2048, "120": 1536}
RINGS, WGMMA = {"90a", "100"}, {"90a"}  # where kernels on rings and on Hopper's wgmma are built

# Threads of an SM that registers must leave room for: those of the CTAs that a kernel's launch bounds promise.
RESIDENT = {
    "linear_mma_kernel": 256,
    "linear_vector_kernel": 512,
    "linear_vector_small_kernel": 2 * 512,
    "adamw_kernel": 3 * 256,
    "adamw_alone_kernel": 3 * 256,
    "row_sums_kernel": 16 * 32,
    "offset_kernel": 1024,
}
# They load and store and do little else; of those for two architectures three quarters of the threads fit.
STREAMING = {
    "dequantize_kernel",
    "dequantize_parts_kernel",
    "quantize_kernel",
    "second_level_kernel",
    "sum_partials_kernel",
    "sum_slices_kernel",
    "swizzle_x_kernel",
}
# Bytes spilled, stores and loads together, that are known. Elsewhere none are: they nearly doubled AdamW's time.
KNOWN_SPILLS = {
    ("90a", "Wgmma64Large"): 36,
    ("90a", "Wgmma128"): 20,
    ("90a", "Wgmma256"): 16,
    ("100", "Stream128x16"): 20,
}
NAMES = (*RESIDENT, *STREAMING, "linear_stream_kernel", "linear_wgmma_kernel", "probe_kernel")
CONFIGURATION = re.compile(r"(Wgmma\d+(?:Large)?|Stream\d+x\d+|Mma\d+x\d+)E")


def of_setup(name: str) -> list[str]:
    """A list that setup.py defines, which runs when it is imported."""
    for statement in ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.Assign) and getattr(statement.targets[0], "id", None) == name:
            return list(ast.literal_eval(statement.value))
    raise AssertionError(f"setup.py defines no {name}")


@dataclass(frozen=True)
class Report:
    """What ptxas says of a kernel. ``configuration``: of its tiles, "" where it has none."""

    kernel: str
    configuration: str
    registers: int
    spilled: int
    static_shared: int


def reports(text: str) -> list[Report]:
    """Of the output of ``ptxas -v``."""
    return [_report(part) for part in text.split("Compiling entry function")[1:]]


def _report(text: str) -> Report:
    mangled = text.split("'")[1]
    (kernel,) = [name for name in NAMES if f"{len(name)}{name}" in mangled]
    configuration = CONFIGURATION.search(mangled)
    stores, loads = re.findall(r"(\d+) bytes spill", text)[:2]
    registers, shared = re.search(r"Used (\d+) registers", text), re.search(r"(\d+) bytes smem", text)
    assert registers, text
    return Report(
        kernel,
        configuration[1] if configuration else "",
        int(registers[1]),
        int(stores) + int(loads),
        int(shared[1]) if shared else 0,
    )


def most_registers(report: Report, architecture: str) -> int:
    """That a thread of the kernel may have."""
    if report.kernel in STREAMING:
        return REGISTERS_OF_AN_SM // (THREADS_OF_AN_SM[architecture] * 3 // 4)
    if report.kernel in RESIDENT:
        return min(MOST_REGISTERS, REGISTERS_OF_AN_SM // RESIDENT[report.kernel])
    return MOST_REGISTERS  # their threads depend on the tiles; spills tell where launch bounds are tight


@pytest.fixture(scope="module")
def nvcc() -> str:
    found = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if found is None:
        pytest.skip("needs nvcc")
    return found


def compiled(nvcc: str, architecture: str, folder: Path) -> list[Report]:
    """Reports of all kernels."""
    code = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    found: list[Report] = []
    for source in SOURCES:
        command = [nvcc, *of_setup("FLAGS"), code, "-Xptxas", "-v", "-cubin", "-o", str(folder / "cubin"), str(source)]
        found += reports(subprocess.run(command, check=True, capture_output=True, text=True).stderr)
    return found


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("architecture", of_setup("ARCHITECTURES"))
def test_no_kernel_takes_more_than_is_known(architecture: str, nvcc: str, tmp_path: Path) -> None:
    found = compiled(nvcc, architecture, tmp_path)
    assert {report.kernel for report in found} == set(NAMES)
    for report in found:
        assert report.spilled <= KNOWN_SPILLS.get((architecture, report.configuration), 0), report
        assert report.registers <= most_registers(report, architecture), report
        assert report.static_shared <= STATIC_SHARED_BYTES, report
    assert built(found, "linear_stream_kernel") == (architecture in RINGS)
    assert built(found, "linear_wgmma_kernel") == (architecture in WGMMA)
    for report in found:
        if architecture in WGMMA and report.configuration == "Wgmma256":
            assert setmaxnreg_finds_its_registers(report), report


def built(found: list[Report], kernel: str) -> bool:
    """Whether all of that name have code; False where none has."""
    (whether,) = {report.registers > EMPTY for report in found if report.kernel == kernel}
    return whether


def setmaxnreg_finds_its_registers(report: Report) -> bool:
    """As fits_setmaxnreg in linear.cu asks, which else leaves wgmma unused: 8 consumer warps get 240 registers, 4 of
    producers keep 24, out of those that all 12 are launched with."""
    return -(-report.registers // 8) * 8 * 12 >= 8 * 240 + 4 * 24


def test_every_architecture_has_its_bounds() -> None:
    assert set(of_setup("ARCHITECTURES")) == set(THREADS_OF_AN_SM)
    assert {architecture for architecture, _ in KNOWN_SPILLS} <= RINGS


def test_a_report_is_read() -> None:
    name = "_ZN8qsharded20linear_stream_kernelINS_11StreamShapeINS_12Stream128x16EEE6__halfLNS_6AbsmaxE0EEEvv"
    text = (
        f"ptxas info    : Compiling entry function '{name}' for 'sm_100'\n"
        f"ptxas info    : Function properties for {name}\n"
        "    24 bytes stack frame, 20 bytes spill stores, 40 bytes spill loads\n"
        "ptxas info    : Used 128 registers, used 1 barriers, 24 bytes cumulative stack size, 160 bytes smem\n"
    )
    report = Report("linear_stream_kernel", "Stream128x16", 128, 60, 160)
    assert reports(text + text.replace("Used 128", "Used 255")) == [report, replace(report, registers=255)]
    assert setmaxnreg_finds_its_registers(replace(report, registers=168))
    assert not setmaxnreg_finds_its_registers(replace(report, registers=160))
