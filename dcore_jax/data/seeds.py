"""Seeds: the input records of self-distillation (method: section 1.1), and the decision points that RL asks about."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from dcore_jax.chat.messages import Message, ToolCall
from dcore_jax.chat.tool_calls import parse_calls, parse_reference, print_calls, tool_response

KINDS = ('single', 'sequential', 'parallel', 'irrelevant')


@dataclasses.dataclass(frozen=True)
class Seed:
  """One user turn with its reference solution.

  Attributes:
    id: where it comes from.
    kind: one of KINDS: how its subtasks relate.
    conversations: system message, history, and the query to decompose, which is the last message.
    calls: reference calls; empty where nothing fits.
    tool_response: the recorded output of each call. Where the calls go out together and nothing follows (single-turn data) and
      where a world executes them, there may be none.
    answer: the reference text after the last output, or the refusal where there are no calls; '' when not known.
    world: what `worlds.sandbox.open_sandbox` needs to execute calls from this query on; None where nothing can be executed.
    dialogue: the same for seeds whose histories say the same: turns of one dialogue, trials of one task; '' for a seed alone.
  """

  id: str
  kind: str
  conversations: tuple[Message, ...]
  calls: tuple[ToolCall, ...]
  tool_response: tuple[str, ...]
  answer: str = ''
  world: Mapping[str, Any] | None = None
  dialogue: str = ''

  def __post_init__(self):
    problems = []
    if self.kind not in KINDS:
      problems.append(f'kind {self.kind!r} is not one of {KINDS}')
    if not self.conversations or self.conversations[-1].role != 'user':
      problems.append("the last message is not the user's query")
    outputs_needed = not self.world and (self.kind == 'sequential' or self.answer)
    if len(self.calls) != len(self.tool_response) and (self.tool_response or outputs_needed):
      problems.append(f'{len(self.calls)} calls but {len(self.tool_response)} tool responses')
    if (self.kind == 'irrelevant') == bool(self.calls):
      problems.append(f'kind {self.kind!r} with {len(self.calls)} calls')
    if self.kind == 'irrelevant' and not self.answer:
      problems.append('an irrelevant seed needs the reference answer')
    if problems:
      raise ValueError(f'seed {self.id!r}: ' + '; '.join(problems))

  @property
  def query(self) -> str:
    return self.conversations[-1].content

  @property
  def context(self) -> list[Message]:
    """Everything before the query."""
    return list(self.conversations[:-1])

  def to_json(self) -> dict[str, Any]:
    ground_truth = [print_calls([c])[1:-1] for c in self.calls] if self.calls else self.answer
    return {
      'id': self.id,
      'kind': self.kind,
      'conversations': [m.to_json() for m in self.conversations],
      'ground_truth': ground_truth,
      'tool_response': list(self.tool_response),
      'answer': self.answer,
      **({'world': self.world} if self.world else {}),
      **({'dialogue': self.dialogue} if self.dialogue else {}),
    }

  @classmethod
  def from_json(cls, record: Any) -> 'Seed':
    """Reads a record; ValueError names it by its id when it is not one.

    `ground_truth` is a list of call strings, one string that holds a bracketed call list (as in BFCL), or a text. Without a
    `kind`, several calls are parallel where there are neither outputs nor a world to run them in.
    """
    if not isinstance(record, dict) or not {'id', 'conversations', 'ground_truth'} <= record.keys():
      raise ValueError(
        f'not a seed record (id, conversations, ground_truth): {str(record)[:120]!r}'
      )
    try:
      truth = record['ground_truth']
      calls = tuple(parse_calls(truth) or () if isinstance(truth, str) else parse_reference(truth))
      responses = record.get('tool_response', [])
      if not isinstance(responses, list) or not all(isinstance(r, str) for r in responses):
        raise ValueError('tool_response is no list of texts')
      if not isinstance(record.get('dialogue', ''), str):
        raise ValueError('dialogue is no text')
      world = record.get('world')
      if world is not None and not (isinstance(world, dict) and isinstance(world.get('name'), str)):
        raise ValueError('world is no object with a name')
      several = (
        'sequential' if responses or world else 'parallel'
      )  # outputs of one call may be needed by the next
      kind = record.get('kind') or (
        'irrelevant' if not calls else 'single' if len(calls) == 1 else several
      )
      return cls(
        str(record['id']),
        kind,
        tuple(Message.from_json(m) for m in record['conversations']),
        calls,
        tuple(responses),
        truth if isinstance(truth, str) and not calls else record.get('answer', ''),
        world,
        record.get('dialogue', ''),
      )
    except (TypeError, ValueError) as error:
      raise ValueError(f'seed record {record["id"]!r} cannot be read: {error}') from error


def reference_steps(seed: Seed, done: int) -> list[Message]:
  """The reference solution's first `done` calls and outputs as later prompts show them (no reasoning is replayed)."""
  steps = []
  for call, response in zip(seed.calls[:done], seed.tool_response[:done]):
    steps += [Message('assistant', print_calls([call])), Message('user', tool_response(response))]
  return steps


@dataclasses.dataclass(frozen=True)
class DecisionPoint:
  """A prompt and the reference answer the reward compares with."""

  id: str
  kind: str
  messages: tuple[Message, ...]
  reference: str


def decision_points(seed: Seed) -> Iterator[DecisionPoint]:
  """Every prompt the reference solution passes through: one per call and one for the report; one in all where the calls go out
  together or none is right."""
  if seed.kind in ('irrelevant', 'parallel'):
    reference = print_calls(list(seed.calls)) if seed.calls else seed.answer
    yield DecisionPoint(seed.id, seed.kind, seed.conversations, reference)
    return
  for done, call in enumerate(seed.calls):
    messages = (*seed.conversations, *reference_steps(seed, done))
    yield DecisionPoint(f'{seed.id}/{done}', seed.kind, messages, print_calls([call]))
  if seed.answer:
    done = len(seed.calls)
    yield DecisionPoint(
      f'{seed.id}/{done}',
      seed.kind,
      (*seed.conversations, *reference_steps(seed, done)),
      seed.answer,
    )
