"""A model as a person holds it: an NNX module that is loaded by name, answers, and is saved."""

import copy
import pathlib

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dcore_jax
from dcore_jax.api.model import Model
from dcore_jax.chat.messages import Message, ToolCall
from dcore_jax.models import decoder
from dcore_jax.rollout.policy import ORGANISM
from tests.serve.servers import SIGNATURES

TOKENS = np.arange(12).reshape(2, 6) + 5
FIND = {
  'type': 'function',
  'function': {
    'name': 'find_order',
    'parameters': {'type': 'object', 'properties': {'customer': {'type': 'string'}}},
  },
}


@pytest.fixture(scope='module')
def caller(organism):
  """The organism with a template that shows tools as its own prompts do."""
  tokenizer = copy.deepcopy(organism.tokenizer)
  tokenizer.chat_template = SIGNATURES
  params = organism.params()
  return Model(organism.config, params=params, tokenizer=tokenizer, folder=organism.folder)


def test_a_loaded_model_is_a_module(organism):
  position = jnp.broadcast_to(jnp.arange(6)[None], (2, 6))
  end = jnp.full((2, 6), 6)
  params = organism.params()
  hidden = decoder.hidden_states(params, organism.config, jnp.asarray(TOKENS), position, end)
  logits = np.asarray(hidden) @ np.asarray(decoder.head_matrix(params)).T
  np.testing.assert_allclose(organism(TOKENS), logits, atol=1e-4)
  np.testing.assert_allclose(nnx.jit(lambda m, t: m(t))(organism, TOKENS), logits, atol=1e-4)
  graph, state = nnx.split(organism)
  compiled = jax.jit(lambda state, tokens: nnx.merge(graph, state)(tokens))
  np.testing.assert_allclose(compiled(state, TOKENS), logits, atol=1e-4)


def test_an_answer_is_data(caller):
  answer = caller.generate('find the order of Mora.', tools=[FIND], temperature=0, max_tokens=64)
  assert answer.calls == (ToolCall('find_order', {'customer': 'Mora'}),)
  assert 'find_order' in answer.reasoning and answer.content == '' and answer.finished
  assert answer.prompt_tokens > 10 and 10 < answer.completion_tokens < 64
  message = answer.to_message()
  assert message['role'] == 'assistant' and message['reasoning_content'] == answer.reasoning
  [call] = message['tool_calls']
  assert call['function'] == {'name': 'find_order', 'arguments': {'customer': 'Mora'}}


def test_many_conversations_are_answered_together(caller):
  """Messages in either form, each with random numbers of its own, which its seed names."""
  asked = [
    'find the order of Mora.',
    [Message('user', 'find the order of Mora.')],
    [{'role': 'user', 'content': 'find the order of Karo.'}],
  ]
  options = dict(tools=[FIND], max_tokens=64, temperature=0)
  first, second, third = dcore_jax.generate(caller, asked, **options)
  assert first == second and third.calls[0].arguments == {'customer': 'Karo'}
  drawn = [
    dcore_jax.generate(caller, asked[:1] * 2, max_tokens=8, temperature=1.5, top_k=0, seed=seed)
    for seed in (1, 1, 2)
  ]
  assert drawn[0] == drawn[1] != drawn[2]


def test_what_cannot_be_sampled_is_named(caller):
  with pytest.raises(ValueError, match="'top_kk'.*did you mean 'top_k'"):
    caller.generate('hi', top_kk=3)
  with pytest.raises(ValueError, match='temperature'):
    caller.generate('hi', temperature=-1)


def test_the_engine_takes_the_weights_that_the_model_has(caller):
  """Also those that a module was given later, as a Flax optimizer does."""
  graph, state = nnx.split(caller)
  changed = nnx.merge(graph, jax.tree.map(jnp.zeros_like, state))
  asked = dict(tools=[FIND], temperature=0, max_tokens=8)
  right = caller.generate('find the order of Mora.', **asked)
  assert changed.generate('find the order of Mora.', **asked) != right
  assert caller.generate('find the order of Mora.', **asked) == right


def test_a_saved_model_is_loaded_again(tiny, tmp_path):
  tiny.save(tmp_path / 'wide', dtype='float32')
  again = dcore_jax.load(tmp_path / 'wide')
  jax.tree.map(np.testing.assert_array_equal, again.params(), tiny.params())
  assert len(again.tokenizer) == len(tiny.tokenizer)
  with pytest.raises(FileExistsError, match='not empty'):
    tiny.save(tmp_path / 'wide')
  tiny.save(tmp_path / 'wide', overwrite=True)
  narrow = dcore_jax.load(tmp_path / 'wide', dtype='bfloat16')
  assert {leaf.dtype for leaf in jax.tree.leaves(narrow.params())} == {jnp.dtype('bfloat16')}


def test_a_model_on_the_hub_is_downloaded_without_code(monkeypatch, tmp_path):
  asked = {}

  def snapshot_download(name, **options):
    asked.update(options, name=name)
    return str(ORGANISM)

  monkeypatch.setattr(huggingface_hub, 'snapshot_download', snapshot_download)
  assert dcore_jax.load('someone/organism').folder == pathlib.Path(ORGANISM)
  assert asked['name'] == 'someone/organism'
  kept = huggingface_hub.utils.filter_repo_objects(
    [
      'config.json',
      'model-1.safetensors',
      'modeling.py',
      'pytorch_model.bin',
      'fp16/a.safetensors',
    ],
    allow_patterns=asked['allow_patterns'],
    ignore_patterns=asked['ignore_patterns'],
  )
  assert list(kept) == ['config.json', 'model-1.safetensors']


def test_what_cannot_be_loaded_is_named(monkeypatch, tmp_path):
  def unreachable(*_, **__):
    raise OSError('no route to host')

  monkeypatch.setattr(huggingface_hub, 'snapshot_download', unreachable)
  with pytest.raises(ValueError, match="'someone/model' is no directory here.*hub: no route"):
    dcore_jax.load('someone/model')
  with pytest.raises(ValueError, match='nowhere'):
    dcore_jax.load('nowhere')
  with pytest.raises(ValueError, match='float16'):
    dcore_jax.load('organism', dtype='float16')
