"""The folder `kernels/` is installed as `minirl.kernels`: a top-level `kernels` would collide with a public package.

Everything else about the package stands in pyproject.toml.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["minirl", "minirl.*"]), "minirl.kernels"],
    package_dir={"minirl": "minirl", "minirl.kernels": "kernels"},
    include_package_data=False,  # code only: whatever a run reads is given by path
)
