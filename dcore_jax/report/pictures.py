"""Draws what notebooks show of token trees and of token values, on axes that the caller has made.

Letters: T tokens of a row, G rollouts of a group.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.image import AxesImage

from dcore_jax.tokentree import TokenTree


def draw_visible(axes: Axes, tree: TokenTree, row: int, texts: Sequence[str] = ()) -> None:
  """Draws what sees what in a packed row: a dark cell where the query of its line sees the key.

  Args:
    axes: where it is drawn.
    tree: of `tokentree.pack`.
    row: the number of the row.
    texts: one a token of the row, for the ends of the lines; none leaves them out.
  """
  index_T = np.arange(tree.capacity)
  causal_TT = index_T[None, :] <= index_T[:, None]
  visible_TT = causal_TT & (index_T[:, None] < tree.end[row][None, :])
  axes.imshow(visible_TT, cmap='Blues', vmin=0, vmax=1.4, interpolation='nearest')
  axes.set_xlabel('key')
  axes.set_ylabel('query')
  if texts:
    axes.set_yticks(index_T, texts, fontsize=7)
    axes.set_xticks(index_T, texts, fontsize=7, rotation=90)


def draw_token_values(
  axes: Axes, values: Sequence[np.ndarray], limit: float | None = None
) -> AxesImage:
  """Draws a value for every token, a line for each rollout; red is negative and blue positive.

  Args:
    axes: where it is drawn.
    values: of the G rollouts, arrays of unequal lengths; what is behind their ends stays grey.
    limit: the value of the darkest colours; None: the largest there is.
  """
  longest = max(map(len, values))
  filled_GT = np.full((len(values), longest), np.nan)
  for place, value in enumerate(values):
    filled_GT[place, : len(value)] = value
  # All values may be 0, which are white on any scale.
  limit = limit or float(np.nanmax(np.abs(filled_GT))) or 1.0
  axes.set_facecolor('#dddddd')
  image = axes.imshow(
    filled_GT, cmap='RdBu', vmin=-limit, vmax=limit, aspect='auto', interpolation='nearest'
  )
  axes.set_xlabel('token')
  axes.set_ylabel('rollout')
  return image
