"""Pictures of token trees and token values show what the arrays say."""

import numpy as np
from matplotlib.figure import Figure

from dcore_jax.models.attention.reference import tree_mask
from dcore_jax.report.pictures import draw_token_values, draw_visible
from dcore_jax.tokentree import TokenSequence, pack


def axes():
  return Figure().add_subplot()


def test_what_sees_what_is_what_attention_reads():
  sequences = []
  for last in (7, 8):
    tokens = np.array([1, 2, 3, last], np.int32)
    sequences.append(TokenSequence(tokens, np.zeros(4, np.float32), shared=4))
  tree = pack(sequences, 8)
  where = axes()
  draw_visible(where, tree, 0, list('abcdefgh'))
  np.testing.assert_array_equal(where.images[0].get_array(), tree_mask(tree.end)[0])
  assert [label.get_text() for label in where.get_yticklabels()] == list('abcdefgh')


def test_values_end_where_their_rollouts_do():
  image = draw_token_values(axes(), [np.array([0.5, -2.0]), np.array([1.0])])
  shown = np.ma.filled(image.get_array(), np.nan)
  np.testing.assert_array_equal(shown, [[0.5, -2], [1, np.nan]])
  assert image.get_clim() == (-2, 2)
  assert draw_token_values(axes(), [np.zeros(3)]).get_clim() == (-1, 1)
