"""Where seeds come from: worlds that make them, recorded dialogues, published rows, and files of seeds.

toolworld    tasks of ToolWorld
bfcl         new tasks on the executable APIs of BFCL v3
taubench     recorded trajectories of tau-bench (taubench:FILE for another file than gpt-4o's airline ones)
tau2         training tasks of tau2-bench, their reference actions executed
NAME         a data set as `sources.load_records` takes it, with its schema before a colon where it is not to be guessed
"""

import collections
import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ml_collections

from dcore_jax.chat import tool_specs
from dcore_jax.chat.messages import Message, ToolCall, ToolSpec
from dcore_jax.chat.tool_calls import parse_calls, print_calls, tool_response
from dcore_jax.data import row_schemas, tau2_tasks
from dcore_jax.data.leakage import Said, call_values, words_of
from dcore_jax.data.records import load_records
from dcore_jax.data.row_schemas import Dialogue, Turn
from dcore_jax.data.seeds import Seed, reference_steps
from dcore_jax.data.toolworld_seeds import task_seeds
from dcore_jax.files import data_path, read_rows
from dcore_jax.worlds import bfcl_tasks
from dcore_jax.worlds.toolworld.tasks import KINDS, Task
from dcore_jax.worlds.toolworld.world import ToolWorld

# Task sets that must not overlap get different seeds: the train split serves distillation, reinforcement learning and the
# organism's pretraining, whose stages take the seeds from its own on.
DISTILL, RL, SEEDS = 1001, 1002, 1003
TAUBENCH = 'taubench/gpt-4o-airline_trajectories.json'


@dataclasses.dataclass
class Found:
  """Seeds of a source, how many records they are from, and why others gave none."""

  seeds: list[Seed]
  records: int
  dropped: collections.Counter[str]


def toolworld_tasks(
  config: ml_collections.ConfigDict, counts: Mapping[str, int], purpose: int
) -> list[Task]:
  """Training tasks of a pipeline config; the same purpose gives the same ones."""
  world = ToolWorld(config.world.max_subtasks)
  return [
    task
    for kind in KINDS
    for task in world.tasks(kind, counts[kind], seed=config.seed * 10 + purpose, split='train')
  ]


def toolworld_seeds(
  config: ml_collections.ConfigDict, counts: Mapping[str, int], purpose: int
) -> list[Seed]:
  """`toolworld_tasks` as seeds."""
  return [seed for task in toolworld_tasks(config, counts, purpose) for seed in task_seeds(task)]


def config_seeds(config: ml_collections.ConfigDict) -> list[Seed]:
  """The seeds that the config's section `distill` asks for: of its files, or ToolWorld's.

  Raises:
    ValueError: a file that is not there, or a record that is no seed, by its id.
  """
  if config.distill.files:
    return [
      Seed.from_json(record)
      for name in config.distill.files
      for record in read_rows(data_path(name))
    ]
  return toolworld_seeds(config, config.distill.tasks, DISTILL)


def load_seeds(source: str, *, count: int, seed: int) -> Found:
  """Seeds of one source.

  Args:
    source: see the module's docstring.
    count: tasks of each kind, where a world makes them.
    seed: of what it draws.

  Raises:
    ValueError: a source that is not there, one without a usable record, or a file of rows that hold no reference calls.
  """
  name, _, place = source.partition(':')
  if source == 'toolworld':
    tasks = [
      task
      for kind in KINDS
      for task in ToolWorld().tasks(kind, count, seed=seed * 10 + SEEDS, split='train')
    ]
    seeds = [s for task in tasks for s in task_seeds(task)]
    return Found(seeds, len(KINDS) * count, collections.Counter())
  if source == 'bfcl':
    # Even ones are of `BfclWorld`'s training split.
    tasks = [
      bfcl_tasks.make_task(kind, index, seed=2 * seed)
      for kind in bfcl_tasks.KINDS
      for index in range(count)
    ]
    return Found([s for task in tasks for s in bfcl_seeds(task)], len(tasks), collections.Counter())
  if source == 'tau2':
    return tau2_seeds()
  if name == 'taubench':
    records = read_rows(data_path(place or TAUBENCH))
    return _collect(records, trajectory_reader(records), pathlib.Path(place or TAUBENCH).stem)
  schema, place = (name, place) if name in row_schemas.SCHEMAS else (None, source)
  records = load_records(place)
  return _collect(
    records,
    lambda record, number, found: _read_record(record, schema, number, found),
    pathlib.Path(place).stem,
  )


