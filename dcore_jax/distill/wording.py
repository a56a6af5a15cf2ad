"""Every sentence that distillation says to the model, or adds to the model's own reasoning.

They are data, without logic. A family of models (or a language) has a `Wording`; its texts are
format strings whose placeholders are filled by name. The placeholders are those of docs/method.md,
sections 1.2 and 1.7, and the words are ours. A JSON file may change any of them (`load_wording`).
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any, TypeVar

from dcore_jax.files import read_json


@dataclasses.dataclass(frozen=True)
class Example:
  """A worked decomposition that a prompt may show.

  Attributes:
    system: policy and tools.
    history: the conversation before the query; '' for none.
    query: the user's request.
    calls: the call list that carried it out.
    subtasks: (description, positions of its calls) of each subtask.
  """

  system: str
  history: str
  query: str
  calls: str
  subtasks: tuple[tuple[str, tuple[int, ...]], ...]


@dataclasses.dataclass(frozen=True)
class Prompts:
  """What the model is asked.

  The `_blind` texts are for decompositions that do not see the reference calls.

  Attributes:
    decompose: the user's message that asks for a decomposition; {query}, {calls}, {system} and
      {history}.
    decompose_blind: the same without the calls.
    explain: the user's message that asks what is missing; {query}.
    instructions: the decomposer's own system message, with {examples} where they go. '' keeps the
      system message of the conversation. Then the prompt is the conversation's history and the
      user's message, and examples are turns before that history.
    instructions_blind: the same without the calls.
    example: the text of each of the {examples}; {number}, {system}, {history}, {query}, {calls} and
      {subtasks}.
    example_blind: the same without the calls.
    examples: the worked decompositions that may be shown, in this order.
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
  """Every sentence that a composed trace adds to the model's own reasoning.

  Attributes:
    open: repeats the request, at the start of a trace; {query}.
    plan: stands before the list of all subtasks.
    done: stands before the list of the subtasks that are solved.
    item: one line of these lists; {number} and {subtask}.
    now: stands before the reasoning for a subtask; {number} and {subtask}.
    reflect: says that subtasks are independent of each other.
    close: stands before the calls of independent subtasks.
    irrelevant: doubts that the request can be carried out.
    finished: the whole reasoning of a report after the last tool response; {query}.
  """

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
    """The name with a fingerprint of all texts, by which rows say what they were made with."""
    # Sorted keys: the fingerprint depends on the texts, and not on the order of fields.
    texts = json.dumps(dataclasses.asdict(self), sort_keys=True)
    # Eight hex digits: enough to tell the versions of one wording apart.
    digest = hashlib.sha256(texts.encode()).hexdigest()
    return f'{self.name}-{digest[:8]}'


# --- the organism ---------------------------------------------------------------------------------

# The organism was pretrained on these very texts. It has never read another prompt, so that a
# changed letter costs it decompositions.
ORGANISM_WORDING = Wording(
  'organism',
  Prompts(
    # Short prompts: a model of two million parameters reads them with every seed.
    decompose=(
      'list the subtasks of this request as json.\nrequest: {query}\ncalls: {calls}\nsubtasks:'
    ),
    # Without the calls the prompt is the same but for that one line.
    decompose_blind='list the subtasks of this request as json.\nrequest: {query}\nsubtasks:',
    # One line of instruction, then the request, as in the other two.
    explain='say which tool or value is missing for this request.\nrequest: {query}',
    # One chain and one list: the two shapes that a request can have.
    examples=(
      Example(
        system='',
        history='',
        query='find the file of Karo, then share that file with Tamo.',
        calls="[find_file(person='Karo'), share_file(file='D412', person='Tamo')]",
        subtasks=(('find the file of Karo', (0,)), ('share that file with Tamo', (1,))),
      ),
      Example(
        system='',
        history='',
        query='check the balance of Tamo, and ring phone P307, and add 341 and 76.',
        calls=(
          "[check_balance(person='Tamo'), call_phone(phone='P307'), "
          'add_numbers(first=341, second=76)]'
        ),
        subtasks=(
          ('check the balance of Tamo', (0,)),
          ('ring phone P307', (1,)),
          ('add 341 and 76', (2,)),
        ),
      ),
    ),
  ),
  # The defaults of `Templates` are the organism's texts.
  Templates(),
)

# --- instruction-following models, in English -----------------------------------------------------

