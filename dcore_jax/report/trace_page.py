"""Writes one HTML page over many traces, which fetches nothing and shows 10,000 of them at once.

The page holds an index, with a column for each thing that the list and its filters need, and the
traces in chunks that the browser reads when they are looked at. Both are JSON, deflated, in base64.
Base64 has no '<', so that no text of a model can end its block; `trace_page.js` shows texts as text
nodes, and a content security policy names the hash of this one script.

A trace is a record of `evaluate.trajectories`. Its messages may also hold `tokens`: {'text':
[str], and any of 'entropy', 'logprob' (nats), 'psi' and 'shared' (rollouts of the group that agree
up to this token): [number or None]}, for the colours of tokens.
"""

import base64
import hashlib
import json
import math
import os
import pathlib
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import markupsafe
import numpy as np

from dcore_jax.files import replace_text
from dcore_jax.pages import render_page
from dcore_jax.progress import SLOW, progress
from dcore_jax.report.figures import number

PAGE_FILE = 'traces.html'
MEASURES = ('entropy', 'logprob', 'psi', 'shared')
# Characters of JSON in a chunk: a few milliseconds for the browser to read, and enough text for
# deflate to find what repeats.
_CHUNK = 1 << 19
_TITLE = 90  # characters of a request that the list has room for
_UNKNOWN = -1  # in place of 0 or 1


def write_trace_page(
  path: str | os.PathLike, sources: dict[str, Sequence[dict[str, Any]]], title: str
) -> int:
  """Writes the page and returns the number of traces on it.

  Args:
    path: the file.
    sources: the traces of each model or file, by its name.
    title: the page's.

  Raises:
    ValueError: no traces, or values of tokens that do not fit their texts.
  """
  here = pathlib.Path(__file__)
  script = here.with_suffix('.js').read_text(encoding='utf-8')
  digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
  page = render_page(
    here.with_suffix('.html.jinja'),
    title=title,
    # Our own script and base64 are all that is not escaped.
    script=markupsafe.Markup(script),
    script_hash=markupsafe.Markup(f'sha256-{digest}'),
    blocks=list(_blocks(sources)),
  )
  replace_text(pathlib.Path(path), page)
  return sum(map(len, sources.values()))


def _blocks(sources: dict[str, Sequence[dict[str, Any]]]) -> Iterable[tuple[str, str]]:
  """Yields (name, text) of the blocks of data."""
  records = []
  numbers = []
  for place, traces in enumerate(sources.values()):
    records += traces
    numbers += [place] * len(traces)
  if not records:
    raise ValueError('no traces to show')
  bodies = [_body(record) for record in records]
  starts = []
  chunk: list[str] = []
  size = 0
  bar = progress(bodies, description='write traces', unit='trace', delay=SLOW)
  for place, body in enumerate(bar):
    text = json.dumps(body)
    if chunk and size + len(text) > _CHUNK:
      yield f'chunk{len(starts) - 1}', encode(f'[{",".join(chunk)}]')
      chunk = []
      size = 0
    if not chunk:
      starts.append(place)
    chunk.append(text)
    size += len(text)
  yield f'chunk{len(starts) - 1}', encode(f'[{",".join(chunk)}]')
  index = _index(records, bodies) | {
    'source': numbers,
    'sources': [name or 'one model' for name in sources],
    'starts': starts,
  }
  yield 'index', encode(json.dumps(index))


def encode(text: str) -> str:
  """Returns deflated text in base64; the browser's `DecompressionStream('deflate')` reads it."""
  return base64.b64encode(zlib.compress(text.encode('ascii'))).decode()


