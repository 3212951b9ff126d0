"""The folder `kernels/` is installed as `minirl.kernels`: a top-level `kernels` would collide with a public package.

Everything else about the package stands in pyproject.toml.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["minirl", "minirl.*"]), "minirl.kernels"],
    package_dir={"minirl": "minirl", "minirl.kernels": "kernels"},
    package_data={"minirl": ["py.typed"]},  # for type checkers; whatever else a run reads is given by path
    include_package_data=False,
)
