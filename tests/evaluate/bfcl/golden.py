"""A model that answers BFCL with its references: it finds the task by the turns of the prompt."""

import ast
import json
import re
from typing import Any

from dcore_jax.files import read_json_lines

_TURN = re.compile(r'<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>\n', re.DOTALL)
_TOOL = '<tool_response>'
_ANY = object()


class Golden:
  """Answers text requests.

  Args:
    plan: the tasks.
    package: the folder of bfcl_eval.
    prefix: of its files.
    fc: writes calls as data between tags.
  """

  def __init__(self, plan, package, prefix, fc=False):
    self.fc = fc
    self.asked = []
    self.tasks = []
    # The arguments of each API function, in order, for references that do not name them.
    self.names = {}
    for path in (package / 'data' / 'multi_turn_func_doc').glob('*.json'):
      for function in read_json_lines(path):
        self.names[function['name']] = list(function['parameters']['properties'])
    for category, tasks in plan.tasks.items():
      name = 'memory' if category.startswith('memory') else category
      path = package / 'data' / 'possible_answer' / f'{prefix}_{name}.json'
      answers = {}
      if path.exists():
        for row in read_json_lines(path):
          row_id = row['id'].replace('memory', category, 1) if name == 'memory' else row['id']
          answers[row_id] = row['ground_truth']
      for task in tasks:
        self.tasks.append((category, task, answers.get(task['id'])))

  def __call__(self, body: dict[str, Any]) -> str:
    """Returns the text behind a prompt."""
    assert body['prompt'].endswith('<|im_start|>assistant\n'), body['prompt'][-80:]
    turns = _TURN.findall(body['prompt'])
    said = [text for role, text in turns if role == 'user' and not text.startswith(_TOOL)]
    after_tool = turns[-1][1].startswith(_TOOL)
    for category, task, answer in self.tasks:
      if self._fits(task, said, body['prompt']):
        self.asked.append(task['id'])
        return self._answer(category, task, answer, len(said) - 1, after_tool)
    # What the memory is filled with.
    return 'Noted.'

  def _fits(self, task, said, prompt):
    wanted = []
    for turn in task['question']:
      # Functions that come late are told by the harness.
      wanted += [m['content'] for m in turn if m['role'] == 'user'] if turn else [_ANY]
    if len(said) > len(wanted):
      return False
    names = [function['name'] for function in task.get('function', ())]
    if not all(name in prompt for name in names):
      return False
    return all(w is _ANY or w == s for w, s in zip(wanted, said, strict=False))

  def _answer(self, category, task, answer, turn, after_tool):
    if category.startswith('memory'):
      return f'It is {answer[0]}, I think.'
    if category.startswith('multi_turn'):
      calls = [] if after_tool else answer[turn]
      if not calls:
        return 'Done.'
      # The harness drops arguments without a name.
      calls = [self._as_data(call) for call in calls]
      if self.fc:
        return self._tagged(calls)
      return _listed([_call(item['name'], item['arguments'], repr) for item in calls])
    if 'irrelevance' in category:
      return 'No function does this.'
    if answer is None:
      # Any call will do.
      answer = [{task['function'][0]['name']: {}}]
    java = 'java' in category
    calls = []
    for call in answer:
      ((name, accepted),) = call.items()
      arguments = {key: _first(values) for key, values in accepted.items()}
      arguments = {key: value for key, value in arguments.items() if value is not _ANY}
      calls.append((name, arguments))
    if self.fc:
      return self._tagged(
        [
          {'name': name, 'arguments': {k: _source(v, '') if java else v for k, v in given.items()}}
          for name, given in calls
        ]
      )
    write = (lambda value: _source(value, '"')) if java else repr
    return _listed([_call(name, given, write) for name, given in calls])

  def _as_data(self, call):
    tree = ast.parse(call, mode='eval').body
    name = ast.unparse(tree.func)
    arguments = dict(zip(self.names[name], map(ast.literal_eval, tree.args), strict=False))
    arguments |= {item.arg: ast.literal_eval(item.value) for item in tree.keywords}
    return {'name': name, 'arguments': arguments}

  def _tagged(self, calls):
    return '\n'.join(f'<tool_call>\n{json.dumps(call)}\n</tool_call>' for call in calls)


def _call(name, arguments, write):
  return f'{name}({", ".join(f"{key}={write(value)}" for key, value in arguments.items())})'


def _listed(calls):
  return f'[{", ".join(calls)}]'


def _first(accepted):
  """Returns the first accepted value; _ANY where the argument may only be left out."""
  for value in accepted:
    if value != '':
      return _resolved(value)
  return _ANY


def _resolved(value):
  if isinstance(value, dict):
    found = {key: _first(values) for key, values in value.items()}
    return {key: item for key, item in found.items() if item is not _ANY}
  if isinstance(value, list):
    return [_resolved(item) for item in value]
  return value


def _source(value, quote):
  """Writes a value as Java or JavaScript does, whose text values stand in `quote` if they are
  arguments themselves.
  """
  if isinstance(value, bool):
    return 'true' if value else 'false'
  if isinstance(value, dict):
    puts = ' '.join(f'put("{key}", {_source(item, chr(34))});' for key, item in value.items())
    return f'new HashMap<String, Object>() {{{{ {puts} }}}}'
  if isinstance(value, list):
    return f'[{", ".join(_source(item, chr(34)) for item in value)}]'
  return f'{quote}{value}{quote}' if isinstance(value, str) else str(value)