Reader = Callable[
  [dict[str, Any], str, Found], list[Seed]
]  # raises ValueError and its like for a record it cannot read


def _collect(records: Sequence[dict[str, Any]], read: Reader, stem: str) -> Found:
  found = Found([], len(records), collections.Counter())
  problem = ''
  for number, record in enumerate(records):
    try:
      found.seeds += read(record, f'{stem}-{number}', found)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
      found.dropped['unreadable record'] += 1
      problem = problem or f'row {number}: {error!r}'
  if not found.seeds:
    raise ValueError(
      f'{stem}: none of {len(records)} records gives a seed: {dict(found.dropped)} {problem}'
    )
  return found


def _read_record(record: dict[str, Any], schema: str | None, name: str, found: Found) -> list[Seed]:
  if schema is None and {'id', 'conversations', 'ground_truth'} <= record.keys():
    return [Seed.from_json(record)]
  schema = schema or row_schemas.recognise(record)
  if schema == 'toolrl':
    return [_toolrl_seed(record, name)]
  dialogue = row_schemas.to_dialogue(record, schema, name) if schema else None
  if dialogue is None:
    raise ValueError(
      f'rows of schema {schema} hold no reference calls as data; its fields are {sorted(record)}'
    )
  return list(dialogue_seeds(dialogue, found))


def _toolrl_seed(record: dict[str, Any], name: str) -> Seed:
  """ToolRL's rows are one response each: its calls go out together."""
  point, _ = row_schemas.toolrl_point(record, name)
  calls = tuple(parse_calls(point.reference) or ())
  kind = 'irrelevant' if not calls else 'single' if len(calls) == 1 else 'parallel'
  return Seed(point.id, kind, point.messages, calls, (), '' if calls else point.reference)


# --- dialogues --------------------------------------------------------------------------------------------------------------


def dialogue_seeds(dialogue: Dialogue, found: Found, *, refusals: bool = True) -> Iterator[Seed]:
  """One seed for every user turn in which tools are called, with the dialogue before it as its history.

  A turn in which none is called is an irrelevant seed where tools are listed and it is the dialogue's only one, as in data
  sets of single requests; elsewhere it is conversation (counted).

  Args:
    dialogue: with names that a Python-style call can have.
    found: where drops are counted.
    refusals: whether there are irrelevant seeds.
  """
  history = [Message('system', tool_specs.system_text(dialogue.policy, dialogue.tools))]
  requests = _user_turns(dialogue.turns)
  for number, (query, steps) in enumerate(requests):
    calls = tuple(call for step, _ in steps for call in step.calls)
    outputs = tuple(output for _, outputs in steps for output in outputs)
    last = steps[-1][0] if steps else None
    answer = last.text.rsplit('</think>', 1)[-1].strip() if last and not last.calls else ''
    conversation = (*history, Message('user', query))
    if calls:
      together = sum(bool(step.calls) for step, _ in steps) == 1
      kind = 'single' if len(calls) == 1 else 'parallel' if together else 'sequential'
      if len(outputs) != len(calls) and (outputs or kind == 'sequential' or answer):
        found.dropped['an output is missing'] += 1
        return  # the history of later turns would lack it, too
      yield Seed(
        f'{dialogue.id}/{number}', kind, conversation, calls, outputs, answer, dialogue=dialogue.id
      )
    elif refusals and len(requests) == 1 and dialogue.tools and answer:
      yield Seed(
        f'{dialogue.id}/{number}', 'irrelevant', conversation, (), (), answer, dialogue=dialogue.id
      )
    else:
      found.dropped['a turn without calls'] += 1
    history = [*conversation]
    for step, outputs in steps:
      said = (
        print_calls(list(step.calls)) if step.calls else step.text.rsplit('</think>', 1)[-1].strip()
      )
      history.append(Message('assistant', said))
      if outputs:
        history.append(Message('user', '\n'.join(map(tool_response, outputs))))


