"""A decoder of a few hundred parameters, and rows as they are without packing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcore_jax.models import decoder
from dcore_jax.models.config import DecoderConfig


@pytest.fixture(scope='session')
def config() -> DecoderConfig:
  return DecoderConfig(
    vocab_size=23,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
  )


@pytest.fixture(scope='session')
def params(config) -> decoder.Params:
  """Drawn by numpy, which compiles nothing, and as numpy arrays, which no donation can eat."""
  rng = np.random.default_rng(0)

  def draw(spec):
    return (np.ones(spec.shape) if spec.init is None else rng.normal(0, 0.3, spec.shape)).astype(
      np.float32
    )

  return jax.tree.map(draw, decoder.abstract_params(config))


@pytest.fixture(scope='session')
def flat_log_p(config):
  """(params, sequences) -> (token ids [N, T - 1], log-probabilities [N, T - 1, V]) at tokens 1.. of
  each, alone in its row.
  """

  def log_p(params, sequences):
    T = max(len(sequence.tokens) for sequence in sequences)
    tokens = np.stack(
      [np.pad(sequence.tokens, (0, T - len(sequence.tokens))) for sequence in sequences]
    )
    position = np.broadcast_to(np.arange(T), tokens.shape)
    hidden = decoder.hidden_states(params, config, tokens, position, np.full(tokens.shape, T))
    return tokens[:, 1:], jax.nn.log_softmax(
      jnp.einsum('btd,vd->btv', hidden, decoder.head_matrix(params))
    )[:, :-1]

  return log_p


@pytest.fixture(scope='session')
def flat_scores(flat_log_p):
  """(params, sequences) -> (log-probabilities, entropies) [N, T - 1] of tokens 1.. of each, alone
  in its row.
  """

  def scores(params, sequences):
    targets, log_p = flat_log_p(params, sequences)
    return jnp.take_along_axis(log_p, targets[..., None], axis=2)[..., 0], -(
      jnp.exp(log_p) * log_p
    ).sum(axis=2)

  return scores


@pytest.fixture(scope='session')
def padded():
  """(sequences, values by sequence) -> [N, T - 1], aligned with `flat_scores`."""

  def pad(sequences, values):
    T = max(len(sequence.tokens) for sequence in sequences)
    return np.stack([np.pad(value, (0, T - len(value)))[1:] for value in values]).astype(np.float32)

  return pad
