"""Every sentence that distillation says: to the model, as prompts, and in its place, around its reasoning. Data, no logic.

A family of models (or a language) has a `Wording`; texts are format strings whose placeholders are filled by name. The slots
are those of method.md 1.2 and 1.7, the words are ours. A JSON file may change any of them (`load_wording`).
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Example:
  """A worked decomposition that a prompt may show. `subtasks` are (description, positions of its calls)."""

  system: str  # policy and tools
  history: str  # '' for none
  query: str
  calls: str  # a call list
  subtasks: tuple[tuple[str, tuple[int, ...]], ...]


@dataclasses.dataclass(frozen=True)
class Prompts:
  """What is asked. The `_blind` texts are for decompositions that do not see the reference calls.

  Attributes:
    decompose, decompose_blind: the user's message; {query}, {calls} (not blind), {system} and {history}.
    instructions, instructions_blind: the decomposer's own system message, with {examples} where they go. '' keeps the
      conversation's: the prompt is then its history and the message, and examples are turns before it.
    example, example_blind: one of {examples}; {number}, {system}, {history}, {query}, {calls}, {subtasks}.
    explain: the user's message that asks what is missing; {query}.
    examples: what may be shown.
  """

  decompose: str
  decompose_blind: str
  explain: str
  instructions: str = ''
  instructions_blind: str = ''
  example: str = ''
  example_blind: str = ''
  examples: tuple[Example, ...] = ()


@dataclasses.dataclass(frozen=True)
class Templates:
  """Every sentence a composed trace adds to the model's own reasoning."""

  open: str = 'the request is: {query}'
  plan: str = 'i split it into subtasks:'
  done: str = 'these subtasks are solved:'
  item: str = '{number}. {subtask}'
  now: str = 'now subtask {number}: {subtask}'
  reflect: str = 'wait, no subtask needs the result of another, so they can run together.'
  close: str = 'all subtasks are checked, so the calls together are:'
  irrelevant: str = 'however, a tool or a value may be missing, so let me look closely.'
  finished: str = 'the request "{query}" was handled by tools, so i report the result.'


@dataclasses.dataclass(frozen=True)
class Wording:
  """Prompts and templates of one family."""

  name: str
  prompts: Prompts
  templates: Templates

  @property
  def version(self) -> str:
    """Name and fingerprint of all texts: rows say which they were made with."""
    digest = hashlib.sha256(
      json.dumps(dataclasses.asdict(self), sort_keys=True).encode()
    ).hexdigest()
    return f'{self.name}-{digest[:8]}'


# --- the organism: what it was pretrained on, to the letter --------------------------------------------------------------

ORGANISM = Wording(
  'organism',
  Prompts(
    decompose='list the subtasks of this request as json.\nrequest: {query}\ncalls: {calls}\nsubtasks:',
    decompose_blind='list the subtasks of this request as json.\nrequest: {query}\nsubtasks:',
    explain='say which tool or value is missing for this request.\nrequest: {query}',
    examples=(
      Example(
        '',
        '',
        'find the file of Karo, then share that file with Tamo.',
        "[find_file(person='Karo'), share_file(file='D412', person='Tamo')]",
        (('find the file of Karo', (0,)), ('share that file with Tamo', (1,))),
      ),
      Example(
        '',
        '',
        'check the balance of Tamo, and ring phone P307, and add 341 and 76.',
        "[check_balance(person='Tamo'), call_phone(phone='P307'), add_numbers(first=341, second=76)]",
        (('check the balance of Tamo', (0,)), ('ring phone P307', (1,)), ('add 341 and 76', (2,))),
      ),
    ),
  ),
  Templates(),
)

# --- instruction-following models, in English ----------------------------------------------------------------------------