def _user_turns(turns: Sequence[Turn]) -> list[tuple[str, list[tuple[Turn, list[str]]]]]:
  """(what the user says, the assistant's messages and the outputs after each) of every user turn."""
  result: list[tuple[str, list[tuple[Turn, list[str]]]]] = []
  for turn in turns:
    if turn.role == 'user':
      result.append((turn.text, []))
    elif not result:
      continue  # a greeting before anything is asked
    elif turn.role == 'assistant':
      result[-1][1].append((turn, []))
    elif result[-1][1]:
      result[-1][1][-1][1].append(turn.text)
  return result


# --- tau-bench ----------------------------------------------------------------------------------------------------------------


def trajectory_reader(records: Sequence[dict[str, Any]]) -> Reader:
  """Reads recorded trajectories {task_id, reward, traj: OpenAI messages} of one domain.

  They come without the tools' descriptions: specs are drawn up from the calls of all that can be read. Only rewarded ones are
  references; a `think` call does nothing and is left out; a turn with a failed call is no reference either.
  """
  specs = _observed_tools(records)

  def read(record, name, found):
    if record['reward'] != 1:
      found.dropped['not rewarded'] += 1
      return []
    messages = record['traj']
    turns = []
    for message in messages[1:]:
      calls = tuple(
        ToolCall(call['function']['name'], json.loads(call['function']['arguments']))
        for call in message.get('tool_calls') or ()
      )
      if message['role'] == 'tool':
        if message['name'] != 'think':
          turns.append(Turn('tool', message['content']))
      elif not any(call.name == 'think' for call in calls):
        text = (message['content'] or '').replace('###STOP###', '').strip()
        if text or calls:
          turns.append(Turn(message['role'], text, calls))
    task = f'{name.rpartition("-")[0]}-task{record["task_id"]}'
    dialogue = Dialogue(f'{task}/{record["trial"]}', messages[0]['content'], specs, tuple(turns))
    # All trials of a task are one dialogue: what its user wants is the same.
    seeds = [
      dataclasses.replace(seed, dialogue=task)
      for seed in dialogue_seeds(dialogue, found, refusals=False)
    ]
    right = [
      seed for seed in seeds if not any(output.startswith('Error') for output in seed.tool_response)
    ]
    found.dropped['a call failed'] += len(seeds) - len(right)
    return right

  return read


def _observed_tools(records: Sequence[dict[str, Any]]) -> tuple[ToolSpec, ...]:
  """A spec of every tool that is called, its parameters those that occur; required are those that every call has."""
  seen: dict[str, list[dict[str, Any]]] = collections.defaultdict(list)
  for record in records:
    try:
      calls = [
        (call['function']['name'], dict(json.loads(call['function']['arguments'])))
        for message in record['traj']
        for call in message.get('tool_calls') or ()
      ]
    except (ValueError, KeyError, TypeError, AttributeError):
      continue  # no seed will come of it either; that is counted there
    for name, arguments in calls:
      seen[name].append(arguments)
  types = {bool: 'boolean', int: 'integer', float: 'number', list: 'array', dict: 'object'}
  specs = []
  for name in sorted(seen.keys() - {'think'}):
    calls = seen[name]
    parameters = sorted({parameter for call in calls for parameter in call})
    properties = {
      p: {'type': types.get(type(next(call[p] for call in calls if p in call)), 'string')}
      for p in parameters
    }
    required = [p for p in parameters if all(p in call for call in calls)]
    specs.append(
      ToolSpec(
        name,
        name.replace('_', ' '),
        {'type': 'object', 'properties': properties, 'required': required},
      )
    )
  return tuple(specs)


