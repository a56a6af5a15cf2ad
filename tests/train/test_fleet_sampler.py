"""Reinforcement on rollouts of a fleet: how old they may be, and that a kill changes no number."""

import contextlib
import shutil

import jax
import numpy as np
import pytest

from dcore_jax.models.hf_checkpoint import ModelFiles, load_params
from dcore_jax.rollout.fleet import Fleet
from dcore_jax.rollout.fleet_endpoint import Limits
from dcore_jax.train.fleet_sampler import make_sampler
from dcore_jax.train.prompt_order import PromptOrder
from dcore_jax.train.rl_options import check_section
from dcore_jax.train.sources import Episodes
from dcore_jax.worlds.toolworld.world import ToolWorld
from tests.rollout.fake_fleet import LOGPROB, FakeServer
from tests.train import tiny_rl

EOS = tiny_rl.TOKENIZER.eos_token_id


def fleet_config(*urls, steps=4, **fleet):
  config = tiny_rl.rl_config(steps=steps, checkpoint_every=2, validation=0, importance_cap=2.0)
  config.fleet.update(
    {'endpoints': urls, 'dtype': 'float32', 'hedge': 0.0, 'concurrency': 4, 'patience': 60.0}
    | fleet
  )
  return config


def make_fleet(config, folder, max_len=96):
  def make(params):
    return Fleet(
      params,
      tiny_rl.MODEL,
      config.fleet,
      limits=Limits(max_len=max_len, max_new=96, vocab=640, stop_ids=frozenset([EOS])),
      folder=folder / 'fleet',
      files=ModelFiles(),
      api_key='k',
    )

  return make


def train(folder, config):
  return tiny_rl.train(folder, config, engine=make_fleet(config, folder))


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
  monkeypatch.setattr('dcore_jax.rollout.fleet_endpoint._FIRST_LOOK', 0.05)


@contextlib.contextmanager
def fakes(folder, count=2):
  servers = [FakeServer(folder / 'fleet', vocab=640, stop=EOS) for _ in range(count)]
  try:
    yield servers
  finally:
    for server in servers:
      server.close()


def lasting(folder, *, ages=True):
  """The rows without what depends on the clock."""
  left_out = ('fleet_',) if ages else ('fleet_', 'staleness')
  rows = []
  for row in tiny_rl.timeless(folder):
    rows.append({name: value for name, value in row.items() if not name.startswith(left_out)})
  return rows


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """(folder, parameters, requests that were answered) of four steps at one go."""
  folder = tmp_path_factory.mktemp('whole')
  with fakes(folder) as servers:
    config = fleet_config(*(server.url for server in servers))
    params, _ = train(folder, config)
    asked = [one for server in servers for one in server.asked]
  return folder, params, asked


def same(params, folder, whole, *, ages=False):
  jax.tree.map(np.testing.assert_array_equal, params, whole[1])
  assert lasting(folder, ages=ages) == lasting(whole[0], ages=ages)


def test_what_a_step_learns_from(whole):
  folder, params, asked = whole
  # 2 prompts of 4 rollouts a step, none of them twice.
  assert len(asked) == len({one[:2] for one in asked}) == 4 * 8
  rows = lasting(folder)
  assert [row['step'] for row in rows] == [0, 1, 2, 3]
  for row in rows:
    assert 0 <= row['staleness'] <= row['staleness_max'] <= 1
    # Entropies are the trainer's own, since servers tell none.
    assert 0 < row['entropy'] < np.log(640)
    # The fakes say the same of every token, and the trainer another thing.
    assert row['logp_gap_mean'] > 1 and row['scored_fraction'] == 1
    assert 0 < row['importance'] <= 2
  # Tokens of the first step have the probabilities of the weights that the run begins with.
  want = rows[0]['logp_gap_mean'] + -LOGPROB
  assert want == pytest.approx(np.log(640), abs=0.5)
  _, published = load_params(folder / 'fleet' / 'v00000004')
  moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), params, published)
  assert max(jax.tree.leaves(moved)) > 0


def test_what_the_journal_has_is_asked_of_nobody(whole, tmp_path):
  """Of steps 2 and 3, whose updates are lost, it holds all rollouts, and how old each token is."""
  shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
  shutil.rmtree(tmp_path / 'checkpoints' / 'state' / '4')
  params, result = train(tmp_path, fleet_config('http://127.0.0.1:9/v1'))
  assert result['resumed_at'] == 2
  same(params, tmp_path, whole, ages=True)


