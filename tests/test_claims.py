"""A folder of results belongs to what they were made from."""

import errno
import json
import os
import socket
import subprocess
import sys

import pytest

from dcore_jax.claims import claim, hold
from dcore_jax.config import RunConfig
from dcore_jax.overrides import overlay, to_json

fcntl = pytest.importorskip('fcntl', reason='no locks of folders on this system')


def test_a_folder_is_claimed_once(tmp_path):
  path = tmp_path / 'runs' / 'config.json'
  claim(path, {'rates': (1, 2), 'seed': 0}, 'was begun with other')
  assert json.loads(path.read_text()) == {'rates': [1, 2], 'seed': 0}
  claim(path, {'rates': (1, 2), 'seed': 0}, 'was begun with other')
  with pytest.raises(
    ValueError,
    match=r'runs. was begun with other rates: was \[1, 2\], is \[1, 3\]; seed: was 0, is 1; name',
  ):
    claim(path, {'rates': (1, 3), 'seed': 1}, 'was begun with other')
  assert json.loads(path.read_text()) == {'rates': [1, 2], 'seed': 0}


def test_free_fields_may_change_and_forgotten_ones_are_ignored(tmp_path):
  path = tmp_path / 'config.json'
  path.write_text('{"seed": 0, "stages": ["sft"], "dropped": 1}')
  claim(path, {'seed': 0, 'stages': ['rl']}, 'was begun with other', free=('stages',))
  assert json.loads(path.read_text()) == {'seed': 0, 'stages': ['rl']}


def test_fields_that_an_older_record_lacks_have_their_defaults(tmp_path):
  path = tmp_path / 'config.json'
  config = overlay(RunConfig(), {'distill': {'tasks': {'single': 5}}})
  record = to_json(config)
  del record['world']['name']
  del record['rl']
  path.write_text(json.dumps(record))
  claim(path, to_json(config), 'holds results of a config that differs in', defaults=RunConfig())
  # The record is complete now, and a mapping keeps the keys that it has.
  claim(path, to_json(config), 'holds results of a config that differs in', defaults=RunConfig())
  changed = overlay(config, {'world': {'name': 'bfcl'}})
  with pytest.raises(
    ValueError, match="differs in world.name: was 'toolworld', is 'bfcl'; name another"
  ):
    claim(path, to_json(changed), 'holds results of a config that differs in', defaults=RunConfig())


def test_fields_that_say_where_and_how_fast_may_change(tmp_path):
  path = tmp_path / 'config.json'
  complaint = 'holds results of a config that differs in'
  claim(path, to_json(RunConfig()), complaint, defaults=RunConfig())
  moved = overlay(
    RunConfig(),
    {
      'distill': {'base_url': 'http://other:8000/v1', 'concurrency': 2, 'prompt_price': 2.0},
      'engine': {'lanes': 8, 'guesses': 0},
      'mesh': {'tensor': 2},
      'report': {'traces': 1},
      'stages': ('report',),
    },
  )
  claim(path, to_json(moved), complaint, defaults=RunConfig())
  # The record is that of the last start.
  assert json.loads(path.read_text())['distill']['concurrency'] == 2
  with pytest.raises(ValueError) as error:
    claim(
      path,
      to_json(overlay(moved, {'rl': {'alpha': 0.4, 'rows': 1}, 'engine': {'max_len': 64}})),
      complaint,
      defaults=RunConfig(),
    )
  said = 'differs in engine.max_len: was 1024, is 64; rl.alpha: was 0.1, is 0.4; name another'
  assert said in str(error.value)


def test_a_run_of_an_engine_with_tiles_goes_on(tmp_path):
  path = tmp_path / 'config.json'
  record = to_json(RunConfig())
  # Such an engine decoded lanes in tiles, and guessed nothing.
  record['engine']['tile'] = 32
  del record['engine']['guesses']
  path.write_text(json.dumps(record))
  moved = overlay(RunConfig(), {'engine': {'guesses': 3}})
  claim(path, to_json(moved), 'holds results of a config that differs in', defaults=RunConfig())
  assert json.loads(path.read_text()) == to_json(moved)


def test_a_record_of_sections_beside_other_entries(tmp_path):
  path = tmp_path / 'rl.json'
  section = RunConfig().rl
  old = to_json(section)
  del old['warmup_steps']
  path.write_text(json.dumps({'model': 'a', 'options': old}))
  mine = {'model': 'a', 'options': to_json(section)}
  claim(path, mine, 'holds other', defaults={'options': section})
  mine['options']['wave'] = 1  # says when rollouts are written down
  claim(path, mine, 'holds other', defaults={'options': section})
  mine = {'model': 'b', 'options': mine['options'] | {'warmup_steps': 2}}
  with pytest.raises(ValueError, match="model: was 'a', is 'b'; options.warmup_steps: was 0, is 2"):
    claim(path, mine, 'holds other', defaults={'options': section})


HOLDER = """
import pathlib, sys
from dcore_jax.claims import hold
with hold(pathlib.Path(sys.argv[1])):
  print('held', flush=True)
  sys.stdin.read()
"""


def test_a_second_process_is_told_of_the_first(tmp_path):
  folder = tmp_path / 'run'
  command = [sys.executable, '-c', HOLDER, str(folder)]
  with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
    assert first.stdout.readline() == 'held\n'
    said = f'run. is in use by process {first.pid} on {socket.gethostname()}, since 20'
    with pytest.raises(ValueError, match=said), hold(folder):
      pass
    first.kill()
    first.wait()
  # A dead process holds nothing, whatever its file says.
  with hold(folder):
    assert json.loads((folder / '.held_by.json').read_text())['pid'] == os.getpid()
    second = subprocess.run(command, input='', capture_output=True, text=True, check=False)
    assert second.returncode and f'in use by process {os.getpid()}' in second.stderr
    # What holds its folder calls functions that hold it, too.
    with hold(folder):
      pass
    second = subprocess.run(command, input='', capture_output=True, text=True, check=False)
    assert second.returncode
  second = subprocess.run(command, input='', capture_output=True, text=True, check=False)
  assert second.stdout == 'held\n'


def test_folders_that_cannot_be_locked_are_used_all_the_same(tmp_path, monkeypatch):
  def unsupported(*_):
    raise OSError(errno.ENOLCK, 'No locks available')

  monkeypatch.setattr(fcntl, 'flock', unsupported)
  with pytest.warns(UserWarning, match='cannot be locked'), hold(tmp_path):
    pass

  def read_only(*_):
    raise OSError(errno.EROFS, 'Read-only file system')

  monkeypatch.setattr(os, 'open', read_only)
  with hold(tmp_path):
    pass


def test_a_file_is_no_folder(tmp_path):
  (tmp_path / 'runs').write_text('')
  with pytest.raises(ValueError, match='runs. is a file'), hold(tmp_path / 'runs'):
    pass


@pytest.mark.parametrize('held', ['[]', '3', 'null', '"text"'])
def test_a_record_that_is_no_object_is_named(tmp_path, held):
  path = tmp_path / 'config.json'
  path.write_text(held)
  with pytest.raises(ValueError, match=r'config\.json. holds no JSON object'):
    claim(path, {'seed': 0}, 'was begun with other')
