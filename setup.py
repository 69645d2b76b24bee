"""Binaries and recipes, which are beside the package in a clone, are in it where it is installed."""

from setuptools import find_packages, setup

inside = {"steel_ad.experiments": "experiments", "steel_ad.configs": "configs"}
setup(packages=[*find_packages(include=["steel_ad*"]), *inside], package_dir=inside)
