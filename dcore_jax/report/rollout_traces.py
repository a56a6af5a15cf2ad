"""Reads the rollouts that reinforcement learning keeps, as traces with a value for each token.

checkpoints/*/rollouts/<step>.<wave>.npz hold what the policy wrote, token by token, see
`train.journal`. Prompts, rewards and verdicts are not in them, so a trace is a response alone.

Letters: T tokens of a response.
"""

import pathlib
import zipfile
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from dcore_jax.data.show_rows import token_texts

_COLUMNS = ('tokens', 'logprobs', 'entropies', 'lengths', 'key_ids', 'finished')
# Numbers of a key that all rollouts of a group have in common: step and prompt.
_GROUP = 2


def find_rollouts(workdir: pathlib.Path) -> list[pathlib.Path]:
  """Finds the files of a run, in the order of their steps."""
  return sorted(workdir.glob('checkpoints/*/rollouts/*.npz'))


def read_rollouts(
  path: pathlib.Path, tokenizer: Any, psi: tuple[float, float] | None = None
) -> list[dict[str, Any]]:
  """Reads the rollouts of a file, the groups together.

  Args:
    path: the file.
    tokenizer: the policy's.
    psi: (alpha, delta) of min(alpha H, delta), what DA-GRPO gives a token of a silent group
      (D-CORE, eq. 8); None leaves it out.

  Raises:
    ValueError: the file is damaged or no such file.
  """
  try:
    # A file in a work directory is data: no pickle.
    with np.load(path, allow_pickle=False) as file:
      columns = {name: file[name] for name in _COLUMNS}
    ends = np.cumsum(columns['lengths'])
    if len(columns['tokens']) != (ends[-1] if len(ends) else 0):
      raise ValueError(f'{len(columns["tokens"])} tokens')
  except (EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error) as error:
    raise ValueError(f'{path} holds no rollouts: {type(error).__name__} {error}') from error
  parts = {}
  for name in ('tokens', 'logprobs', 'entropies'):
    parts[name] = np.split(columns[name], ends[:-1])
  keys = [tuple(key) for key in columns['key_ids'].tolist()]
  shared = _shared(keys, parts['tokens'])
  traces = []
  for place in sorted(range(len(keys)), key=lambda place: keys[place]):
    texts = token_texts(tokenizer, parts['tokens'][place].tolist())
    entropy_T = parts['entropies'][place]
    values = {
      'text': texts,
      'entropy': entropy_T.tolist(),
      'logprob': parts['logprobs'][place].tolist(),
      'shared': shared[place],
    }
    if psi is not None:
      alpha, delta = psi
      values['psi'] = np.minimum(alpha * entropy_T, delta).tolist()
    text = ''.join(texts)
    step = keys[place][0]
    traces.append(
      {
        'id': '/'.join(map(str, keys[place])),
        'kind': f'step {step}',
        'query': '',
        'reason': '' if columns['finished'][place] else 'cut off',
        'messages': [{'role': 'assistant', 'content': text, 'tokens': values}],
      }
    )
  return traces


def _shared(keys: Sequence[tuple[int, ...]], tokens: Sequence[np.ndarray]) -> list[list[int]]:
  """Counts, for each token, the rollouts of its group that agree up to it, itself included."""
  # Keys of episodes end in the turn: later turns answer different prompts, so turns are apart.
  groups: dict[tuple, list[int]] = {}
  for place, key in enumerate(keys):
    groups.setdefault((key[:_GROUP], key[_GROUP + 1 :]), []).append(place)
  counts: list[list[int]] = [[] for _ in keys]
  for members in groups.values():
    # Rollouts that agree so far are one list, which every token parts further.
    alike = [members]
    depth = 0
    while alike:
      parted = []
      for together in alike:
        by_token: dict[int, list[int]] = {}
        for place in together:
          if depth < len(tokens[place]):
            by_token.setdefault(int(tokens[place][depth]), []).append(place)
        parted += by_token.values()
      for together in parted:
        for place in together:
          counts[place].append(len(together))
      alike = parted
      depth += 1
  return counts