# A backslash at the end of a line joins it to the next one: the prompt has no line break there.
_TASK = """You break requests down for an assistant that works with tools. {given}

# What you are given
1. Policy and tools: the assistant's system message.
2. Conversation: what was said before the request; it may be empty.
3. Request: the user's last message.
{fourth}
# What to do
- Write the list of subtasks that a careful person would draw up from the request and the \
conversation alone. Each is one short
  instruction that can be handed over without the request, in the language of the request.
{rules}- A subtask may speak of what an earlier one finds ("that order", "each of those files").
- Facts that are neither in the conversation nor in the request must not be written down. If the \
user asks to cancel
  the newest order and {source}, then "cancel order 88213" is wrong and "cancel the \
newest order" is right.

# Output
Only this JSON list, nothing before or after it:
{form}
{{examples}}
Begin."""
# Fills the placeholders of `_TASK`. Doubled braces survive until examples are filled in.
_SEEN = dict(
  given=(
    'You see a request and the calls that carried it out, and work out how the request was split '
    'up.'
  ),
  fourth=(
    '4. Calls: the list of calls that carried the request out, in order. The first is number 0.\n'
  ),
  # Numbers from 0, in rising order, which `decompose.own_calls` checks.
  rules=(
    '- Give every subtask the numbers of the calls that belong to it ("index"). '
    'Each call belongs to one subtask,\n'
    '  and the numbers rise from the first subtask to the last. '
    'One thing repeated for several items is one subtask\n'
    '  with all its calls.\n'
  ),
  source='its number 88213 stands in the calls only',
  form=(
    '[{{"step": 1, "description": "...", "index": [0]}}, '
    '{{"step": 2, "description": "...", "index": [1, 2]}}]'
  ),
)
# The same task for a decomposer that does not see the calls.
_BLIND = dict(
  given='You see a request and split it up.',
  fourth='',
  # Without calls there are no numbers to share out.
  rules='- A request that cannot be split is its own only subtask.\n',
  source='you can guess that its number is 88213',
  form='[{{"step": 1, "description": "..."}}, {{"step": 2, "description": "..."}}]',
)
# The parts of every example and of the question, in one form.
_PARTS = '## Policy and tools\n{system}\n\n## Conversation\n{history}\n\n## Request\n{query}\n\n'
# A made-up world.
_LIBRARY = (
  'Librarians look members up before they lend. A member has at most three loans.\n'
  '[{"name": "find_member"}, {"name": "list_loans"}, {"name": "extend_loan"}, '
  '{"name": "reserve_book"}]'
)

ENGLISH_WORDING = Wording(
  'english',
  Prompts(
    decompose=_PARTS + '## Calls\n{calls}\n\nSubtasks:',
    decompose_blind=_PARTS + 'Subtasks:',
    instructions=_TASK.format(**_SEEN),
    instructions_blind=_TASK.format(**_BLIND),
    # Tags around each example keep it apart from the request that is asked about.
    example=(
      '<example_{number}>\n'
      + _PARTS
      + '## Calls\n{calls}\n\nSubtasks:\n{subtasks}\n</example_{number}>\n'
    ),
    example_blind='<example_{number}>\n' + _PARTS + 'Subtasks:\n{subtasks}\n</example_{number}>\n',
    explain=(
      'Say which tool, or which value of a parameter, is missing so that the following request '
      'cannot be carried out with the tools at hand. Tell the user so in a sentence or two, and '
      'call nothing.\n\nRequest: {query}'
    ),
    # A chain, a request behind a conversation, and independent subtasks.
    examples=(
      Example(
        system=_LIBRARY,
        history='',
        query=(
          "I'm Ines Okafor. Please find out which book of mine is due first and keep it for two "
          'weeks longer.'
        ),
        calls=(
          "[find_member(name='Ines Okafor'), list_loans(member='M-2207'), "
          "extend_loan(loan='L-91', days=14)]"
        ),
        subtasks=(
          ('Look up the membership of Ines Okafor', (0,)),
          ('Find out which of her loans is due first', (1,)),
          ('Extend that loan by two weeks', (2,)),
        ),
      ),
      Example(
        system=_LIBRARY,
        history=(
          '[{"role": "user", "content": "Is my account in order?"}, '
          '{"role": "assistant", "content": '
          '"Yes, and you have three loans: L-14, L-15 and L-16."}]'
        ),
        query='Then extend all three by a week, and reserve "Dune" for me.',
        calls=(
          "[extend_loan(loan='L-14', days=7), extend_loan(loan='L-15', days=7), "
          "extend_loan(loan='L-16', days=7), reserve_book(title='Dune')]"
        ),
        subtasks=(('Extend the three loans by a week', (0, 1, 2)), ('Reserve "Dune"', (3,))),
      ),
      Example(
        system='[{"name": "get_weather", "parameters": {"city": "string"}}]',
        history='',
        query='How is the weather in Lima, Accra and Oslo?',
        calls="[get_weather(city='Lima'), get_weather(city='Accra'), get_weather(city='Oslo')]",
        subtasks=(
          ('Get the weather in Lima', (0,)),
          ('Get the weather in Accra', (1,)),
          ('Get the weather in Oslo', (2,)),
        ),
      ),
    ),
  ),
  # Words of our own around the placeholders of docs/method.md, section 1.7.
  Templates(
    open='The task as a whole is: {query}',
    plan='It breaks down into these subtasks:',
    done='These subtasks are done already:',
    now='Now let me work out subtask {number}: {subtask}',
    reflect=(
      'Wait, none of these subtasks needs what another one returns, so all of them can be carried '
      'out in parallel.'
    ),
    close='Every subtask has been checked, and one parallel call covers them all:',
    irrelevant=(
      'However, the request may lack a value, or need a function that is not on the list, so it '
      'deserves a closer look.'
    ),
    finished=(
      'The request "{query}" has been carried out with the tools, and the results can be reported.'
    ),
  ),
)

