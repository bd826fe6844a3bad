"""What pyproject.toml cannot say: the wheel carries recipes and batch files inside the package (avion/resources.py)."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
FOLDERS = {"recipes": (".yaml",), "slurm": (".sbatch", ".sh")}


class BuildWithFolders(build_py):
    """Copies the folders of the repository's root beside the modules. In an editable installation they stay there."""

    def run(self):
        super().run()
        if self.editable_mode:
            return
        for name, suffixes in FOLDERS.items():
            for path in sorted((ROOT / name).rglob("*")):
                if path.suffix in suffixes:
                    target = Path(self.build_lib, "avion", name, path.relative_to(ROOT / name))
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, target)


setup(cmdclass={"build_py": BuildWithFolders})
