"""The decoder against transformers in torch: every layer, logits, gradients, cache and packed rows,
for each family.
"""

import dataclasses
import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from torch_reference import FAMILIES, TINY, make_model, save_model

from dcore_jax import tokentree
from dcore_jax.models import decoder, hf_checkpoint, rotary

torch = pytest.importorskip('torch', reason='torch is not installed: no reference to compare with')


@functools.partial(jax.jit, static_argnums=0)
def packed_logits(config, params, tokens, position, end):
  # Scanned: half the time to compile.
  hidden = decoder.hidden_states(
    params, config, tokens, position, end, decoder.Execution(unroll=False)
  )
  return jnp.einsum('btd,vd->btv', hidden, decoder.head_matrix(params))


def logits_of(config, params, tokens):
  """Logits of plain causal rows."""
  B, T = tokens.shape
  position = jnp.broadcast_to(jnp.arange(T)[None], (B, T))
  return packed_logits(config, params, jnp.asarray(tokens), position, jnp.full((B, T), T))


@functools.cache
def torch_model(name):
  return make_model(**TINY[name])


def torch_logits(name, tokens):
  with torch.no_grad():
    return torch_model(name)(torch.tensor(np.asarray(tokens, np.int64))).logits.numpy()


@pytest.fixture(scope='module')
def load(tmp_path_factory):
  """name -> (config, params) as imported from what transformers wrote."""

  @functools.cache
  def loaded(name):
    return hf_checkpoint.load_params(save_model(tmp_path_factory.mktemp(name), **TINY[name]))

  return loaded


@pytest.mark.parametrize('name', TINY)
def test_logits_equal_transformers_with_and_without_cache(load, name):
  config, params = load(name)
  assert config.tie_word_embeddings == ('head' not in params)
  tokens = np.random.default_rng(0).integers(0, 61, (3, 17))
  want = torch_logits(name, tokens)
  np.testing.assert_allclose(logits_of(config, params, tokens), want, atol=1e-4)
  cache = decoder.init_cache(config, 3, 20)
  step = jax.jit(decoder.extend, static_argnames='config')
  got = []
  for start, stop in ((0, 8), (8, 12), (12, 13), (13, 14), (14, 15), (15, 16), (16, 17)):
    hidden, cache = step(
      params, config, cache, jnp.asarray(tokens[:, start:stop]), jnp.full((3,), start)
    )
    got.append(hidden @ decoder.head_matrix(params).T[None])
  np.testing.assert_allclose(np.concatenate(got, axis=1), want, atol=1e-4)


