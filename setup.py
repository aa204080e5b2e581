"""Packaging. Two packages live outside dskd/ in the checkout: kernels/ and ds_configs/."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = next(
    line.split('"')[1]
    for line in (ROOT / "dskd/__init__.py").read_text().splitlines()
    if line.startswith("__version__")
)

setup(
    name="dskd",
    version=VERSION,
    description="Language models that inherit what other models know, on DeepSpeed",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    python_requires=">=3.10",
    packages=[*find_packages(include=["dskd", "dskd.*"]), "dskd.ds_configs"],
    package_dir={"dskd.kernels": "kernels", "dskd.ds_configs": "ds_configs"},
    package_data={"dskd.ds_configs": ["*.json"]},
    entry_points={"console_scripts": ["dskd = dskd.cli:main"]},
    install_requires=[
        "torch>=2.8",
        "deepspeed>=0.19",
        "transformers>=5",
        "datasets",
        "pyarrow",  # as datasets; unpacks .zst
        "tokenizers",
        "safetensors",
        "numpy",
        "pyyaml",
        "pydantic>=2",
        "rich",
        "matplotlib",
        "xxhash",
        "triton>=3.6; platform_system == 'Linux'",
    ],
    extras_require={
        "quantised": ["accelerate"],  # to load weights that transformers dequantises
        # scores of labelled rows (F1, correlations) and of written answers (BLEU, ROUGE's stems)
        "tasks": ["scikit-learn", "scipy", "sacrebleu", "nltk"],
        "test": [
            "pytest",
            "pytest-xdist",
            "pytest-timeout",
            "ruff",
            "tensorboard",
            "accelerate",
            "scikit-learn",
            "scipy",
            "sacrebleu",
            "nltk",
        ],
    },
)
