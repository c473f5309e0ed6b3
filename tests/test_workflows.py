"""The workflows in .github/ are what GitHub reads, and run what a merge needs here."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def read(path: Path) -> dict[str, Any]:
    return yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)  # else "on" is True


def steps(path: Path) -> list[dict[str, Any]]:
    return [step for job in read(path)["jobs"].values() for step in job["steps"]]


def scripts(name: str) -> str:
    return "\n".join(step.get("run", "") for step in steps(ROOT / ".github" / "workflows" / name))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_has_what_github_asks_for(path: Path) -> None:
    workflow = read(path)
    assert {"name", "on", "permissions", "jobs"} <= set(workflow)
    for job in workflow["jobs"].values():
        assert {"runs-on", "steps", "timeout-minutes"} <= set(job)
    for step in steps(path):
        assert ("uses" in step) != ("run" in step), step
        assert re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step.get("uses", "actions/checkout@v4")), step
        assert set(step) <= {"uses", "run", "with", "name", "if", "env"}, step


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_its_scripts_are_ones_that_bash_reads(path: Path) -> None:
    for step in steps(path):
        script = re.sub(r"\$\{\{.*?\}\}", "0", step.get("run", ""))
        assert subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, check=False).stderr == ""


def test_a_change_is_checked_as_a_merge_is() -> None:
    assert ".ci/run" in scripts("ci.yml").split()
    assert ".ci/wheel" in (ROOT / ".ci" / "run").read_text(encoding="utf-8").split()
    assert '"$tour" --check' in (ROOT / ".ci" / "wheel").read_text(encoding="utf-8")


def test_pythons_that_are_said_to_serve_are_checked() -> None:
    matrix = read(ROOT / ".github" / "workflows" / "ci.yml")["jobs"]["check"]["strategy"]["matrix"]["python"]
    classified = re.findall(r"Python :: (3\.\d+)\"", (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert matrix == [classified[0], classified[-1]]


def test_wheels_are_built_and_kept() -> None:
    assert "pip wheel . --no-deps" in scripts("wheels.yml")
    kept = [step["with"] for step in steps(ROOT / ".github" / "workflows" / "wheels.yml") if "with" in step]
    assert {"name": "wheels", "path": "wheelhouse/*.whl", "if-no-files-found": "error"} in kept


@pytest.mark.parametrize("name", ["run", "wheel"])
def test_the_scripts_of_ci_can_be_run(name: str) -> None:
    script = ROOT / ".ci" / name
    assert script.stat().st_mode & 0o111
    assert subprocess.run(["bash", "-n", script], capture_output=True, text=True, check=False).stderr == ""