@pytest.mark.parametrize('name', FAMILIES)
def test_rotary_tables_and_logits_far_out_equal_transformers(load, name):
  """A row that begins at position 200.

  Logits depend on distances alone, so that the tables are compared as well.
  """
  config, params = load(name)
  tokens = np.random.default_rng(3).integers(0, 61, (1, 9))
  position = np.arange(200, 209)[None]
  with torch.no_grad():
    want = torch_model(name)(
      input_ids=torch.tensor(tokens), position_ids=torch.tensor(position)
    ).logits.numpy()
    table = torch_model(name).model.rotary_emb(torch.zeros(1), torch.tensor(position))[0].numpy()
  got = packed_logits(
    config, params, jnp.asarray(tokens), jnp.asarray(position), jnp.full((1, 9), 9)
  )
  np.testing.assert_allclose(got, want, atol=1e-4)
  cos, _ = rotary.rope_tables(
    jnp.asarray(position), config.head_dim, config.rope_theta, config.rope_scaling
  )
  np.testing.assert_allclose(cos[0, :, 0], table[0, :, : config.head_dim // 2], atol=1e-4)


@pytest.mark.parametrize('name', FAMILIES)
def test_every_layer_equals_transformers(load, name):
  """The first n layers followed by the final norm, for each n."""
  config, params = load(name)
  tokens = np.random.default_rng(4).integers(0, 61, (2, 13))
  model = torch_model(name).model
  with torch.no_grad():
    states = model(torch.tensor(tokens), output_hidden_states=True).hidden_states
    # The last one is normed already.
    want = [model.norm(state).numpy() for state in states[1:-1]] + [states[-1].numpy()]
  position = jnp.broadcast_to(jnp.arange(13)[None], (2, 13))
  end = jnp.full((2, 13), 13)
  execution = decoder.Execution('reference', unroll=False)
  run = jax.jit(functools.partial(decoder.hidden_states, execution=execution), static_argnums=1)
  for count, expected in enumerate(want, 1):
    first_layers = operator.itemgetter(slice(count))
    first = params | {'layers': jax.tree.map(first_layers, params['layers'])}
    got = run(
      first,
      dataclasses.replace(config, num_hidden_layers=count),
      jnp.asarray(tokens),
      position,
      end,
    )
    np.testing.assert_allclose(got, expected, atol=1e-4, err_msg=f'{count} layers')


def forest():
  """A row with two dialogues that branch, one plain sequence, and padding, with the flat sequences
  it was packed from.
  """
  rng = np.random.default_rng(5)
  trunk = rng.integers(0, 61, 7)
  other = rng.integers(0, 61, 4)
  flat = [np.r_[trunk, rng.integers(0, 61, length)].astype(np.int32) for length in (5, 3, 6)]
  flat += [np.r_[other, rng.integers(0, 61, length)].astype(np.int32) for length in (2, 4)] + [
    rng.integers(0, 61, 6, np.int32)
  ]
  sequences = [
    tokentree.TokenSequence(
      tokens, np.r_[0, np.ones(len(tokens) - 1)].astype(np.float32), len(tokens)
    )
    for tokens in flat
  ]
  return flat, tokentree.pack(sequences, 64)


@pytest.mark.parametrize('name', FAMILIES)
def test_packed_rows_equal_transformers_on_each_sequence(load, name):
  config, params = load(name)
  flat, tree = forest()
  assert tree.rows == 1 and tree.dedup > 1.3 and tree.live < tree.capacity
  logits = np.asarray(
    packed_logits(config, params, *map(jnp.asarray, (tree.tokens, tree.position, tree.end)))
  )
  for tokens, path in zip(flat, tree.paths, strict=True):
    np.testing.assert_allclose(
      logits.reshape(-1, logits.shape[-1])[path], torch_logits(name, tokens[None])[0], atol=1e-4
    )


@pytest.mark.parametrize('name', [*FAMILIES, 'qwen3_tied'])
def test_gradients_of_packed_rows_equal_torch_on_each_sequence(load, name, tmp_path):
  """The sum of next-token losses over all sequences; what they share counts once for each."""
  from safetensors.numpy import load_file

  config, params = load(name)
  flat, tree = forest()
  model = make_model(**TINY[name])
  for tokens in flat:
    row = torch.tensor(tokens.astype(np.int64))[None]
    (model(row, labels=row).loss * (len(tokens) - 1)).backward()

  def loss(values):
    logp = jax.nn.log_softmax(
      packed_logits(config, values, *map(jnp.asarray, (tree.tokens, tree.position, tree.end)))
    )
    row = jnp.arange(tree.rows)[:, None]
    picked = logp[row, jnp.maximum(tree.parent, 0), tree.tokens]
    return -jnp.sum(jnp.where(tree.parent >= 0, tree.weight * picked, 0.0))

  hf_checkpoint.save_checkpoint(
    tmp_path / 'grads', config, jax.jit(jax.grad(loss))(params), dtype='float32'
  )
  got = load_file(tmp_path / 'grads' / 'model.safetensors')
  want = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
  assert got.keys() == want.keys()
  for key, gradient in want.items():
    assert np.abs(got[key] - gradient).max() <= 1e-4 * np.abs(gradient).max(), key
