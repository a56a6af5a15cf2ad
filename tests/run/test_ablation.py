"""The settings of the sweeps are ones that the RL stage takes."""
import pytest

from dcore_jax.learn import advantages
from dcore_jax.run.ablation import SUITES
from dcore_jax.run.config import check_config
from dcore_jax.run.defaults import default_config


@pytest.mark.parametrize('suite', sorted(SUITES))
def test_settings_differ_and_are_known_to_the_config(suite):
  assert len({setting.name for setting in SUITES[suite]}) == len(SUITES[suite])
  for setting in SUITES[suite]:
    config = default_config()
    config.rl.estimator = setting.estimator
    config.rl.update(dict(setting.changes))
    assert check_config(config, default_config()).rl.estimator in advantages.ADVANTAGES
    assert bool(setting.changes) == bool(setting.note)