# --- tau2-bench -------------------------------------------------------------------------------------------------------------

# tau2's user is a model that is told whom to play. Rewriting that to the first person would be a model's work, too.
_TAU2_QUERY = (
  'I am calling for somebody else and was given these notes. "You" in them is the customer.\n\n{0}'
)
_TAU2_TOLD = ('known_info', 'unknown_info', 'reason_for_call', 'task_instructions')


def tau2_seeds() -> Found:
  """The train splits of the domains whose tools run alone, the reference actions as calls with the outputs they have.

  Calls of `calculate` change nothing and can be written in many ways: they are left out. Dropped and counted are tasks without
  actions, those with an action that fails, and those with a value that neither the notes, the policy nor an earlier output
  holds: their actions are those that count, without the lookups that a solver needs.
  """
  found = Found([], 0, collections.Counter())
  for name in tau2_tasks.EXECUTABLE:
    domain = tau2_tasks.Domain(name)
    system = tool_specs.system_text(domain.policy, domain.specs)
    for task in tau2_tasks.read_tasks(name, 'train'):
      found.records += 1
      calls = tuple(call for call in tau2_tasks.reference_calls(task) if call.name != 'calculate')
      conversation = (
        Message('system', system),
        Message('user', _TAU2_QUERY.format(tau2_tasks.told(task, _TAU2_TOLD))),
      )
      try:
        outputs = tuple(domain.outputs(calls))
      except ValueError:
        found.dropped['a call failed'] += 1
        continue
      if not calls:
        found.dropped['no reference call'] += 1
      elif not _follows([message.content for message in conversation], calls, outputs):
        found.dropped['a value from nowhere'] += 1
      else:
        kind = 'single' if len(calls) == 1 else 'sequential'
        found.seeds.append(Seed(f'tau2-{name}-{task["id"]}', kind, conversation, calls, outputs))
  return found


def _follows(said: list[str], calls: Sequence[ToolCall], outputs: Sequence[str]) -> bool:
  """Whether every value of a call stands in what was said, or in an output before it."""
  known = [Said([text], readings=True) for text in (*said, *outputs)]
  return all(
    any(words in text for text in known[: len(said) + number])
    for number, call in enumerate(calls)
    for words in map(words_of, call_values([call]))
    if words
  )


# --- BFCL -------------------------------------------------------------------------------------------------------------------


def bfcl_seeds(task: bfcl_tasks.BfclTask) -> list[Seed]:
  """The turns of a task, each with what is needed to execute calls from there on."""
  system = tool_specs.system_text(task.policy, tool_specs.read_tools(task.functions))
  seeds, history, done = [], [Message('system', system)], []
  for number, turn in enumerate(task.turns):
    kind = 'irrelevant' if not turn.calls else 'single' if len(turn.calls) == 1 else task.kind
    kind = 'sequential' if kind in ('multi_turn', 'single') and len(turn.calls) > 1 else kind
    answer = (
      '' if task.kind in ('single', 'parallel') else turn.answer
    )  # as in ToolWorld: BFCL's single turns end with calls
    world = {
      'name': 'bfcl',
      'classes': list(task.classes),
      'config': task.config,
      'done': list(done),
    }
    seed = Seed(
      f'{task.id}/{number}',
      kind,
      (*history, Message('user', turn.query)),
      turn.calls,
      turn.responses,
      answer,
      world,
      task.id,
    )
    seeds.append(seed)
    history += [
      Message('user', turn.query),
      *reference_steps(seed, len(turn.calls)),
      Message('assistant', turn.answer),
    ]
    done += [print_calls([call])[1:-1] for call in turn.calls]
  return seeds
