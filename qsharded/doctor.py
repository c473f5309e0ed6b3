"""``python -m qsharded.doctor``: is this machine ready to train, and if not, what to do about it."""

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

import torch

import qsharded
from qsharded.config import parse
from qsharded.quant import backends, formats, ops
from qsharded.quant.packed_weight import PackedWeight
from qsharded.utils import hardware
from qsharded.utils.environment import version
from qsharded.utils.hardware import GIB

_DRIVER = Path("/proc/driver/nvidia/version")
_SHARED_MEMORY = Path("/dev/shm")
_PATIENCE_S = 180  # for two ranks to start, find each other and gather
_FAREWELL_S = 60  # torchrun gives its ranks 30 s to end before it kills them
_LOW_MEMORY, _LOW_DISK, _LOW_SHARED = 6 * GIB, 20 * GIB, GIB // 2
_OLDEST_CAPABILITY = (8, 0)
_REPORT = (
    "this is no matter of the network; torchrun --standalone --nproc-per-node 2 -m qsharded.cli.doctor_rank prints all "
    "of it: report that, with the versions above"
)


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """Look at this machine: versions, GPUs, which kernels serve and whether they write the right bytes, the gather of
    packed weights on two ranks and more, its speed, memory and disk.

    What is broken comes with one remedy, and makes the exit status 1. It works without a GPU, and takes no options.
    """

    prog: ClassVar[str] = "qsharded.doctor"
    example: ClassVar[str] = "qsharded doctor"


@dataclass(frozen=True)
class Finding:
    """What a check found. ``remedy`` is for what is broken, or worth a thought where ``is_broken`` is False."""

    text: str
    remedy: str = ""
    is_broken: bool = False


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command with ``argv``, by default the process's own arguments."""
    parse(sys.argv[1:] if argv is None else argv, DoctorConfig)
    broken = False
    for check in CHECKS:
        for finding in _found(check):
            broken |= finding.is_broken
            print(_text(finding), flush=True)
    raise SystemExit(broken)


