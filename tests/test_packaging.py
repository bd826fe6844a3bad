"""What a fresh machine sees: pins that agree with the ranges, make targets, a clear word without Python."""

import re
import subprocess
import sys

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.layering import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it where Python does not

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LINUX = {"platform_machine": "x86_64", "sys_platform": "linux"}
MAC = {"platform_machine": "arm64", "sys_platform": "darwin"}


def pins(file: str, environment: dict[str, str]) -> dict[str, str]:
    """Project name -> pinned version in that environment."""
    found = {}
    for line in (ROOT / file).read_text().splitlines():
        if not line or line.startswith(("#", "-r ")):
            continue
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate(environment):
            (specifier,) = requirement.specifier
            assert specifier.operator == "==", f"{file}: {line} is no exact pin"
            name = canonicalize_name(requirement.name)
            assert name not in found, f"{file}: {name} is pinned twice for {environment}"
            found[name] = specifier.version
    return found


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.13"])
@pytest.mark.parametrize("machine", [LINUX, MAC], ids=["linux", "mac"])
@pytest.mark.parametrize(
    ("file", "ranges"),
    [
        ("requirements.txt", PROJECT["dependencies"]),
        ("requirements-dev.txt", PROJECT["optional-dependencies"]["dev"]),
        ("requirements-cuda.txt", PROJECT["optional-dependencies"]["cuda"]),
    ],
)
def test_pins_and_ranges_name_the_same_packages_and_agree(file, ranges, machine, python):
    environment = {**machine, "python_version": python}
    wanted = [Requirement(line) for line in ranges]
    wanted = [r for r in wanted if r.marker is None or r.marker.evaluate(environment)]
    pinned = pins(file, environment)
    assert {canonicalize_name(r.name) for r in wanted} == set(pinned)
    for requirement in wanted:
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), requirement


def test_nothing_that_runs_needs_a_compiler():
    names = " ".join(PROJECT["dependencies"])
    assert "mamba" not in names and "causal" not in names and "flash" not in names


def test_the_make_targets_of_the_readme_exist():
    named = set(re.findall(r"^\s*make ([a-z-]+)", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert {"demo", "test"} <= named
    assert named <= set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_setup_without_a_fit_python_says_so(tmp_path):
    (tmp_path / "tools").mkdir()
    script = tmp_path / "tools" / "setup_env.sh"
    script.write_bytes((ROOT / "tools" / "setup_env.sh").read_bytes())
    done = subprocess.run(
        ["bash", script, ".venv/.installed"],
        env={"PATH": "/usr/bin:/bin", "PYTHON": "no-such-python"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("setup: no Python of at least 3.10 found (tried no-such-python)")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / ".venv").exists()
