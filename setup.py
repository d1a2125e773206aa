"""Describe the package for setuptools.

The ranges here should work; requirements.txt pins the versions that are tested.
"""

from pathlib import Path

from setuptools import find_packages, setup

VERSION = next(
    line
    for line in Path("megatron_interbert/__init__.py").read_text().splitlines()
    if "__version__" in line
).split('"')[1]

setup(
    name="megatron_interbert",
    version=VERSION,
    description=(
        "InterBERT pretraining over region features at any scale: tensor parallelism, ZeRO, exact"
        " resume"
    ),
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[
        *find_packages(include=["megatron_interbert", "megatron_interbert.*"]),
        "megatron_interbert.ds_configs",
    ],
    package_dir={"megatron_interbert.ds_configs": "ds_configs"},
    package_data={
        "": ["*.html", "*.j2"],  # each page is beside the code that fills it
        "megatron_interbert.ds_configs": ["*.json"],
        "megatron_interbert.pages": ["templates/*"],
        "megatron_interbert.serving": ["page/*"],
    },
    entry_points={"console_scripts": ["interbert = megatron_interbert.__main__:main"]},
    install_requires=[
        "torch>=2.10",  # 2.9.1 and older corrupt memory on crafted files, even with weights_only
        "deepspeed>=0.19.6,<0.20",
        "h5py>=3.11",
        "jinja2>=3.1",
        "numpy>=2.0",
        "psutil>=5.9",
        "pyyaml>=6",
        "safetensors>=0.6",
        "tensorboard>=2.18",
        "tokenizers>=0.21",
        "tqdm>=4.66",
    ],
    extras_require={
        "features": [
            "transformers>=5.3,<6",
            "pillow>=11",
            "msgpack>=1.1",
            "numba>=0.61",
            "pyarrow>=18",
        ],
        "chinese": ["opencc>=1.1.9", "jieba>=0.42"],
        "serve": [
            "megatron_interbert[chinese]",
            "faiss-cpu>=1.9",
            "fastapi>=0.115",
            "uvicorn>=0.30",
            "prometheus-client>=0.21",
            "pyarrow>=18",
        ],
        # No triton: torch's CUDA and ROCm builds each bring the one they were built for.
        "dev": [
            "megatron_interbert[features,serve]",
            "pytest>=9",
            "pytest-xdist>=3.6",
            "playwright>=1.50",
            "schemathesis>=4.0",
            "ruff>=0.15",
            "import-linter>=2.5",
        ],
    },
)
