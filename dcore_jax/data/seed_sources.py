"""Makes seeds from the tasks of worlds, recorded dialogues, published rows, and seed files.

WORLD        tasks of a world, as `registry.named_world` takes it: toolworld, mcp:FILE.json, ...
taubench     recorded trajectories of tau-bench (taubench:FILE for another file than gpt-4o's
             airline ones)
tau2         training tasks of tau2-bench, their reference actions executed
NAME         a data set as `records.load_records` takes it; `schema:NAME` where the schema is not to
             be guessed
"""

import collections
import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from dcore_jax.chat import tool_specs
from dcore_jax.chat.call_text import split_answer
from dcore_jax.chat.messages import Message, ToolCall, ToolSpec
from dcore_jax.chat.tool_calls import parse_calls, print_calls, tool_response
from dcore_jax.data import reference_rows, row_schemas, tau2_tasks
from dcore_jax.data.dialogues import Dialogue, DialogueTurn, Record, check_row
from dcore_jax.data.leakage import Said, call_values, words_of
from dcore_jax.data.record_files import Unreadable
from dcore_jax.data.records import ODD, convert_records, load_records
from dcore_jax.data.seeds import Seed
from dcore_jax.data.world_seeds import task_seeds
from dcore_jax.worlds.environment import World, WorldTask
from dcore_jax.worlds.registry import WORLDS, WorldSection, check_kinds, make_world, named_world

# What a task set is for. Sets with different purposes get different seeds, because they must not
# overlap: the train split serves distillation, reinforcement learning and the organism's
# pretraining, whose stages count on from their own seed.
DISTILL = 1001
RL = 1002
SEEDS = 1003
TAUBENCH = 'taubench/gpt-4o-airline_trajectories.json'


class TasksSection(Protocol):
  """The fields of a config that are read here: `seed`, `world` and `distill`."""

  seed: int
  world: WorldSection
  distill: Any


@dataclasses.dataclass
class Found:
  """The seeds of a source.

  Attributes:
    seeds: in the order of the records.
    records: how many records (or tasks) the source has.
    dropped: reason why a record gave no seed -> number of records.
  """

  seeds: list[Seed]
  records: int
  dropped: collections.Counter[str]


def training_tasks(
  config: TasksSection, counts: Mapping[str, int], purpose: int
) -> list[WorldTask]:
  """Makes training tasks of the config's world; one purpose always gives the same tasks.

  Args:
    config: the whole config.
    counts: kind -> number of tasks, for every kind of the world.
    purpose: DISTILL, RL or another number of its own.

  Raises:
    ValueError: the world cannot be made, or `counts` lacks one of its kinds or has another one.
  """
  world = make_world(config.world)
  # Checked before the loop, where a kind without a count would be a KeyError.
  check_kinds(f'tasks of world {config.world.name!r}', counts, world)
  tasks = []
  for kind in world.kinds:
    # Seeds of a config are ten apart here, so that the purposes of one seed do not meet those of
    # the next seed.
    tasks += world.tasks(kind, counts[kind], seed=config.seed * 10 + purpose, split='train')
  return tasks


def training_seeds(config: TasksSection, counts: Mapping[str, int], purpose: int) -> list[Seed]:
  """Returns `training_tasks` as seeds."""
  return _seeds_of(make_world(config.world), training_tasks(config, counts, purpose))


def config_seeds(config: TasksSection) -> list[Seed]:
  """Loads the seeds of the files in the config's section `distill`, or makes them from its world.

  Raises:
    ValueError: a file that is not there, or a record that is no seed, by its id.
  """
  if not config.distill.files:
    return training_seeds(config, config.distill.tasks, DISTILL)
  seeds = []
  # A run distils what its config names. It takes seed files alone here: other schemas go through
  # `experiments.seeds`, which also removes the test tasks.
  for name in config.distill.files:
    converted = convert_records(
      load_records(name),
      name,
      _recorded_seed,
      unreadable=config.distill.unreadable,
      option='distill.unreadable',
    )
    seeds += converted.made
  return seeds


def _recorded_seed(record: Record, name: str) -> list[Seed]:
  del name  # a seed has an id of its own
  seed = Seed.from_json(record)
  # A surrogate in a seed would otherwise fail hours later, when its row is written.
  check_row(seed.to_json())
  return [seed]


