import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import qsharded
from qsharded.quant import formats

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def name_of(requirement: str) -> str:
    found = re.match(r"[\w.-]+", requirement)
    assert found
    return found[0].lower()


@pytest.mark.parametrize("module", ["qsharded", "qsharded.config", "qsharded.training.metrics"])
def test_importing_loads_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("name", qsharded.__all__)
def test_public_names_load_when_used(name: str) -> None:
    assert getattr(qsharded, name) is not None
    assert name in dir(qsharded)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'qsharded' has no attribute 'quantise'"):
        qsharded.quantise  # noqa: B018


def test_every_folder_of_modules_is_a_package() -> None:
    """What is not is left out of the wheel."""
    for package in (ROOT / "qsharded", ROOT / "kernels" / "qsharded_kernels"):
        for module in package.rglob("*.py"):
            assert (module.parent / "__init__.py").is_file(), module


def test_kernels_is_no_package() -> None:
    """Hugging Face ships one called `kernels`; run from here, transformers would import ours instead."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_every_direct_dependency_is_pinned(project: dict[str, Any]) -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {name_of(line) for line in lines if re.fullmatch(r"[\w.-]+==[\w.]+", line)}
    extras = project["optional-dependencies"].values()
    asked = {name_of(entry) for entries in (project["dependencies"], *extras) for entry in entries}
    assert asked == pinned


def test_the_packed_layer_has_both_of_its_public_names() -> None:
    from qsharded import nn

    layer = nn.NF4Linear(64, 4)
    assert type(layer) is nn.PackedLinear
    assert layer.quant_format == formats.NF4_64


@pytest.mark.parametrize("has_nvcc", [True, False])
def test_who_installs_is_told_that_it_compiles(tmp_path: Path, has_nvcc: bool) -> None:
    compiler = tmp_path / "compiler"  # makes what stands behind -o
    compiler.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\ntouch "$2"\n')
    compiler.chmod(0o755)
    environment = os.environ | {"CXX": str(compiler), "NVCC": str(compiler), "QSHARDED_CUDA": str(int(has_nvcc))}
    build = (
        f"{sys.executable} setup.py -q build_ext --build-lib={tmp_path} --build-temp={tmp_path} >{tmp_path}/log 2>&1"
    )
    on_a_terminal = "import pty, sys; sys.exit(pty.spawn(sys.argv[1:]))"
    words = [sys.executable, "-c", on_a_terminal, "sh", "-c", build]
    done = subprocess.run(words, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, (tmp_path / "log").read_text()
    assert f"qsharded: compiling the kernels with {compiler}" in done.stdout
    assert ("a minute or two" in done.stdout) is has_nvcc
    assert (tmp_path / "qsharded_kernels" / "libqsharded.so").exists()
