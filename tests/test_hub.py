"""Names of the hub: commits are pinned, files are compared with their hashes, code stays away."""

import json
import pathlib
import shutil

import huggingface_hub
import pytest

from dcore_jax import hub
from dcore_jax.data.records import load_records
from dcore_jax.rollout.policy import ORGANISM, load_policy
from dcore_jax.run.config import default_config, read_config
from dcore_jax.run.needed import find_for_rows
from dcore_jax.run.pins import pin
from dcore_jax.run.pipeline import Pipeline
from tests.fake_hub import fake_hub


@pytest.fixture(name='fake')
def fixture_fake(monkeypatch, tmp_path):
  with fake_hub(monkeypatch, tmp_path / 'cache') as fake:
    yield fake


def organism(**more):
  names = ('config.json', 'model.safetensors', 'tokenizer.json', 'tokenizer_config.json')
  files = {name: (ORGANISM / name).read_bytes() for name in names}
  files['chat_template.jinja'] = (ORGANISM / 'chat_template.jinja').read_bytes()
  return files | {name: text.encode() for name, text in more.items()}


def test_a_model_is_downloaded_once_and_without_code(fake, monkeypatch):
  commit = fake.push('model', 'owner/tiny', organism(**{'modeling.py': 'x', 'sub/a.json': '{}'}))
  folder = hub.find('owner/tiny', 'model')
  assert folder.name == commit
  assert not (folder / 'modeling.py').exists() and not (folder / 'sub').exists()
  assert not any(path.endswith('.py') for path in fake.requests)
  config = default_config().model
  config.path = f'owner/tiny@{commit}'
  assert load_policy(config, seed=0).path == folder
  # Without the network the cache serves the branch and the commit.
  monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
  fake.requests.clear()
  assert hub.find('owner/tiny', 'model') == hub.find(config.path, 'model') == folder
  assert not fake.requests
  with pytest.raises(ValueError, match="'owner/other' is no directory.*`hf download owner/other`"):
    hub.find('owner/other', 'model')


def test_a_damaged_file_is_named(fake):
  fake.push('model', 'owner/tiny', organism())
  folder = hub.find('owner/tiny', 'model')
  for name in ('model.safetensors', 'config.json'):
    blob = (folder / name).resolve()
    held = blob.read_bytes()
    blob.write_bytes(held[:-1] + bytes([held[-1] ^ 1]))
    with pytest.raises(ValueError, match=f"{name} of 'owner/tiny' is damaged: its hash is .* has"):
      hub.find('owner/tiny', 'model')
    blob.write_bytes(held)
  assert hub.find('owner/tiny', 'model') == folder


def test_what_is_missing_says_how_to_get_it(fake, monkeypatch):
  with pytest.raises(ValueError, match=r'`hf download a/b --repo-type dataset --revision v1`'):
    hub.find('a/b@v1', 'dataset')
  monkeypatch.setattr(huggingface_hub.constants, 'ENDPOINT', 'http://127.0.0.1:9')
  with pytest.raises(ValueError, match='cannot be downloaded') as error:
    hub.find('a/b', 'model')
  assert '\n' not in str(error.value)
  with pytest.raises(ValueError, match='no_slash.*is not there'):
    hub.find('no_slash', 'model')


def test_records_of_the_hub_are_read_from_their_files(fake, tmp_path):
  one = [{'messages': [], 'only': 1}]
  two = [{'messages': [], 'other': {'a': 2}}]
  single = {'data.json': json.dumps(one).encode(), 'README.md': b'# card', 'load.py': b'raise'}
  commit = fake.push('dataset', 'owner/single', single)
  fake.push(
    'dataset', 'owner/several', {'a.json': b'[]', 'sub/b.jsonl': json.dumps(two[0]).encode()}
  )
  assert load_records('owner/single') == load_records(f'owner/single@{commit}') == one
  # Read as it stands: Arrow would give every record all fields.
  assert load_records('owner/several#sub/b.jsonl') == two
  with pytest.raises(ValueError, match="has no file 'c.json'"):
    load_records('owner/several#c.json')
  with pytest.raises(ValueError, match='leads out of the data set'):
    load_records('owner/several#../../a.json')
  assert not any(path.endswith('.py') for path in fake.requests)


def test_what_is_here_goes_before_the_hub(fake, tmp_path, monkeypatch):
  monkeypatch.setenv('DCORE_DATA', str(tmp_path))
  (tmp_path / 'owner' / 'rows').mkdir(parents=True)
  (tmp_path / 'owner' / 'rows' / 'data.jsonl').write_text('{"a": 1}\n')
  assert load_records('owner/rows') == [{'a': 1}]
  commits = {}
  assert hub.pinned('owner/rows', 'dataset', commits) == 'owner/rows'
  assert not commits and not fake.requests