def load_seeds(source: str, *, count: int, seed: int) -> Found:
  """Loads the seeds of one source.

  Args:
    source: see the module's docstring.
    count: tasks of each kind, where a world makes them.
    seed: chooses what a world draws.

  Raises:
    ValueError: a source that is not there, one without a usable record, or a file of rows that hold
      no reference calls.
  """
  name, _, place = source.partition(':')
  # Names of worlds and benchmarks come before files, because they need no path.
  if name in WORLDS:
    return _world_source(source, count, seed)
  # These references are executed while they are read, so there is no file to be named.
  if source == 'tau2':
    return tau2_seeds()
  if name == 'taubench':
    records = load_records(place or TAUBENCH)
    return _collect(records, trajectory_reader(records), pathlib.Path(place or TAUBENCH).stem)
  # Everything else is a data set, whose colon may also belong to its path.
  if name in row_schemas.SCHEMAS:
    schema = name
  else:
    schema = None
    place = source

  def read(record: dict[str, Any], number: str, found: Found) -> list[Seed]:
    return _read_record(record, schema, number, found)

  # Ids do not change with the commit that a name of the hub is pinned to.
  stem = pathlib.Path(place.partition('@')[0]).name.partition('.')[0]
  return _collect(load_records(place), read, stem)


def _world_source(name: str, count: int, seed: int) -> Found:
  """Makes seeds of `count` training tasks of each kind of a world; see `registry.named_world`."""
  world = named_world(name)
  # BFCL's tasks take the number as it is, because files of seeds have been made in that way; no
  # other task set comes near its small numbers.
  drawn = seed if name == 'bfcl' else seed * 10 + SEEDS
  tasks = []
  for kind in world.kinds:
    tasks += world.tasks(kind, count, seed=drawn, split='train')
  return Found(_seeds_of(world, tasks), len(tasks), collections.Counter())


def _seeds_of(world: World, tasks: Sequence[WorldTask]) -> list[Seed]:
  seeds = []
  for task in tasks:
    seeds += task_seeds(world, task)
  return seeds


# (record, name of the record, where drops are counted) -> seeds. A reader raises ValueError or
# another one of `records.ODD` for a record that it cannot read.
Reader = Callable[[dict[str, Any], str, Found], list[Seed]]


def _collect(records: Sequence[Any], read: Reader, stem: str) -> Found:
  found = Found([], len(records), collections.Counter())
  problem = ''
  for number, record in enumerate(records):
    try:
      if isinstance(record, Unreadable):
        # The error takes the way of all unreadable records: it is counted and the first one is
        # shown.
        raise ValueError(record.reason)
      seeds = read(record, f'{stem}-{number}', found)
      for seed in seeds:
        # All seeds of a record are checked before one of them is taken: a record is kept whole or
        # dropped.
        check_row(seed.to_json())
      found.seeds += seeds
    except ODD as error:
      found.dropped['unreadable record'] += 1
      problem = problem or f'row {number}: {error!r}'
  if not found.seeds:
    raise ValueError(
      f'{stem}: none of {len(records)} records gives a seed: {dict(found.dropped)} {problem}'
    )
  return found


def _read_record(record: dict[str, Any], schema: str | None, name: str, found: Found) -> list[Seed]:
  # Seeds and rows with a reference field also have messages, so they are tried before the schemas
  # of dialogues.
  if schema is None and reference_rows.is_seed(record):
    return [Seed.from_json(record)]
  if schema is None and reference_rows.has_reference(record):
    return [_asked_seed(record, name)]
  schema = schema or row_schemas.recognise(record)
  # ToolRL describes its tools in words. It has no dialogue with specs, only the point itself.
  if schema == 'toolrl':
    row_schemas.check_fields(record, schema)
    return [_toolrl_seed(record, name)]
  dialogue = row_schemas.to_dialogue(record, schema, name) if schema else None
  if dialogue is None:
    raise ValueError(
      f'rows of schema {schema} hold no reference calls as data; its fields are {sorted(record)}'
    )
  return list(dialogue_seeds(dialogue, found))


