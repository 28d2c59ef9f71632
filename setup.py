"""Puts the repository's pipeline into the wheel, for `tvaprune init`; everything else is in pyproject.toml."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class WithTemplate(build_py):
    """Copies dvc.yaml and params.yaml beside tvaprune/template.py, so that no second copy is kept by hand."""

    def run(self) -> None:
        super().run()
        folder = Path(self.build_lib, "tvaprune", "pipeline")
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("dvc.yaml", "params.yaml"):
            self.copy_file(name, str(folder / name))


setup(cmdclass={"build_py": WithTemplate})