def _index(records: Sequence[dict[str, Any]], bodies: Sequence[dict[str, Any]]) -> dict[str, Any]:
  kinds = {}
  for record in records:
    kinds.setdefault(str(record['kind']), len(kinds))
  lengths = [_tokens_of(record) for record in records]
  unit = 'tokens'
  # One unit for all, since a filter compares them.
  if any(length is None for length in lengths):
    unit = 'characters'
    lengths = [_characters_of(body) for body in bodies]
  return {
    'id': [str(record['id']) for record in records],
    'title': [' '.join(body['query'][:_TITLE].split()) for body in bodies],
    'kind': [kinds[str(record['kind'])] for record in records],
    'kinds': [kind or 'no kind' for kind in kinds],
    'right': [_flag(record.get('correct')) for record in records],
    'lazy': [_flag(record.get('lazy')) for record in records],
    'length': lengths,
    'unit': unit,
    'scales': _scales(bodies),
  }


def _flag(value: Any) -> int:
  return int(value) if isinstance(value, bool) else _UNKNOWN


def _tokens_of(record: dict[str, Any]) -> int | None:
  """Returns the tokens that the model wrote, or of its reasonings; None where nobody counted."""
  counted = [len(item['tokens']['text']) for item in record['messages'] if item.get('tokens')]
  if counted:
    return sum(counted)
  lengths = record.get('reasoning_tokens')
  if not isinstance(lengths, list) or any(number(length) is None for length in lengths):
    return None
  return int(sum(lengths))


def _characters_of(body: dict[str, Any]) -> int:
  return sum(len(item['content']) for item in body['messages'] if item['role'] == 'assistant')


def _body(record: dict[str, Any]) -> dict[str, Any]:
  """Returns what the browser shows of a trace."""
  messages = []
  for message in record['messages']:
    shown = {'role': str(message['role']), 'content': _text(message['content'])}
    rest = {}
    # Calls and thoughts of other programs stand beside the text. Empty ones say nothing.
    for field, value in message.items():
      if field not in ('role', 'content', 'tokens') and value not in (None, '', []):
        rest[field] = value
    if rest:
      shown['more'] = json.dumps(rest, indent=1, ensure_ascii=False)
    if message.get('tokens'):
      shown['tokens'] = _token_values(message['tokens'], f'trace {record["id"]}')
    messages.append(shown)
  query = _text(record.get('query'))
  return {'query': query, 'reason': _text(record.get('reason')), 'messages': messages}


def _text(value: Any) -> str:
  if value is None:
    return ''
  return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _token_values(tokens: dict[str, Any], where: str) -> dict[str, Any]:
  texts = tokens.get('text')
  if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
    raise ValueError(f'{where}: tokens without a list of texts')
  found: dict[str, Any] = {'text': texts}
  for name in MEASURES:
    values = tokens.get(name)
    if values is None:
      continue
    if not isinstance(values, list) or len(values) != len(texts):
      raise ValueError(f'{where}: {name} is no list of {len(texts)} values, one a token')
    # Three digits are more than a colour or a reader can tell apart, and halve the page.
    found[name] = [_rounded(value) for value in values]
  return found


def _rounded(value: Any) -> float | int | None:
  if number(value) is None:
    return None
  return value if isinstance(value, int) else float(f'{value:.3g}')


def _scales(bodies: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
  """Returns (pale end, full end) of the colours of each measure, one scale for all traces."""
  values: dict[str, list[float]] = {}
  for body in bodies:
    for message in body['messages']:
      for name, column in message.get('tokens', {}).items():
        if name != 'text':
          values.setdefault(name, []).extend(value for value in column if value is not None)
  scales = {}
  for name, found in values.items():
    if not found:
      continue
    # A few extreme tokens would leave all others without colour.
    if name == 'logprob':
      # Unlikely tokens are what is looked for.
      ends = [0.0, float(np.quantile(found, 0.02))]
    else:
      ends = [1.0 if name == 'shared' else 0.0, float(np.quantile(found, 0.98))]
    if math.isclose(*ends):
      ends[1] = min(found) if name == 'logprob' else max(found)
    scales[name] = [float(f'{end:.3g}') for end in ends]
  return scales
