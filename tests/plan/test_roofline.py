"""Rooflines against numbers worked out by hand."""

import dataclasses

import pytest

from dcore_jax.models.config import DecoderConfig
from dcore_jax.plan import roofline
from dcore_jax.plan.roofline import Accelerator, Work

MODEL = DecoderConfig(
  vocab_size=100,
  hidden_size=16,
  intermediate_size=32,
  num_hidden_layers=2,
  head_dim=8,
  num_attention_heads=4,
  num_key_value_heads=2,
  tie_word_embeddings=False,
)
# A layer: q and o 16 x 32, k and v 16 x 16, three of 16 x 32. Two operations a multiply-add.
LAYER = 2 * (2 * 16 * 32 + 2 * 16 * 16 + 3 * 16 * 32)


def test_forward_counts_layers_attention_and_the_head_of_loss_tokens():
  work = roofline.forward(MODEL, rows=2, T=64, loss_tokens=10)
  attention = (
    4 * 32 * (64 + 1) / 2
  )  # scores and weighted sum of 32 columns over the keys that a query sees on average
  assert work.flops == work.model_flops == 2 * 64 * 2 * (LAYER + attention) + 10 * 2 * 100 * 16


def test_rematerialisation_does_more_than_the_model_needs():
  """With 'dots' it is attention that is done again, with 'attention' all of a layer but that."""
  forward = roofline.forward(MODEL, 2, 64, 10)
  matrices = 2 * 64 * 2 * LAYER
  attention = 2 * 64 * 2 * 4 * 32 * (64 + 1) / 2
  for remat, again in (
    ('none', 0),
    ('dots', attention),
    ('attention', matrices),
    ('full', matrices + attention),
  ):
    work = roofline.training(MODEL, 2, 64, 10, remat)
    assert (work.model_flops, work.flops) == (3 * forward.flops, 3 * forward.flops + again)


def test_the_slowest_of_the_three_bounds():
  device = Accelerator(flops=100.0, memory_rate=10.0, link_rate=1.0)
  work = Work(model_flops=150.0, flops=200.0, bytes=10.0, sent=1.0)
  assert roofline.bound(work, device) == roofline.Bound(2.0, 'compute', 0.75)
  assert roofline.bound(dataclasses.replace(work, bytes=40.0), device) == roofline.Bound(
    4.0, 'memory', 0.375
  )
  assert roofline.bound(dataclasses.replace(work, sent=6.0), device) == roofline.Bound(
    6.0, 'links', 0.25
  )


def test_decoding_reads_weights_and_cache_at_every_step():
  work = roofline.decoding(MODEL, ways=2, lanes=8, slots=1000, cached=50, steps=3)
  kv = 2 * 2 * 2 * 8 * 2  # keys and values, layers, heads, head size, bytes
  head = 100 * 16
  matrices = MODEL.param_count - head
  assert work.bytes == pytest.approx(3 * (2 * matrices + 1000 * kv) / 2)
  attention = 2 * 4 * 32 * 50.5
  assert work.flops == pytest.approx(3 * 8 * (2 * LAYER + attention + 2 * head) / 2)