@pytest.mark.parametrize('answers', [3, 11, 20, 27])
def test_a_run_that_lost_its_fleet_goes_on_as_if_it_had_not(whole, tmp_path, answers):
  with fakes(tmp_path, 1) as (server,):
    honest = server.answer

    def answer(body):
      return honest(body) if server.answers <= answers else (401, {'error': {'message': 'gone'}})

    server.answer = answer
    with pytest.raises(ConnectionError, match='gone'):
      train(tmp_path, fleet_config(server.url, patience=1.0))
  with fakes(tmp_path) as servers:
    params, result = train(tmp_path, fleet_config(*(server.url for server in servers)))
    asked = sum(len(server.asked) for server in servers)
  assert result['resumed_at'] == (0 if answers < 20 else 2)
  # Whole waves of 4 rollouts are not asked for again.
  assert asked == 4 * 8 - answers // 4 * 4
  same(params, tmp_path, whole)


def test_waves_behind_a_damaged_one_are_collected_again(whole, tmp_path):
  """They came from weights that the damaged wave had led to."""
  shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
  shutil.rmtree(tmp_path / 'checkpoints' / 'state' / '4')
  journal = tmp_path / 'checkpoints' / 'rollouts'
  assert len(list(journal.glob('0000000[23].*.npz'))) == 4
  path = journal / '00000002.0001.npz'
  path.write_bytes(path.read_bytes()[:-100])
  with fakes(tmp_path) as servers:
    with pytest.warns(UserWarning, match='00000002.0001.npz cannot be read'):
      params, _ = train(tmp_path, fleet_config(*(server.url for server in servers)))
    assert sum(len(server.asked) for server in servers) == 12
  same(params, tmp_path, whole)


@pytest.mark.parametrize('staleness, every', [(0, 1), (1, 2), (2, 1), (3, 2)])
def test_no_token_is_older_than_allowed(tmp_path, staleness, every):
  with fakes(tmp_path) as servers:
    config = fleet_config(
      *(server.url for server in servers), steps=6, staleness=staleness, publish_every=every
    )
    train(tmp_path, config)
    ages = {row['step']: row['staleness_max'] for row in lasting(tmp_path)}
    assert max(ages.values()) <= staleness and ages[0] == 0
    taken = {version for server in servers for version in server.taken}
  published = {step + 1 for step in range(0, 6, every)}
  # Without staleness each step waits for the weights of the one before.
  assert taken == published if staleness == 0 else taken <= published


def test_held_out_prompts_are_measured_with_the_newest_weights(tmp_path):
  with fakes(tmp_path) as servers:
    config = fleet_config(*(server.url for server in servers), publish_every=2)
    config.validation = 2
    train(tmp_path, config)
    versions = {}
    for server in servers:
      for prompt, seed, version in server.asked:
        versions.setdefault((prompt, seed), []).append(version)
  # The same prompts and seeds before the first step, behind the second, and at the end.
  measured = [found for found in versions.values() if len(found) > 1]
  assert [sorted(found) for found in measured] == [[1, 3, 5]] * 8


def test_what_does_not_fit_together_is_refused():
  for changes, words in [
    ({'publish_every': 3}, 'lacks? 2 updates'),
    ({'endpoints': ('localhost:8000',)}, 'is no address'),
  ]:
    with pytest.raises(ValueError, match=words):
      check_section(fleet_config('http://a/v1', **{'staleness': 1} | changes))
  config = fleet_config('http://a/v1')
  config.importance_cap = 0.0
  with pytest.raises(ValueError, match='set rl.importance_cap'):
    check_section(config)


def test_episodes_are_acted_out_through_servers(tmp_path):
  """A call that the world refuses is followed by a further prompt, with the server's exact ids."""
  tasks = ToolWorld().tasks('multi_turn', 2, seed=3, split='train')
  ids = tiny_rl.TOKENIZER('<think>\nso\n</think>\n\n[no_such_tool(a=1)]')['input_ids'] + [EOS]
  with fakes(tmp_path) as servers:
    # One step: the next one would be asked ahead, as far as the clock lets it.
    config = fleet_config(*(server.url for server in servers), steps=1)
    config.max_tokens = 64
    for server in servers:
      server.card['max_model_len'] = 4096
      server.draw = lambda body: ids
    make = make_fleet(config, tmp_path, max_len=4096)
    order = PromptOrder(items=range(2), prompts=2, seed=0)
    source = Episodes(tiny_rl.TOKENIZER, ToolWorld(), tasks)
    with make_sampler(make(tiny_rl.params()), source, order, config) as sampler:
      rollouts = sampler.step(0).batch.rollouts
    asked = [prompt for server in servers for prompt, *_ in server.asked]
  assert len(rollouts) == 8 and all(len(rollout.exchanges) > 1 for rollout in rollouts)
  exchanges = [exchange for rollout in rollouts for exchange in rollout.exchanges]
  assert sorted(tuple(prompt.tolist()) for prompt, _ in exchanges) == sorted(asked)
  for _, completion in exchanges:
    assert completion.tokens.tolist() == ids and set(completion.versions.tolist()) == {1}
