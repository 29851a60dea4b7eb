"""Build script; the metadata is in pyproject.toml. A wheel holds the recipes too, as `trl_ext/recipes`."""

import os

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithRecipes(build_py):
    """`build_py` that copies the recipes beside the packages. An editable installation runs those of the checkout."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for folder, _, names in os.walk("recipes"):
                for name in names:
                    if name.endswith((".py", ".yaml")):
                        target = os.path.join(self.build_lib, "trl_ext", folder, name)
                        self.mkpath(os.path.dirname(target))
                        self.copy_file(os.path.join(folder, name), target)


setup(cmdclass={"build_py": BuildWithRecipes})
