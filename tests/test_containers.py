"""The container recipes: both install the same, from files that are there, without a compiler of CUDA.

They cannot be built here; what can be said of their text is checked.
"""

import os
import re
import subprocess

from tests.layering import ROOT
from tests.test_wheel import PACKED

DOCKER = (ROOT / "containers/Dockerfile").read_text()
APPTAINER = (ROOT / "containers/avion.def").read_text()


def copied_by_docker():
    lines = re.findall(r"^COPY (.*)$", DOCKER, re.MULTILINE)
    return {name for line in lines for name in line.split()[:-1]}


def copied_by_apptainer():
    section = re.search(r"^%files\n(.*?)^%post", APPTAINER, re.DOTALL | re.MULTILINE)[1]
    pairs = [line.split() for line in section.splitlines() if line.strip()]
    assert all(target == f"/opt/avion/{source}" for source, target in pairs)
    return {source for source, _ in pairs}


def test_both_copy_what_the_wheel_is_built_from():
    assert copied_by_docker() == copied_by_apptainer() == {*PACKED, "requirements.txt"}
    assert all((ROOT / name).exists() for name in copied_by_docker())


def test_both_run_the_same_commands():
    installs = r"(?:apt-get|pip) install [^\n&\\]*[^\n&\\\s]"
    assert re.findall(installs, DOCKER) == re.findall(installs, APPTAINER)
    assert len(re.findall(installs, DOCKER)) == 3
    (docker,), (apptainer,) = re.findall(r"^FROM (.*)", DOCKER, re.M), re.findall(r"^From: (.*)", APPTAINER, re.M)
    assert docker == apptainer
    commands = "\n".join(line for line in (DOCKER + APPTAINER).splitlines() if not line.lstrip().startswith("#"))
    assert "nvcc" not in commands and "devel" not in commands and "requirements-cuda" not in commands


def test_the_interpreter_of_the_container_hands_everything_on(tmp_path):
    """With a stand-in for apptainer that prints its words."""
    (tmp_path / "apptainer").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "apptainer").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "AVION_IMAGE": "my image.sif", "AVION_BIND": "/scratch"}
    said = subprocess.run(
        [ROOT / "containers/python", "-m", "avion", "a b"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    assert said == ["exec", "--nv", "--bind", f"{tmp_path},/scratch", "my image.sif", "python", "-m", "avion", "a b"]