def _found(check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """A check's findings; one that fails by itself is one more, and the others still run."""
    try:
        yield from check()
    except Exception as error:
        subject = check.__name__.removeprefix("check_").replace("_", " ")
        yield Finding(f"{subject}: {type(error).__name__}: {error}", "read the message; report it if it is ours", True)


def _text(finding: Finding) -> str:
    mark = "BROKEN" if finding.is_broken else "note" if finding.remedy else "ok"
    remedy = f"\n        -> {finding.remedy}" if finding.remedy else ""
    return f"{mark:<8}{finding.text}{remedy}"


def check_versions() -> Iterator[Finding]:
    """Python, this package, PyTorch and what it brings."""
    yield Finding(f"qsharded {qsharded.__version__}, Python {platform.python_version()}, {platform.platform()}")
    versions = {name: version(name) for name in ("triton", "safetensors", "transformers", "peft", "bitsandbytes")}
    yield Finding(", ".join(f"{name} {found}" for name, found in versions.items() if found))
    supported = _supported("torch")
    runtime = f"CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    fits = supported is None or supported[0] <= _release(torch.__version__) < supported[1]
    remedy = (
        "" if fits else "install a PyTorch that qsharded supports: pip install 'torch" + _requirement("torch") + "'"
    )
    yield Finding(f"PyTorch {torch.__version__}, {runtime}", remedy, not fits)


def _requirement(package: str) -> str:
    """What this package asks of another's version, such as "<2.16,>=2.11"; "" where it was not installed by pip."""
    try:
        asked = metadata.requires("qsharded") or []
    except metadata.PackageNotFoundError:
        return ""
    return next((entry.removeprefix(package) for entry in asked if re.match(rf"{package}[<>=]", entry)), "")


def _supported(package: str) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """The oldest release that is supported, and the first that is not."""
    asked = _requirement(package)
    oldest, first_beyond = re.search(r">=([\d.]+)", asked), re.search(r"<([\d.]+)", asked)
    return (_release(oldest[1]), _release(first_beyond[1])) if oldest and first_beyond else None


def _release(version: str) -> tuple[int, ...]:
    found = re.match(r"[\d.]+", version)
    return tuple(int(part) for part in found[0].strip(".").split(".")) if found else ()


def check_gpus() -> Iterator[Finding]:
    """The driver, and each GPU with its memory."""
    driver = _driver()
    if not torch.cuda.is_available():
        yield _no_gpu(driver)
        return
    yield Finding(f"NVIDIA driver {driver or 'of unknown version'}")
    for index in range(torch.cuda.device_count()):
        yield _gpu(index)


def _driver() -> str | None:
    found = re.search(r"Module\s+(?:for \S+\s+)?([\d.]+)", _DRIVER.read_text()) if _DRIVER.is_file() else None
    return found[1] if found else None


def _no_gpu(driver: str | None) -> Finding:
    if driver is None:
        return Finding("no NVIDIA driver, so no GPU: training runs on the CPU")
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return Finding(f"NVIDIA driver {driver}; CUDA_VISIBLE_DEVICES hides every GPU: training runs on the CPU")
    if torch.version.cuda is None:
        remedy = "install a PyTorch that is built with CUDA: https://pytorch.org/get-started/locally"
    else:
        remedy = f"nvidia-smi must list a GPU, and the driver must be new enough for CUDA {torch.version.cuda}"
    return Finding(f"NVIDIA driver {driver}, but PyTorch sees no GPU", remedy, True)


def _gpu(index: int) -> Finding:
    properties = torch.cuda.get_device_properties(index)
    capability = (properties.major, properties.minor)
    free, total = torch.cuda.mem_get_info(index)
    text = f"cuda:{index} {properties.name}, sm_{capability[0]}{capability[1]}, {total / GIB:.1f} GiB, "
    text += f"{free / GIB:.1f} free"
    if int(torch.ones(8, device=f"cuda:{index}").sum()) != 8:
        return Finding(f"{text}: it adds 8 ones to another sum", "the GPU is faulty: have it tested", True)
    if capability < _OLDEST_CAPABILITY:
        return Finding(text, "compiled kernels and bfloat16 want sm_80 or later; Triton serves, slowly")
    if free < total * 0.9:
        return Finding(text, "other programs hold memory there: nvidia-smi names them")
    return Finding(text)


def check_kernels() -> Iterator[Finding]:
    """Who serves each device, and whether the bytes are those of the format."""
    from qsharded_kernels import library  # here: Triton loads slowly

    if not library.PATH.exists():
        yield Finding("no compiled library", "with a C++ compiler (and nvcc for GPUs), pip install . builds it")
    for device in _devices():
        wrong = _wrong_bytes(device)
        remedy = "QSHARDED_BACKEND=triton or reference goes around it; please report it" if wrong else ""
        yield Finding(f"kernels on {device}: {backends.serving(device)}{wrong}", remedy, bool(wrong))


def _devices() -> list[torch.device]:
    return [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]


def _wrong_bytes(device: torch.device) -> str:
    """Quantize and dequantize a small weight on the device, beside the reference on the CPU."""
    weight = torch.randn(33, 192, generator=torch.Generator().manual_seed(0))
    codes, absmax = formats.quantize_blocks(weight)
    found_codes, found_absmax = ops.nf4_quantize(weight.to(device))
    packed = PackedWeight(codes.to(device), absmax.to(device), None, None, formats.NF4_64)
    dequantized = ops.nf4_dequantize(packed, torch.float32)
    pairs = {
        "codes": (found_codes, codes),
        "absmax": (found_absmax, absmax),
        "dequantized weights": (dequantized, formats.dequantize_blocks(codes, absmax, torch.float32)),
    }
    wrong = [name for name, (found, wanted) in pairs.items() if not torch.equal(found.cpu(), wanted)]
    return f", WHICH WRITE OTHER {' AND '.join(wrong)} than the format's" if wrong else ""


def check_ranks() -> Iterator[Finding]:
    """Ranks that gather: one for each GPU; two on one GPU, or on the CPU, where there are no more."""
    ranks = max(2, torch.cuda.device_count())
    wire = "NCCL" if torch.cuda.device_count() > 1 else "gloo"
    where = f"{ranks} ranks over {wire}"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    try:
        result = _run([*command, "-m", "qsharded.cli.doctor_rank"])
    except subprocess.TimeoutExpired as late:
        yield _hung(_lines_of_ranks(late.output), where, wire)
        return
    yield from _findings_of_ranks(result, where, wire)


def _run(command: Sequence[str]) -> "subprocess.CompletedProcess[str]":
    """Run torchrun. When it hangs it is asked to end, which takes its ranks along; killed, it would leave them behind.

    Raises:
        subprocess.TimeoutExpired: it took longer than ``_PATIENCE_S``; it has ended. It holds what was printed.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment) as process:
        try:
            out, err = process.communicate(timeout=_PATIENCE_S)
        except subprocess.TimeoutExpired as late:
            raise subprocess.TimeoutExpired(command, late.timeout, *_end(process)) from None
        except BaseException:  # an interrupt
            _end(process)
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def _end(process: "subprocess.Popen[str]") -> tuple[str, str]:
    """End it; all that it has printed."""
    process.terminate()
    try:
        return process.communicate(timeout=_FAREWELL_S)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.communicate()


def _lines_of_ranks(printed: str | None) -> dict[str, Any]:
    """What the ranks said of themselves, all their lines of JSON as one. Of failures the first that is no matter of
    connections: a rank that fails leaves the others with one that is."""
    lines = [json.loads(line) for line in (printed or "").splitlines() if line.startswith("{")]
    failures = sorted((line for line in lines if "failed" in line), key=lambda line: line["is_connection"])
    return {key: value for line in [*lines, *failures[:1]] for key, value in line.items()}


def _hung(said: dict[str, Any], where: str, wire: str) -> Finding:
    if "joined" not in said:
        return Finding(f"{where} did not find each other in {_PATIENCE_S} s", _remedy_for(wire), True)
    remedy = _remedy_for(wire) if wire == "NCCL" else _REPORT  # NCCL connects later, in the first collective
    return Finding(f"{where} found each other, but did not finish in {_PATIENCE_S} s", remedy, True)


def _failed(said: dict[str, Any], where: str, wire: str) -> Finding:
    failure = f"{where} failed in {said['step']}: {said['failed']}"
    if "out of memory" in said["failed"]:
        return Finding(failure, "other programs hold the memory of the GPU: nvidia-smi names them", True)
    return Finding(failure, _remedy_for(wire) if said["is_connection"] else _REPORT, True)


def _findings_of_ranks(result: "subprocess.CompletedProcess[str]", where: str, wire: str) -> Iterator[Finding]:
    found = _lines_of_ranks(result.stdout)
    if "failed" in found:
        yield _failed(found, where, wire)
        return
    if result.returncode or "damage" not in found:
        words = [line for line in result.stderr.splitlines() if "Error" in line] or result.stderr.splitlines()[-1:]
        yield Finding(f"{where} failed: {(words or ['no message'])[0].strip()}", _REPORT, True)
        return
    if found["damage"]:
        yield Finding(
            found["damage"], "install another PyTorch version; none of your weights is safe in this one", True
        )
    else:
        yield Finding(f"gather of all 65,536 bf16 patterns over {where}: every byte arrives")
    yield Finding(f"all-gather over {where}: {found['bytes_per_second'] / 1e9:.2f} GB/s into each rank")


def _remedy_for(wire: str) -> str:
    if wire == "NCCL":
        return "run it again with NCCL_DEBUG=INFO; NCCL_P2P_DISABLE=1 goes around a broken link between GPUs"
    return "ranks must reach each other at 127.0.0.1: look for a firewall or a proxy, or set GLOO_SOCKET_IFNAME=lo"


def check_memory_and_disk() -> Iterator[Finding]:
    """Host memory, shared memory, and disk here and in the Hub's cache."""
    available = hardware.available_memory()
    text = f"host memory: {available / GIB:.1f} GiB available"
    yield Finding(text, "" if available > _LOW_MEMORY else "each rank takes about 4.5 GiB while it loads a model")
    if torch.cuda.device_count() > 1:
        shared = hardware.free_disk(_SHARED_MEMORY)
        remedy = "" if shared > _LOW_SHARED else "NCCL needs it: start the container with --shm-size=8g or --ipc=host"
        yield Finding(f"shared memory: {shared / GIB:.1f} GiB free", remedy)
    for path in dict.fromkeys((Path.cwd(), _hub_cache())):
        free = hardware.free_disk(path)
        remedy = "" if free > _LOW_DISK else "a 70B checkpoint takes 140 GB: HF_HOME moves the Hub's cache"
        yield Finding(f"disk: {free / GIB:.1f} GiB free at {path}", remedy)


def _hub_cache() -> Path:
    from huggingface_hub import constants  # here: only this needs the Hub's client

    return Path(constants.HF_HUB_CACHE)


CHECKS = (check_versions, check_gpus, check_kernels, check_ranks, check_memory_and_disk)


if __name__ == "__main__":
    main()