def test_a_run_keeps_the_commits_of_its_first_start(fake, tmp_path):
  first = fake.push('model', 'owner/tiny', organism())
  rows = fake.push('dataset', 'owner/rows', {'data.json': b'[]'})
  config = default_config()
  config.model.path = 'owner/tiny'
  config.stages = ('sft', 'export')
  file = tmp_path / 'rows.json'
  file.write_text('[]')
  config.sft.files = ('hermes:owner/rows', str(file))
  config.rl.files = ('owner/unused',)
  workdir = tmp_path / 'w'
  run = Pipeline(config, workdir)
  assert run.config.model.path == f'owner/tiny@{first}'
  assert run.config.sft.files == (f'hermes:owner/rows@{rows}', str(file))
  record = json.loads((workdir / 'config.json').read_text())
  assert record['model']['path'] == 'owner/tiny'
  assert record['hub'] == {'owner/tiny': first, 'owner/rows': rows}
  # The branch has moved; the run has not.
  second = fake.push('model', 'owner/tiny', organism(**{'special_tokens_map.json': '{}'}))
  assert Pipeline(config, workdir).config.model.path == f'owner/tiny@{first}'
  assert Pipeline(config, tmp_path / 'other').config.model.path == f'owner/tiny@{second}'
  shutil.rmtree(tmp_path / 'other')
  config.model.path = f'owner/tiny@{second}'
  with pytest.raises(ValueError, match='model.path: was .owner/tiny., is'):
    Pipeline(config, workdir)


def test_rows_that_were_distilled_apart_keep_their_commits(fake, tmp_path):
  model = fake.push('model', 'owner/tiny', organism())
  seeds = fake.push('dataset', 'owner/seeds', {'data.json': b'[]'})
  config = default_config()
  config.model.path = 'owner/tiny'
  config.distill.files = ('owner/seeds',)
  config.rl.files = ('owner/gone',)
  workdir = tmp_path / 'w'
  found = find_for_rows(read_config(config), workdir)
  assert found.model.path == f'owner/tiny@{model}'
  assert found.distill.files == (f'owner/seeds@{seeds}',)
  # What distillation does not read is as it was, and need not be there.
  assert found.rl.files == ('owner/gone',) and found.stages == read_config(config).stages
  beside = json.loads((workdir / 'distill' / 'hub.json').read_text())
  assert beside == {'hub': {'owner/tiny': model, 'owner/seeds': seeds}}
  # The branches move. Rows that are gone on with, and the run on the rows, do not.
  fake.push('dataset', 'owner/seeds', {'data.json': b'[1]'})
  fake.push('model', 'owner/tiny', organism(**{'special_tokens_map.json': '{}'}))
  assert find_for_rows(read_config(config), workdir) == found
  config.stages = ('distill', 'sft')
  run = Pipeline(config, workdir)
  assert (run.config.model, run.config.distill.files) == (found.model, found.distill.files)
  assert json.loads((workdir / 'config.json').read_text())['hub'] == beside['hub']


def test_an_endpoint_distils_without_the_model(fake, tmp_path):
  config = default_config()
  config.model.path = 'owner/elsewhere'
  config.distill.backend = 'openai'
  found = find_for_rows(read_config(config), tmp_path / 'w')
  assert found.model.path == 'owner/elsewhere'
  assert not fake.requests and not (tmp_path / 'w').exists()


def test_all_that_is_missing_is_named_at_once(fake, tmp_path):
  config = default_config()
  config.model.path = 'owner/gone'
  config.stages = ('distill', 'rl')
  config.recipe.seeds.update(
    {
      'unused': {'source': 'owner/unused', 'count': 0},
      'world': {'source': 'toolworld', 'count': 3},
      'hub': {'source': 'owner/lost', 'single': 2},
      'file': {'source': 'lost/rows.json', 'count': -1, 'get': 'curl lost'},
    }
  )
  config.recipe.allow_unchecked = True
  with pytest.raises(ValueError) as error:
    Pipeline(config, tmp_path / 'w')
  said = str(error.value)
  assert 'hf download owner/gone`' in said
  assert 'hf download owner/lost --repo-type dataset' in said
  assert "recipe.seeds.file: 'lost/rows.json' is not there" in said and 'curl lost' in said
  assert 'unused' not in said
  assert not (tmp_path / 'w').exists()


def test_a_record_that_is_no_pin_is_refused(fake, tmp_path):
  fake.push('model', 'owner/tiny', organism())
  config = default_config()
  config.model.path = 'owner/tiny'
  record = tmp_path / 'config.json'
  record.write_text(json.dumps({'hub': {'owner/tiny': 'main'}}))
  with pytest.raises(ValueError, match="'main' is no commit of 'owner/tiny'"):
    pin(read_config(config), pathlib.Path(record))
