"""The organism, and a decoder of a few thousand random parameters, as a person holds them."""

import jax
import pytest

import dcore_jax
from dcore_jax.api.model import Model
from dcore_jax.models import decoder


@pytest.fixture(scope='session')
def organism():
  return dcore_jax.load('organism')


@pytest.fixture(scope='session')
def tiny(model, tokenizer, tmp_path_factory):
  """Random weights of the decoder that all tests share, beside its tokenizer's files."""
  folder = tmp_path_factory.mktemp('tiny')
  tokenizer.save_pretrained(folder)
  params = decoder.init_params(model, jax.random.key(0))
  return Model(model, params=params, tokenizer=tokenizer, folder=folder)
