"""Installs dcore_jax; what is installed stands in pyproject.toml.

Accelerators: `pip install -e .[cuda]` or `.[tpu]`; the default runs on a CPU.
"""

import setuptools

setuptools.setup()