_TASK = """You break requests down for an assistant that works with tools. {given}

# What you are given
1. Policy and tools: the assistant's system message.
2. Conversation: what was said before the request; it may be empty.
3. Request: the user's last message.
{fourth}
# What to do
- Write the list of subtasks that a careful person would draw up from the request and the conversation alone. Each is one short
  instruction that can be handed over without the request, in the language of the request.
{rules}- A subtask may speak of what an earlier one finds ("that order", "each of those files").
- Facts that are neither in the conversation nor in the request must not be written down. If the user asks to cancel
  the newest order and {source}, then "cancel order 88213" is wrong and "cancel the newest order" is right.

# Output
Only this JSON list, nothing before or after it:
{form}
{{examples}}
Begin."""
_SEEN = dict(
  given='You see a request and the calls that carried it out, and work out how the request was split up.',
  fourth='4. Calls: the list of calls that carried the request out, in order. The first is number 0.\n',
  rules='- Give every subtask the numbers of the calls that belong to it ("index"). Each call belongs to one subtask,\n'
  '  and the numbers rise from the first subtask to the last. One thing repeated for several items is one subtask\n'
  '  with all its calls.\n',
  source='its number 88213 stands in the calls only',
  form='[{{"step": 1, "description": "...", "index": [0]}}, {{"step": 2, "description": "...", "index": [1, 2]}}]',
)
_BLIND = dict(
  given='You see a request and split it up.',
  fourth='',
  rules='- A request that cannot be split is its own only subtask.\n',
  source='you can guess that its number is 88213',
  form='[{{"step": 1, "description": "..."}}, {{"step": 2, "description": "..."}}]',
)
_PARTS = '## Policy and tools\n{system}\n\n## Conversation\n{history}\n\n## Request\n{query}\n\n'
_LIBRARY = (
  'Librarians look members up before they lend. A member has at most three loans.\n'
  '[{"name": "find_member"}, {"name": "list_loans"}, {"name": "extend_loan"}, {"name": "reserve_book"}]'
)

ENGLISH = Wording(
  'english',
  Prompts(
    decompose=_PARTS + '## Calls\n{calls}\n\nSubtasks:',
    decompose_blind=_PARTS + 'Subtasks:',
    instructions=_TASK.format(**_SEEN),
    instructions_blind=_TASK.format(**_BLIND),
    example='<example_{number}>\n'
    + _PARTS
    + '## Calls\n{calls}\n\nSubtasks:\n{subtasks}\n</example_{number}>\n',
    example_blind='<example_{number}>\n' + _PARTS + 'Subtasks:\n{subtasks}\n</example_{number}>\n',
    explain='Say which tool, or which value of a parameter, is missing so that the following request cannot be carried out '
    'with the tools at hand. Tell the user so in a sentence or two, and call nothing.\n\nRequest: {query}',
    examples=(
      Example(
        _LIBRARY,
        '',
        "I'm Ines Okafor. Please find out which book of mine is due first and keep it for two weeks longer.",
        "[find_member(name='Ines Okafor'), list_loans(member='M-2207'), extend_loan(loan='L-91', days=14)]",
        (
          ('Look up the membership of Ines Okafor', (0,)),
          ('Find out which of her loans is due first', (1,)),
          ('Extend that loan by two weeks', (2,)),
        ),
      ),
      Example(
        _LIBRARY,
        '[{"role": "user", "content": "Is my account in order?"}, {"role": "assistant", "content": '
        '"Yes, and you have three loans: L-14, L-15 and L-16."}]',
        'Then extend all three by a week, and reserve "Dune" for me.',
        "[extend_loan(loan='L-14', days=7), extend_loan(loan='L-15', days=7), extend_loan(loan='L-16', days=7), "
        "reserve_book(title='Dune')]",
        (('Extend the three loans by a week', (0, 1, 2)), ('Reserve "Dune"', (3,))),
      ),
      Example(
        '[{"name": "get_weather", "parameters": {"city": "string"}}]',
        '',
        'How is the weather in Lima, Accra and Oslo?',
        "[get_weather(city='Lima'), get_weather(city='Accra'), get_weather(city='Oslo')]",
        (
          ('Get the weather in Lima', (0,)),
          ('Get the weather in Accra', (1,)),
          ('Get the weather in Oslo', (2,)),
        ),
      ),
    ),
  ),
  Templates(
    open='The task as a whole is: {query}',
    plan='It breaks down into these subtasks:',
    done='These subtasks are done already:',
    now='Now let me work out subtask {number}: {subtask}',
    reflect='Wait, none of these subtasks needs what another one returns, so all of them can be carried out in parallel.',
    close='Every subtask has been checked, and one parallel call covers them all:',
    irrelevant='However, the request may lack a value, or need a function that is not on the list, so it deserves a closer '
    'look.',
    finished='The request "{query}" has been carried out with the tools, and the results can be reported.',
  ),
)

