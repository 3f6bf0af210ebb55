"""Metadata, dependencies and the package map (pyproject.toml holds the build system and the tools' settings).

Three folders at the top of the repository are installed inside the package: ``kernels/`` as ``routingvl.kernels``,
``benchmarks/`` as ``routingvl.benchmarks`` and ``configs/`` (YAML only) as ``routingvl.configs``. In a checkout
``routingvl/__init__.py`` makes the same names importable.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
PEFT = "peft>=0.21,<0.22"  # routingvl.peft extends its inner parts and refuses any other
MOVED = ("kernels", "benchmarks")  # packages with an __init__.py; configs is a folder of data


def read_version() -> str:
    """The version has one home, routingvl/__init__.py; it is parsed, since an import would need the dependencies."""
    text = (ROOT / "routingvl" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE).group(1)


def list_packages() -> list[str]:
    """Import names of every package in the wheel."""
    moved = find_packages(include=[pattern for name in MOVED for pattern in (name, f"{name}.*")])
    return find_packages(include=["routingvl", "routingvl.*"]) + [f"routingvl.{name}" for name in (*moved, "configs")]


setup(
    name="routingvl",
    version=read_version(),
    description="Fine-tune vision-language models through LoRA and Adapter bottlenecks with routing functions",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=list_packages(),
    package_dir={f"routingvl.{name}": name for name in (*MOVED, "configs")},
    package_data={
        "routingvl": ["py.typed"],
        "routingvl.configs": ["*.yaml"],
        "routingvl.demo": ["*.json"],
        "routingvl.benchmarks": ["results/*"],
    },
    include_package_data=False,
    install_requires=[
        "torch>=2.6",
        'triton>=3.4; platform_system == "Linux"',
        "transformers>=5.4,<6",  # the first with ViTImageProcessorPil
        "accelerate>=1.1",
        "safetensors>=0.4.3",
        "Pillow>=10",
        "numpy>=1.26",
        "PyYAML>=6",
        "tqdm>=4.66",
        "matplotlib>=3.8",
        "pycocoevalcap>=1.2",
    ],
    extras_require={
        "dev": [
            'bitsandbytes; platform_system == "Linux"',  # quantised layers, which the bottlenecks stand beside
            "build",
            "hypothesis",
            "ninja",
            PEFT,
            "pre-commit",
            "pytest>=8",
            "pytest-timeout",
            "pytest-xdist",
            "ruff",
            "setuptools>=77",  # tests build a wheel without build isolation, that is without network
            "tensorboard",
            'torchao; platform_system == "Linux"',
        ],
        "peft": [PEFT],
        "tracking": ["tensorboard", "wandb"],
        "web": ["gradio"],
    },
    entry_points={"console_scripts": ["routingvl = routingvl.cli:main"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
