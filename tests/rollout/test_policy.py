"""What is said of a model directory that cannot be used."""

import json
import shutil

import pytest

from dcore_jax.config import ModelSection
from dcore_jax.rollout.policy import ORGANISM, load_policy

POINTER = 'version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 123\n'


@pytest.fixture
def folder(tmp_path):
  """A copy of the organism, to be damaged."""
  for file in ORGANISM.iterdir():
    if file.suffix in ('.json', '.safetensors', '.jinja'):
      shutil.copy(file, tmp_path)
  return tmp_path


@pytest.mark.parametrize(
  'name, text, said',
  [
    ('tokenizer.json', '{"a":', 'no tokenizer can be loaded from .*JSON'),
    ('tokenizer.json', '{}', 'no tokenizer can be loaded from .*tokenizer.json.*KeyError'),
    ('tokenizer_config.json', '{"a":', 'no tokenizer can be loaded from .*JSON'),
    ('tokenizer.json', POINTER, 'tokenizer.json is a pointer of Git LFS.*git lfs pull'),
    ('model.safetensors', POINTER, 'model.safetensors is a pointer of Git LFS.*git lfs pull'),
    ('config.json', '[]', 'config.json does not hold a JSON object'),
    ('config.json', '{"a":', 'config.json is not JSON'),
    ('generation_config.json', '[]', 'generation_config.json does not hold a JSON object'),
    ('generation_config.json', '{"eos_token_id": "x"}', 'eos_token_id is .*expected token ids'),
    ('chat_template.jinja', '{% if %}', 'the chat template of .* fails'),
  ],
)
def test_a_damaged_file_is_an_error_that_names_it(folder, name, text, said):
  (folder / name).write_text(text)
  with pytest.raises(ValueError, match=said) as caught:
    assert load_policy(ModelSection(path=str(folder)), seed=0).stop_ids
  assert '\n' not in str(caught.value) and len(str(caught.value)) < 700


def test_a_folder_without_a_tokenizer_says_which_files_it_looked_for(folder):
  for name in ('tokenizer.json', 'tokenizer_config.json'):
    (folder / name).unlink()
  with pytest.raises(ValueError, match='no tokenizer is in .*none of .*tokenizer.json'):
    load_policy(ModelSection(path=str(folder)), seed=0)


def test_the_model_is_told_of_before_its_tokenizer(folder):
  record = json.loads((folder / 'config.json').read_text())
  (folder / 'config.json').write_text(json.dumps(record | {'mystery': 1}))
  (folder / 'tokenizer.json').unlink()
  with pytest.raises(ValueError, match='unknown fields .*mystery'):
    load_policy(ModelSection(path=str(folder)), seed=0)


def test_a_byte_order_mark_is_no_part_of_a_config(folder):
  text = (folder / 'generation_config.json').read_text()
  (folder / 'generation_config.json').write_text('\ufeff' + text, encoding='utf-8')
  assert load_policy(ModelSection(path=str(folder)), seed=0).stop_ids
