"""bitsandbytes' own tests pass with our kernels behind its operations as they pass without.

They are not in its wheel: give QSHARDED_BITSANDBYTES_TESTS the ``tests`` folder of its repository, at the tag that is
installed. Each file runs twice, in processes of their own, side by side.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from xml.etree import ElementTree

import pytest

FOLDER = os.environ.get("QSHARDED_BITSANDBYTES_TESTS")
pytestmark = [
    pytest.mark.skipif(not FOLDER, reason="QSHARDED_BITSANDBYTES_TESTS names no folder of bitsandbytes' tests"),
    pytest.mark.timeout(3600),
]

FILES = {
    "test_linear4bit.py": "",
    "test_functional.py": "4bit or 4Bit",
    "test_ops.py": "4bit or NonContiguous",
    "test_autograd.py": "matmul_4bit",
    "test_parametrize.py": "",
}
# The entry point itself, as an editable install may have been made before it was declared.
_RUN = (
    "import sys, pytest; from qsharded.integrations.entry import bitsandbytes_backend; bitsandbytes_backend(); "
    "sys.exit(pytest.main(sys.argv[1:]))"
)


def outcomes(file: str, selected: str, installed: str, report: Path) -> dict[str, str]:
    """Test -> "passed" or the tag of what became of it instead."""
    assert FOLDER is not None
    # our own settings, where the folder lies within this repository, would refuse its markers
    options = ["-q", "-c", os.devnull, "-p", "no:cacheprovider", "-p", "no:xdist"]
    variant = {"QSHARDED_BITSANDBYTES": installed, "PET_STANDALONE": "1"}  # a port of its own for each torchrun
    subprocess.run(
        [sys.executable, "-c", _RUN, str(Path("tests", file)), *options, f"--junitxml={report}", "-k", selected],
        cwd=Path(FOLDER).parent,  # the files import each other as tests.helpers
        env=os.environ | variant,
        check=False,
    )
    cases = ElementTree.parse(report).getroot().iter("testcase")
    return {f"{c.get('classname')}::{c.get('name')}": next((part.tag for part in c), "passed") for c in cases}


@pytest.mark.parametrize("file", FILES)
def test_its_tests_end_as_they_do_without(file: str, tmp_path: Path) -> None:
    def run(installed: str) -> dict[str, str]:
        return outcomes(file, FILES[file], installed, tmp_path / f"{installed}.xml")

    with ThreadPoolExecutor() as pool:
        without, with_ours = pool.map(run, ("0", "1"))
    assert "passed" in without.values()
    changed = [
        f"{test}: {without.get(test)} without ours, {with_ours.get(test)} with"
        for test in sorted(without.keys() | with_ours.keys())
        if without.get(test) != with_ours.get(test)
    ]
    assert not changed, "\n".join(changed)
