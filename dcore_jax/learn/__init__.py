"""Pure functions of a step."""

# Imported for what it registers: every program that reads names of estimators knows these.
from dcore_jax.learn import controls as controls
