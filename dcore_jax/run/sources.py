"""Where models and real rows come from: the packaged organism, local directories, files of published rows."""
import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections
import transformers

import dcore_jax
from dcore_jax.chat.messages import Message, ToolCall
from dcore_jax.chat.tool_calls import print_calls
from dcore_jax.distill.seeds import DecisionPoint
from dcore_jax.models import decoder
from dcore_jax.models.config import DecoderConfig
from dcore_jax.models.hf_checkpoint import load_params

CALL_FORMAT = 'Answer with the calls alone, as [name(parameter=value), ...]. Where no tool fits, answer in words.'
_LISTED_NAME = re.compile(r'^(\d+\. Name: )(.*)$', re.MULTILINE)
ORGANISM = pathlib.Path(dcore_jax.__file__).parent / 'organism'


@dataclasses.dataclass
class Policy:
  """A model with everything needed to use it."""
  config: DecoderConfig
  params: Any
  tokenizer: transformers.PreTrainedTokenizerBase
  tokenizer_dir: pathlib.Path

  @property
  def stop_ids(self) -> list[int]:
    """End of turn, and end of text where the tokenizer has it."""
    ids = [self.tokenizer.eos_token_id, self.tokenizer.convert_tokens_to_ids('<|im_end|>')]
    return sorted({i for i in ids if i is not None})


def data_path(name: str) -> pathlib.Path:
  """A file or folder by its path or below the data folder (`DCORE_DATA`, default ../shared/data); ValueError if in neither."""
  folder = pathlib.Path(os.environ.get('DCORE_DATA', '../shared/data'))
  for path in (pathlib.Path(name), folder / name):
    if path.exists():
      return path
  raise ValueError(f'{name!r} is not there, and neither is it in the data folder {str(folder)!r}; '
                   'set DCORE_DATA to the folder that holds it')


def load_policy(config: ml_collections.ConfigDict, *, seed: int) -> Policy:
  """The model a config section `model` names: a directory, the organism, or a random initialisation.

  Raises:
    ValueError: a path that is not there, a checkpoint that does not fit its config, a tokenizer larger than the embedding.
  """
  path = data_path(config.path) if config.path else ORGANISM
  tokenizer_dir = data_path(config.tokenizer) if config.tokenizer else path
  try:
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(tokenizer_dir))
  except OSError as error:
    raise ValueError(f'no tokenizer can be loaded from {str(tokenizer_dir)!r}: {error}') from error
  if config.init and config.path:
    raise ValueError(f'model.init asks for random weights and model.path = {config.path!r} for stored ones; set one of them')
  if config.init:
    model = DecoderConfig.from_hf(dict(config.init))
    params = decoder.init_params(model, jax.random.key(seed))
  else:
    model, params = load_params(path)
  if len(tokenizer) > model.vocab_size:
    raise ValueError(f'the tokenizer in {str(tokenizer_dir)!r} has {len(tokenizer)} tokens, '
                     f'the embedding {model.vocab_size} rows')
  return Policy(model, params, tokenizer, tokenizer_dir)


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


def sft_rows(names: Sequence[str]) -> list[dict[str, Any]]:
  """Rows {id, conversations} of the named files: the published schema as it is, ToolRL's rows rendered into it."""
  rows = []
  for name in names:
    path = data_path(name)
    for number, record in enumerate(read_rows(path)):
      if 'conversations' in record:
        rows.append({'id': record.get('id', f'{path.stem}-{number}'), 'conversations': record['conversations']})
      else:
        point, thought = toolrl_point(record, f'{path.stem}-{number}')
        target = f'<think>\n{thought}\n</think>\n\n{point.reference}'
        conversations = [*(m.to_json() for m in point.messages), {'role': 'assistant', 'content': target}]
        rows.append({'id': point.id, 'conversations': conversations})
  return rows


def rl_points(names: Sequence[str]) -> list[DecisionPoint]:
  """Decision points of the named files of ToolRL rows."""
  points = []
  for name in names:
    path = data_path(name)
    points += [toolrl_point(record, f'{path.stem}-{number}')[0] for number, record in enumerate(read_rows(path))]
  return points


def toolrl_point(record: dict[str, Any], name: str) -> tuple[DecisionPoint, str]:
  """(decision point, thought) of a ToolRL row {instruction, input, output}.

  Its output holds `<think>`, `<tool_call>` (JSON lines) and `<response>` parts; the reference is the calls in Python style,
  or the response text where there are none.

  Raises:
    ValueError: naming the row and what it lacks.
  """
  missing = {'instruction', 'input', 'output'} - record.keys()
  if missing:
    raise ValueError(f'row {name!r} is no ToolRL row: it lacks {", ".join(sorted(missing))}')
  thought, _, rest = record['output'].rpartition('</think>')  # a thought may speak of `<tool_call>` itself
  calls = [_toolrl_call(line, name) for line in _part(rest, 'tool_call').split('\n') if line.strip()]
  reference = print_calls(calls) if calls else _part(rest, 'response')
  if not reference:
    raise ValueError(f'row {name!r} has neither calls nor a response')
  # The tool list, without ToolRL's own output format behind it, and with names that a Python-style call can have.
  tools = record['instruction'].split('**Steps for Each Turn**')[0]
  tools = _LISTED_NAME.sub(lambda match: match[1] + _python_name(match[2]), tools)
  messages = (Message('system', tools.rstrip() + '\n\n' + CALL_FORMAT), Message('user', record['input']))
  return DecisionPoint(name, 'toolrl', messages, reference), thought.split('<think>', 1)[-1].strip()


def _part(output: str, tag: str) -> str:
  start, end = output.find(f'<{tag}>'), output.find(f'</{tag}>')
  return output[start + len(tag) + 2:end].strip() if 0 <= start < end else ''


def _toolrl_call(line: str, name: str) -> ToolCall:
  call = _parse(line, f'a tool call of row {name!r}')
  if not isinstance(call, dict) or not isinstance(call.get('name'), str) or not isinstance(call.get('parameters'), dict):
    raise ValueError(f'row {name!r}: a tool call needs a name and parameters, got {line[:80]!r}')
  return ToolCall(_python_name(call['name']), call['parameters'])


def _python_name(name: str) -> str:
  """A dotted identifier for a tool name that may hold spaces, slashes or quotes."""
  parts = [re.sub(r'\W+', '_', part).strip('_') for part in name.split('.')]
  return '.'.join(f'_{part}' if part[:1].isdigit() else part for part in parts if part) or 'unnamed'
