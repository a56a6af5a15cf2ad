"""Numbers reach trackio and wandb, and neither of them can end a run. Both are played here."""

import sys
import types

import pytest

from dcore_jax.config import RunConfig
from dcore_jax.overrides import overlay
from dcore_jax.run.checks import check_fields
from dcore_jax.train.metrics import Metrics, read_metrics
from dcore_jax.train.sinks import open_sinks


def play(monkeypatch, name, **functions):
  """Puts a package in the place of a sink's; returns the calls that it gets."""
  calls = []
  module = types.ModuleType(name)
  # `find_spec` asks a module that is loaded for this.
  module.__spec__ = types.SimpleNamespace(name=name)

  def record(function):
    def called(*arguments, **options):
      calls.append((function, arguments, options))
      if function in functions:
        functions[function]()

    return called

  for function in ('init', 'define_metric', 'log', 'finish'):
    setattr(module, function, record(function))
  monkeypatch.setitem(sys.modules, name, module)
  return calls


def config(*names):
  return overlay(RunConfig(), {'report': {'sinks': names, 'project': 'mine'}})


@pytest.mark.parametrize('name', ['trackio', 'wandb'])
def test_rows_are_sent_with_their_stage(monkeypatch, tmp_path, name):
  calls = play(monkeypatch, name)
  with Metrics(tmp_path, open_sinks(config(name), tmp_path)) as metrics:
    metrics.write('sft', 3, loss=0.5, grad_norm=float('nan'))
    metrics.write('sft', 4, loss=0.25)
  assert [call for call, _, _ in calls if call != 'define_metric'] == [
    *('init', 'log', 'log', 'finish')
  ]
  options = calls[0][2]
  assert options['project'] == 'mine' and options['config']['rl']['alpha'] == 0.1
  assert options['name'].startswith(tmp_path.name)
  sent = [arguments[0] for call, arguments, _ in calls if call == 'log']
  assert sent == [{'sft/loss': 0.5, 'sft/step': 3}, {'sft/loss': 0.25, 'sft/step': 4}]


def test_a_run_that_goes_on_is_the_same_run_there(monkeypatch, tmp_path):
  calls = play(monkeypatch, 'wandb')
  before = tmp_path / 'before'
  with Metrics(before, open_sinks(config('wandb'), before)):
    pass
  # A killed run may go on in another place.
  after = before.rename(tmp_path / 'after')
  with Metrics(after, open_sinks(config('wandb'), after)):
    pass
  first, second = [options for call, _, options in calls if call == 'init']
  assert first['id'] == second['id'] and second['resume'] == 'allow'


@pytest.mark.parametrize('function', ['init', 'log', 'finish'])
def test_a_sink_that_fails_ends_no_run(monkeypatch, tmp_path, function):
  def fail():
    raise RuntimeError('no network')

  calls = play(monkeypatch, 'wandb', **{function: fail})
  with pytest.warns(UserWarning, match=f'wandb.{function} failed.*no network'):
    with Metrics(tmp_path, open_sinks(config('wandb'), tmp_path)) as metrics:
      metrics.write('sft', 0, loss=1)
      metrics.write('sft', 1, loss=2)
  assert len(read_metrics(tmp_path)) == 2
  # It is asked once, and not at every step.
  assert [call for call, _, _ in calls].count(function) == 1


def test_what_is_not_there_is_named_before_the_run(monkeypatch):
  monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
  with pytest.raises(
    ValueError, match=r"'wandb', which is not installed: pip install 'dcore_jax\["
  ):
    check_fields(config('wandb'))
  with pytest.raises(ValueError, match="unknown sink 'wandbb'; expected some of"):
    check_fields(config('wandbb'))