def _asked_seed(record: dict[str, Any], name: str) -> Seed:
  """Makes a seed of messages and the reference response in a field of its own."""
  asked = reference_rows.read_asked(record, name)
  dialogue = ''
  # The steps of one recorded dialogue have its words in common.
  if record.get('trajectory_id') is not None:
    dialogue = f'{name.rpartition("-")[0]}-trajectory{record["trajectory_id"]}'
  return Seed(
    id=str(record['id']) if record.get('id') is not None else name,
    # A row with one reference answer is one response: several calls in it are parallel.
    kind=_kind_of(asked.calls, together=True),
    conversations=asked.messages,
    calls=asked.calls,
    tool_response=(),
    answer=asked.words,
    dialogue=dialogue,
  )


def _toolrl_seed(record: dict[str, Any], name: str) -> Seed:
  """Makes a seed of a ToolRL row, which is one response: its calls go out together."""
  point, _ = row_schemas.toolrl_point(record, name)
  calls = tuple(parse_calls(point.reference) or ())
  return Seed(
    id=point.id,
    kind=_kind_of(calls, together=True),
    conversations=point.messages,
    calls=calls,
    tool_response=(),
    answer='' if calls else point.reference,
  )


def _kind_of(calls: Sequence[ToolCall], *, together: bool) -> str:
  """Returns the kind of a seed whose calls go out together or one after another."""
  if not calls:
    return 'irrelevant'
  if len(calls) == 1:
    return 'single'
  return 'parallel' if together else 'sequential'


# --- dialogues ---


@dataclasses.dataclass
class _Step:
  """An assistant's message of a dialogue, and the outputs that came back for its calls."""

  message: DialogueTurn
  outputs: list[str]

  @property
  def said(self) -> str:
    """The part of the message that later prompts show: words and calls, without thoughts."""
    if self.message.calls:
      # Thoughts are left out, as in the history of rows (docs/method.md, section 2.1).
      words = self.message.words + '\n\n' if self.message.words else ''
      return words + print_calls(list(self.message.calls))
    return split_answer(self.message.text)[1].strip()


@dataclasses.dataclass
class DialogueRequest:
  """A user turn of a dialogue, and the steps in which the assistant dealt with it."""

  query: str
  steps: list[_Step]

  @property
  def calls(self) -> tuple[ToolCall, ...]:
    """The calls of all steps."""
    calls: tuple[ToolCall, ...] = ()
    for step in self.steps:
      calls += step.message.calls
    return calls

  @property
  def outputs(self) -> tuple[str, ...]:
    """What came back for them."""
    outputs: tuple[str, ...] = ()
    for step in self.steps:
      outputs += tuple(step.outputs)
    return outputs

  @property
  def answer(self) -> str:
    """The text that ends the turn; '' if it ends with calls or without a word."""
    if not self.steps or self.steps[-1].message.calls:
      return ''
    return self.steps[-1].said


def dialogue_seeds(dialogue: Dialogue, found: Found, *, refusals: bool = True) -> Iterator[Seed]:
  """Yields a seed for each user turn in which tools are called; its history is the dialogue before.

  A turn without calls is an irrelevant seed if tools are listed and it is the dialogue's only turn,
  as in data sets of single requests. Elsewhere it is conversation, and counted.

  Args:
    dialogue: with names that a Python-style call can have.
    found: counts what is dropped.
    refusals: whether there are irrelevant seeds.
  """
  # Without tools there is no list to show: the policy may describe them in words.
  system = dialogue.policy
  if dialogue.tools:
    system = tool_specs.system_text(dialogue.policy, dialogue.tools)
  history = [Message('system', system)] if system else []
  # A seed has one system message, at its start. Dropping a later one would lose an instruction.
  if any(turn.role == 'system' for turn in dialogue.turns):
    raise ValueError('a system message stands inside the dialogue, where no seed can show it')
  requests = dialogue_requests(dialogue.turns)
  for number, request in enumerate(requests):
    calls = request.calls
    outputs = request.outputs
    answer = request.answer
    query = Message('user', request.query)
    # Calls of one message cannot depend on each other's outputs: they are parallel.
    together = sum(bool(step.message.calls) for step in request.steps) == 1
    seed_kind = _kind_of(calls, together=together)
    # In a longer dialogue a turn without calls is usually small talk, and not a request that no
    # tool fits.
    refused = refusals and len(requests) == 1 and dialogue.tools and answer
    if calls and len(outputs) != len(calls) and (outputs or seed_kind == 'sequential' or answer):
      found.dropped['an output is missing'] += 1
      return  # the history of later turns would lack the output, too
    # What must not be learned from is no reference. It stays in the history, as in rows.
    if not all(step.message.trained for step in request.steps):
      found.dropped['not to be trained'] += 1
    elif calls or refused:
      yield Seed(
        id=f'{dialogue.id}/{number}',
        kind=seed_kind,
        conversations=(*history, query),
        calls=calls,
        # A stray output without a call has nothing that it answers.
        tool_response=outputs if calls else (),
        answer=answer,
        dialogue=dialogue.id,
      )
    else:
      found.dropped['a turn without calls'] += 1
    # Also turns that give no seed belong to the history of the later ones.
    history.append(query)
    for step in request.steps:
      history.append(Message('assistant', step.said))
      if step.outputs:
        # Outputs of one message share one user message, as in Qwen3's template.
        history.append(Message('user', '\n'.join(map(tool_response, step.outputs))))


