"""Where models, their engines and real rows come from: the packaged organism, local directories, published rows by file or hub
name."""
import dataclasses
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh
import ml_collections
import numpy as np
import transformers
from absl import logging

import dcore_jax
from dcore_jax import sharding
from dcore_jax.chat.template import turn_format
from dcore_jax.distill.seeds import DecisionPoint
from dcore_jax.models import decoder
from dcore_jax.models import presets
from dcore_jax.models.config import DecoderConfig
from dcore_jax.models.decoder import Execution
from dcore_jax.models.hf_checkpoint import load_config, load_params
from dcore_jax.rollout.backends import LocalBackend
from dcore_jax.rollout.engine import Engine
from dcore_jax.run import distributed
from dcore_jax.run import row_schemas

_FILES = ('.json', '.jsonl', '.parquet')
_HUB_NAME = re.compile(r'[\w.-]+/[\w.-]+')
ORGANISM = pathlib.Path(dcore_jax.__file__).parent / 'organism'


@dataclasses.dataclass
class Policy:
  """A model with everything needed to use it."""
  config: DecoderConfig
  load: Callable[[Mesh | None], Any]  # the parameters, float32, in their shards on a mesh; read or drawn at every call
  tokenizer: transformers.PreTrainedTokenizerBase
  tokenizer_dir: pathlib.Path
  path: pathlib.Path | None  # of the weights; None where they are random

  def name(self, params: Any) -> str:
    """Where the weights come from, and a fingerprint of them: what was sampled from others must not be taken for theirs."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
      digest.update(np.asarray(leaf[(0,) * (leaf.ndim - 1)][:1024], np.float32).tobytes())
    return f'{self.path.name if self.path else "random"}-{digest.hexdigest()[:8]}'

  @property
  def stop_ids(self) -> list[int]:
    """All that end an answer."""
    return find_stop_ids(self.config, self.tokenizer, self.path)


def find_stop_ids(config: DecoderConfig, tokenizer: Any, folder: pathlib.Path | None) -> list[int]:
  """What ends an answer: by the folder's generation_config.json and config.json, the tokenizer's end of text, and the template's
  end of turn.

  Llama-3.1 stops at three tokens (end of text, of message, of turn), of which its tokenizer names one.
  """
  ids = [*_generation_stop_ids(folder), *config.stop_token_ids, tokenizer.eos_token_id, turn_format(tokenizer).end_of_turn_id]
  return sorted({i for i in ids if i is not None})


def make_engine(config: ml_collections.ConfigDict, policy: Policy, params: decoder.Params, mesh: Mesh | None, *,
                groups: bool = False) -> Engine:
  """The engine that section `engine` describes, with weights on the training `mesh`: in the dtype of computation, and on a mesh
  of its own where the section asks for one. `groups`: rollouts come in groups that share a prompt, for which the section may
  want fewer trunks than lanes; with a prompt for each, as many would be idle as there are trunks too few."""
  c = config.engine
  params = decoder.cast(params, Execution(**config.execution).dtype(params))
  if mesh := distributed.engine_mesh(config, mesh):
    params = jax.device_put(params, sharding.shardings(decoder.abstract_params(policy.config), mesh))
  return Engine(params, policy.config, stop_ids=policy.stop_ids, lanes=c.lanes, max_len=c.max_len, max_new=c.max_new or None,
                trunks=c.trunks or None if groups else None, tile=c.tile or None, steps_per_call=c.steps_per_call)


def local_backend(config: ml_collections.ConfigDict, journal: pathlib.Path) -> LocalBackend:
  """An engine of its own with the config's model."""
  distributed.keep_programs()
  policy = load_policy(config.model, seed=config.seed)
  mesh = distributed.training_mesh(config)
  params = policy.load(mesh)
  engine = make_engine(config, policy, params, mesh)
  return LocalBackend(engine, policy.tokenizer, journal=journal, model=policy.name(params))


