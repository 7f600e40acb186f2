"""Metadata of the package; settings of the tools are in pyproject.toml."""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent


def _version() -> str:
    source = (ROOT / "convbn_inductor_pass" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"', source, re.MULTILINE)
    if match is None:
        raise RuntimeError("convbn_inductor_pass/__init__.py does not set __version__")
    return match.group(1)


DEMO = ["scikit-learn>=1.3"]
TEST = ["pytest>=8", "pytest-xdist>=3.5", "expecttest>=0.2", "hypothesis>=6.100"]
TEST += ["markdown-it-py>=2.2", *DEMO]
# Exact: their verdicts change from version to version.
DEV = [*TEST, "mypy==2.4.1", "pre-commit>=4", "ruff==0.17.5"]
# Without these, tests of real models, recognition and report skip.
BENCH = ["matplotlib>=3.8", "timm>=1.0", "torchvision", "transformers>=4.48"]
# With the adapters' trainers (convbn_inductor_pass/integrations); without them their tests skip.
TRAINERS = ["accelerate>=1.1", "lightning>=2.2", "mmengine>=0.10.5", "transformers>=4.48"]

setup(
    name="convbn-inductor-pass",
    version=_version(),
    description="Tune mode for conv + eval-mode batch norm under torch.compile: "
    "one activation per pair saved for backward instead of two",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="BSD-3-Clause",
    license_files=["LICENSE"],
    packages=find_packages(include=["convbn_inductor_pass", "convbn_inductor_pass.*"]),
    package_data={"convbn_inductor_pass": ["py.typed"]},
    python_requires=">=3.10",
    install_requires=["torch>=2.11", "rich>=13", "typer>=0.20"],
    extras_require={"demo": DEMO, "test": TEST, "dev": DEV, "bench": BENCH, "trainers": TRAINERS},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