def dialogue_requests(turns: Sequence[DialogueTurn]) -> list[DialogueRequest]:
  """Groups a dialogue by user turns, with the assistant's messages and their outputs."""
  requests: list[DialogueRequest] = []
  for turn in turns:
    if turn.role == 'user':
      requests.append(DialogueRequest(turn.text, []))
    elif not requests:
      continue  # a greeting before anything is asked
    elif turn.role == 'assistant':
      requests[-1].steps.append(_Step(turn, []))
    # An output before any message of the assistant answers no call, and is left out.
    elif requests[-1].steps:
      requests[-1].steps[-1].outputs.append(turn.text)
  return requests


# --- tau-bench ---

_JSON_TYPES = {
  bool: 'boolean',
  int: 'integer',
  float: 'number',
  list: 'array',
  dict: 'object',
}


def trajectory_reader(records: Sequence[dict[str, Any]]) -> Reader:
  """Reads recorded trajectories {task_id, reward, traj: OpenAI messages} of one domain.

  They come without the tools' descriptions, so specs are drawn up from the calls in all
  trajectories that can be read. Only rewarded trajectories are references. A `think` call does
  nothing and is left out. A turn with a failed call is no reference either.
  """
  # All records are read for the specs, rewarded or not: a failed attempt also shows how a tool is
  # called.
  specs = _observed_tools(records)

  def read(record: dict[str, Any], name: str, found: Found) -> list[Seed]:
    if record['reward'] != 1:
      found.dropped['not rewarded'] += 1
      return []
    # Trials of one task have one task_id; the file's name keeps domains with equal ids apart.
    task = f'{name.rpartition("-")[0]}-task{record["task_id"]}'
    dialogue = Dialogue(
      id=f'{task}/{record["trial"]}',
      policy=record['traj'][0]['content'],
      tools=specs,
      turns=tuple(_trajectory_turns(record['traj'][1:])),
    )
    seeds = []
    for seed in dialogue_seeds(dialogue, found, refusals=False):
      # tau-bench's tools report failures as text that begins with 'Error'.
      if any(output.startswith('Error') for output in seed.tool_response):
        found.dropped['a call failed'] += 1
      else:
        # All trials of a task are one dialogue, because what its user wants is the same.
        seeds.append(dataclasses.replace(seed, dialogue=task))
    return seeds

  return read


def _message_calls(message: dict[str, Any]) -> list[tuple[str, Any]]:
  """Returns (name, arguments) of each call in an OpenAI message."""
  functions = [call['function'] for call in message.get('tool_calls') or ()]
  return [(function['name'], json.loads(function['arguments'])) for function in functions]


def _trajectory_turns(messages: Sequence[dict[str, Any]]) -> Iterator[DialogueTurn]:
  for message in messages:
    calls = tuple(ToolCall(name, arguments) for name, arguments in _message_calls(message))
    if message['role'] == 'tool':
      if message['name'] != 'think':
        yield DialogueTurn('tool', message['content'])
    elif not any(call.name == 'think' for call in calls):
      # tau-bench's user ends the dialogue by this mark, which is no part of what is said.
      text = (message['content'] or '').replace('###STOP###', '').strip()
      if text or calls:
        yield DialogueTurn(message['role'], text, calls)