def data_path(name: str) -> pathlib.Path:
  """A file or folder by its path or below the data folder (`DCORE_DATA`, default ../shared/data); ValueError if in neither."""
  folder = pathlib.Path(os.environ.get('DCORE_DATA', '../shared/data'))
  for path in (pathlib.Path(name), folder / name):
    if path.exists():
      return path
  raise ValueError(f'{name!r} is not there, and neither is it in the data folder {str(folder)!r}; '
                   'set DCORE_DATA to the folder that holds it')


def load_tokenizer(config: ml_collections.ConfigDict) -> tuple[transformers.PreTrainedTokenizerBase, pathlib.Path]:
  """(tokenizer, its directory) of a config section `model`: its own, or that of its model. ValueError where there is none."""
  folder = data_path(config.tokenizer or config.path) if config.tokenizer or config.path else ORGANISM
  try:
    return transformers.AutoTokenizer.from_pretrained(str(folder)), folder
  except OSError as error:
    raise ValueError(f'no tokenizer can be loaded from {str(folder)!r}: {error}') from error


def load_policy(config: ml_collections.ConfigDict, *, seed: int) -> Policy:
  """The model a config section `model` names: a directory, the organism, or a random initialisation.

  Raises:
    ValueError: a path that is not there or holds another model than `preset`, a tokenizer larger than the embedding. (And
      `load` where a checkpoint does not fit its config.)
  """
  path = data_path(config.path) if config.path else ORGANISM
  tokenizer, tokenizer_dir = load_tokenizer(config)
  if config.init and config.path:
    raise ValueError(f'model.init asks for random weights and model.path = {config.path!r} for stored ones; set one of them')
  model = DecoderConfig.from_hf(dict(config.init)) if config.init else load_config(path)
  if config.preset and not presets.same_model(model, presets.config(config.preset)):
    raise ValueError(f'{str(path)!r} does not hold a model of the preset {config.preset!r}')
  specs = decoder.abstract_params(model)

  def load(mesh: Mesh | None) -> Any:
    placed = sharding.shardings(specs, mesh) if mesh else None
    if config.init:
      return jax.jit(decoder.init_params, static_argnums=0, out_shardings=placed)(model, jax.random.key(seed))
    return load_params(path, shardings=placed)[1]

  if len(tokenizer) > model.vocab_size:
    raise ValueError(f'the tokenizer in {str(tokenizer_dir)!r} has {len(tokenizer)} tokens, '
                     f'the embedding {model.vocab_size} rows')
  return Policy(model, load, tokenizer, tokenizer_dir, None if config.init else path)


def _generation_stop_ids(folder: pathlib.Path | None) -> tuple[int, ...]:
  """`eos_token_id` of a generation_config.json, one or a list; () where there is no such file or field."""
  path = folder / 'generation_config.json' if folder else None
  if path is None or not path.exists():
    return ()
  ids = _parse(path.read_text(encoding='utf-8'), str(path)).get('eos_token_id')
  ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
  if not all(isinstance(i, int) for i in ids):
    raise ValueError(f'{path}: eos_token_id is {ids!r}, expected token ids')
  return tuple(ids)


def read_rows(path: pathlib.Path) -> list[dict[str, Any]]:
  """The records of a JSON list or a JSON-lines file; ValueError names file and line of what cannot be parsed."""
  text = path.read_text(encoding='utf-8')
  if path.suffix == '.jsonl':
    rows = []
    for number, line in enumerate(text.split('\n'), 1):
      if line.strip():
        rows.append(_parse(line, f'{path.name}, line {number}'))
  else:
    rows = _parse(text, path.name)
  if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
    raise ValueError(f'{path.name}: expected a list of objects')
  return rows


def _parse(text: str, where: str) -> Any:
  try:
    return json.loads(text)
  except json.JSONDecodeError as error:
    raise ValueError(f'{where} is not JSON: {error}') from error