# By the names that `distill.wording` gives.
WORDINGS = {wording.name: wording for wording in (ORGANISM_WORDING, ENGLISH_WORDING)}

# The placeholders that are filled in each text. A text without an entry here has none.
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
  """Returns one of WORDINGS, or reads a JSON file of what it changes of one.

  The file holds {"name", "base", "prompts": {..}, "templates": {..}}.

  Raises:
    ValueError: neither, a field that does not exist, or a text with a placeholder that nothing
      fills.
  """
  # A name first: a file that happens to be called 'english' does not hide it.
  if name in WORDINGS:
    return WORDINGS[name]
  path = pathlib.Path(name)
  if not path.is_file():
    raise ValueError(f'distill.wording = {name!r} is neither one of {sorted(WORDINGS)} nor a file')
  record = read_json(path)
  known = {'name', 'base', 'prompts', 'templates'}
  # Unknown entries are refused, since a misspelled one would change nothing.
  if not isinstance(record, dict) or record.keys() - known or record.get('base') not in WORDINGS:
    raise ValueError(
      f'{name}: a wording is an object of name, base (one of {sorted(WORDINGS)}), prompts and '
      'templates'
    )
  # What the file leaves out stays as its base has it.
  base = WORDINGS[record['base']]
  return Wording(
    # Without a name, rows are marked by the file's.
    name=str(record.get('name', path.stem)),
    prompts=_changed(base.prompts, record.get('prompts', {}), name),
    templates=_changed(base.templates, record.get('templates', {}), name),
  )


Texts = TypeVar('Texts', Prompts, Templates)


def _changed(texts: Texts, changes: Mapping[str, Any], where: str) -> Texts:
  """Returns `texts` with the fields of `changes`, each of which must exist and be well formed."""
  known = {field.name for field in dataclasses.fields(texts)}
  values = {}
  for field, value in changes.items():
    if field not in known:
      raise ValueError(f'{where}: {field!r} is none of {sorted(known)}')
    # Examples are records, all other fields are texts.
    if field == 'examples':
      values[field] = tuple(_read_example(record, where) for record in value)
    else:
      _check_placeholders(field, value, where)
      values[field] = value
  return dataclasses.replace(texts, **values)


def _check_placeholders(field: str, text: Any, where: str) -> None:
  """Raises ValueError unless a text can be filled; otherwise distillation would fail late."""
  slots = _SLOTS.get(field, ())
  try:
    # Filled with empty values: the braces and names are tried, whatever the texts.
    text.format(**dict.fromkeys(slots, ''))
  except (AttributeError, IndexError, KeyError, ValueError) as error:
    raise ValueError(
      f'{where}: {field} is no text with the placeholders {slots}: {error!r}'
    ) from error


def _read_example(record: Any, where: str) -> Example:
  try:
    # Tuples, as in the wordings above.
    subtasks = tuple((item['description'], tuple(item['index'])) for item in record['subtasks'])
    return Example(
      system=record['system'],
      history=record['history'],
      query=record['query'],
      calls=record['calls'],
      subtasks=subtasks,
    )
  except (KeyError, TypeError) as error:
    raise ValueError(
      f'{where}: an example has system, history, query, calls and subtasks, got {str(record)[:80]}'
    ) from error
