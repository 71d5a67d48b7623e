"""What pyproject.toml cannot say: conf/ lies beside mtl/ in the repository, and in it (mtl/conf) once installed."""

from setuptools import find_namespace_packages, find_packages, setup

configs = ["mtl.conf", *(f"mtl.conf.{group}" for group in find_namespace_packages("conf"))]

setup(packages=[*find_packages(include=["mtl", "mtl.*"]), *configs], package_dir={"mtl.conf": "conf"})