WORDINGS = {wording.name: wording for wording in (ORGANISM, ENGLISH)}

_SLOTS = {
  'decompose': ('query', 'calls', 'system', 'history'),
  'decompose_blind': ('query', 'system', 'history'),
  'explain': ('query',),
  'instructions': ('examples',),
  'instructions_blind': ('examples',),
  'example': ('number', 'system', 'history', 'query', 'calls', 'subtasks'),
  'example_blind': ('number', 'system', 'history', 'query', 'subtasks'),
  'open': ('query',),
  'item': ('number', 'subtask'),
  'now': ('number', 'subtask'),
  'finished': ('query',),
}


def load_wording(name: str) -> Wording:
  """One of WORDINGS, or a JSON file {"name", "base", "prompts": {..}, "templates": {..}} of what it changes of `base`.

  Raises:
    ValueError: neither, a field that does not exist, or a text with a placeholder that nothing fills.
  """
  if name in WORDINGS:
    return WORDINGS[name]
  path = pathlib.Path(name)
  if not path.is_file():
    raise ValueError(f'distill.wording = {name!r} is neither one of {sorted(WORDINGS)} nor a file')
  try:
    record = json.loads(path.read_text(encoding='utf-8'))
  except ValueError as error:
    raise ValueError(f'{name} is not JSON: {error}') from error
  unknown = (
    record.keys() - {'name', 'base', 'prompts', 'templates'} if isinstance(record, dict) else {'?'}
  )
  if unknown or record.get('base') not in WORDINGS:
    raise ValueError(
      f'{name}: a wording is an object of name, base (one of {sorted(WORDINGS)}), prompts and templates'
    )
  base = WORDINGS[record['base']]
  return Wording(
    str(record.get('name', path.stem)),
    _changed(base.prompts, record.get('prompts', {}), name),
    _changed(base.templates, record.get('templates', {}), name),
  )


def _changed(texts: Any, changes: Mapping[str, Any], where: str) -> Any:
  """`texts` with the fields of `changes`, each of which must be a field and format."""
  known = {field.name for field in dataclasses.fields(texts)}
  for field, text in changes.items():
    if field not in known:
      raise ValueError(f'{where}: {field!r} is none of {sorted(known)}')
    if field != 'examples':
      try:
        text.format(**dict.fromkeys(_SLOTS.get(field, ()), ''))
      except (AttributeError, IndexError, KeyError, ValueError) as error:
        raise ValueError(
          f'{where}: {field} is no text with the placeholders {_SLOTS.get(field, ())}: {error!r}'
        ) from error
  changes = dict(changes)
  if 'examples' in changes:
    changes['examples'] = tuple(_read_example(record, where) for record in changes['examples'])
  return dataclasses.replace(texts, **changes)


def _read_example(record: Any, where: str) -> Example:
  try:
    subtasks = tuple((item['description'], tuple(item['index'])) for item in record['subtasks'])
    return Example(record['system'], record['history'], record['query'], record['calls'], subtasks)
  except (KeyError, TypeError) as error:
    raise ValueError(
      f'{where}: an example has system, history, query, calls and subtasks, got {str(record)[:80]}'
    ) from error
