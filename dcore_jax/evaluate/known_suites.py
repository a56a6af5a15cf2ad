"""The suites that this package has. Whoever takes SUITES from here has them all entered."""

from dcore_jax.evaluate.acebench import suite as acebench
from dcore_jax.evaluate.bfcl import suite as bfcl
from dcore_jax.evaluate.questions import humaneval, math
from dcore_jax.evaluate.suites import SUITES
from dcore_jax.evaluate.tau2 import suite as tau2

MODULES = (acebench, bfcl, humaneval, math, tau2)

__all__ = ['MODULES', 'SUITES']