def _observed_tools(records: Sequence[dict[str, Any]]) -> tuple[ToolSpec, ...]:
  """Derives a spec of each called tool from its calls.

  A parameter is one that occurs in a call; it is required if every call has it.
  """
  seen: dict[str, list[dict[str, Any]]] = collections.defaultdict(list)
  for record in records:
    calls = []
    try:
      for message in record['traj']:
        calls += [(name, dict(arguments)) for name, arguments in _message_calls(message)]
    except (ValueError, KeyError, TypeError, AttributeError):
      continue  # no seed will come of this record either, which is counted where it is read
    for name, arguments in calls:
      seen[name].append(arguments)
  return tuple(_observed_spec(name, seen[name]) for name in sorted(seen.keys() - {'think'}))


def _observed_spec(name: str, calls: Sequence[dict[str, Any]]) -> ToolSpec:
  names: set[str] = set()
  for call in calls:
    names.update(call)
  parameters = sorted(names)
  properties = {}
  required = []
  for parameter in parameters:
    # The first value decides the type. Null has no type name here, and counts as a text.
    values = [call[parameter] for call in calls if parameter in call]
    properties[parameter] = {'type': _JSON_TYPES.get(type(values[0]), 'string')}
    if len(values) == len(calls):
      required.append(parameter)
  schema = {'type': 'object', 'properties': properties, 'required': required}
  return ToolSpec(name, name.replace('_', ' '), schema)


# --- tau2-bench ---

# tau2's user is a model that plays a customer by notes in the second person. Rewriting them would
# need a model, so the notes are quoted.
_TAU2_QUERY = (
  'I am calling for somebody else and was given these notes. "You" in them is the customer.\n\n{0}'
)
_TAU2_TOLD = ('known_info', 'unknown_info', 'reason_for_call', 'task_instructions')


def tau2_seeds() -> Found:
  """Makes seeds of tau2's train splits, in the domains whose tools can be executed alone.

  The reference actions are the calls. Calls of `calculate` are left out: they change nothing and
  can be written in many ways. A task is dropped and counted if it has no actions, if an action
  fails, or if an action has a value that neither the notes, the policy nor an earlier output holds:
  such a reference lacks the lookups that a solver needs.
  """
  found = Found([], 0, collections.Counter())
  for name in tau2_tasks.EXECUTABLE:
    domain = tau2_tasks.Domain(name)
    system = tool_specs.system_text(domain.policy, domain.specs)
    for task in tau2_tasks.read_tasks(name, 'train'):
      found.records += 1
      # tau2's reference actions are a list of one order, so its calls count as sequential.
      calls = tuple(call for call in tau2_tasks.reference_calls(task) if call.name != 'calculate')
      query = _TAU2_QUERY.format(tau2_tasks.told(task, _TAU2_TOLD))
      try:
        outputs = tuple(domain.outputs(calls))
      except ValueError:
        found.dropped['a call failed'] += 1
        continue
      if not calls:
        found.dropped['no reference call'] += 1
      elif not _follows([system, query], calls, outputs):
        found.dropped['a value from nowhere'] += 1
      else:
        seed = Seed(
          id=f'tau2-{name}-{task["id"]}',
          kind=_kind_of(calls, together=False),
          conversations=(Message('system', system), Message('user', query)),
          calls=calls,
          tool_response=outputs,
        )
        found.seeds.append(seed)
  return found


def _follows(said: list[str], calls: Sequence[ToolCall], outputs: Sequence[str]) -> bool:
  """Says whether each value of a call occurs in what was said or in an output before it."""
  # Output i stands at place len(said) + i, so call i sees the outputs before it and not its own.
  known = [Said([text], readings=True) for text in (*said, *outputs)]
  for number, call in enumerate(calls):
    before = known[: len(said) + number]
    for value in call_values([call]):
      words = words_of(value)
      # A value of no words, such as '-', cannot be looked up.
      if words and not any(words in text for text in before):
        return False
  return True