def load_records(name: str) -> list[dict[str, Any]]:
  """The records of a data set: a JSON or JSON-lines file, what `datasets` reads (Parquet, a folder), or a name on the hub.

  Args:
    name: a path, also below the data folder, or `owner/name[#configuration]` on the hub (its split `train`).

  A file of JSON is read here and not by `datasets`: Arrow knows one type a column, and fills the nested specs and arguments of
  every record with the keys of all others. From what comes through it, fields without a value are taken out again.
  """
  place, _, configuration = name.partition('#')
  hub = pathlib.Path(place).suffix not in _FILES and _HUB_NAME.fullmatch(place)
  try:
    path = data_path(place)
  except ValueError:
    if not hub:
      raise
    path = None
  if path is not None and path.suffix in ('.json', '.jsonl'):
    return read_rows(path)
  import datasets  # a second and a half that JSON files should not cost
  try:
    if path is None:
      found = datasets.load_dataset(place, *([configuration] if configuration else []), split='train')
    elif path.is_dir():
      found = datasets.load_dataset(str(path), split='train')
    else:
      found = datasets.load_dataset('parquet', data_files=str(path), split='train')
  except Exception as error:  # whatever the network, the hub or a reader of files raises
    raise ValueError(f'{name!r} can be loaded neither from disk nor from the hub: {error}') from error
  return [_without_nulls(record) for record in found.to_list()]


def _without_nulls(value: Any) -> Any:
  if isinstance(value, dict):
    return {name: _without_nulls(item) for name, item in value.items() if item is not None}
  return [_without_nulls(item) for item in value] if isinstance(value, list) else value


@dataclasses.dataclass(frozen=True)
class Rows:
  """Rows {id, conversations[, tools]} and the number of records that were left out because they cannot be read."""
  rows: list[dict[str, Any]]
  unreadable: int


def sft_rows(names: Sequence[str], *, call_style: str = 'python', unreadable: str = 'error') -> Rows:
  """Rows of the named data sets, in order, whatever schema they are published in.

  Args:
    names: of `load_records`, with the schema before a colon where it is not to be guessed: `toolace:PATH`.
    call_style: how tools and calls are written where a schema holds them as data, see `row_schemas`.
    unreadable: 'error', or 'drop': records that break their schema's promises are left out, counted and logged.

  Raises:
    ValueError: a record of no known schema, by file, number and fields; one that cannot be read; a data set without a
      readable record.
  """
  if unreadable not in ('error', 'drop'):
    raise ValueError(f'sft.unreadable = {unreadable!r}; expected \'error\' or \'drop\'')
  if call_style not in row_schemas.CALL_STYLES:
    raise ValueError(f'sft.call_style = {call_style!r}; expected one of {row_schemas.CALL_STYLES}')
  rows, left_out = [], 0
  for name in names:
    schema, _, place = name.partition(':') if name.partition(':')[0] in row_schemas.SCHEMAS else (None, '', name)
    stem = pathlib.Path(place).stem
    problems = []
    records = load_records(place)
    if not records:
      raise ValueError(f'{place} holds no records')
    for number, record in enumerate(records):
      found = schema or row_schemas.recognise(record)
      if found is None:
        raise ValueError(f'{place}, row {number}: no known schema has the fields {sorted(record)}; '
                         f'known are {row_schemas.SCHEMAS}')
      try:
        rows += row_schemas.to_rows(record, found, f'{stem}-{number}', call_style)
      except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        reason = f'it lacks {error}' if isinstance(error, KeyError) else error
        problems.append(f'{place}, row {number}, cannot be read as {found}: {reason}')
        if unreadable == 'error':
          raise ValueError(problems[0] + '; sft.unreadable = \'drop\' would leave it out') from error
    if problems:
      logging.warning('%d of %d records of %s are left out; the first: %s', len(problems), len(records), place, problems[0])
      if len(problems) == len(records):
        raise ValueError(f'none of {len(records)} records can be read; the first: {problems[0]}')
    left_out += len(problems)
  return Rows(rows, left_out)


def rl_points(names: Sequence[str]) -> list[DecisionPoint]:
  """Decision points of the named files of ToolRL rows."""
  points = []
  for name in names:
    path = data_path(name)
    points += [row_schemas.toolrl_point(record, f'{path.stem}-{number}')[0] for number, record in enumerate(read_rows(path))]
  return points
