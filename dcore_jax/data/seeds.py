"""Seeds, the input records of self-distillation, and the decision points that RL asks about.

See docs/method.md, section 1.1.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from dcore_jax.chat.messages import Message, ToolCall, refuse_unknown
from dcore_jax.chat.tool_calls import parse_calls, parse_reference, print_calls, tool_response
from dcore_jax.data.dialogues import FREE_FIELDS

KINDS = ('single', 'sequential', 'parallel', 'irrelevant')


@dataclasses.dataclass(frozen=True)
class Seed:
  """One user turn with its reference solution.

  Attributes:
    id: where it comes from.
    kind: one of KINDS: how its subtasks relate.
    conversations: system message, history, and last the query to decompose.
    calls: reference calls; empty where nothing fits.
    tool_response: the recorded output of each call. There may be none where the calls go out
      together and nothing follows (single-turn data), and where a world executes them.
    answer: the reference text after the last output, or the refusal where there are no calls; ''
      where it is not known.
    world: what `worlds.registry.open_sandbox` needs to execute calls from this query on; None where
      nothing can be executed.
    dialogue: a name that seeds share whose histories overlap, such as the turns of one dialogue or
      the trials of one task; '' for a seed that stands alone.

  Raises:
    ValueError: fields that do not fit together, with the seed's id.
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
    # All problems are collected: a file of seeds is then mended in one go.
    problems = []
    if self.kind not in KINDS:
      problems.append(f'kind {self.kind!r} is not one of {KINDS}')
    if not self.conversations or self.conversations[-1].role != 'user':
      problems.append("the last message is not the user's query")
    # A later call, or the answer, may depend on an output: without a world that can be asked for it
    # the record must have it.
    outputs_needed = not self.world and (self.kind == 'sequential' or self.answer)
    if len(self.calls) != len(self.tool_response) and (self.tool_response or outputs_needed):
      problems.append(f'{len(self.calls)} calls but {len(self.tool_response)} tool responses')
    # Only an irrelevant seed has no calls: the others need a reference to compare with.
    if (self.kind == 'irrelevant') == bool(self.calls):
      problems.append(f'kind {self.kind!r} with {len(self.calls)} calls')
    # The answer is the training target where nothing is called.
    if self.kind == 'irrelevant' and not self.answer:
      problems.append('an irrelevant seed needs the reference answer')
    if problems:
      raise ValueError(f'seed {self.id!r}: ' + '; '.join(problems))

  @property
  def query(self) -> str:
    """What the user asks for."""
    return self.conversations[-1].content

  @property
  def context(self) -> list[Message]:
    """Everything before the query."""
    return list(self.conversations[:-1])

  def to_json(self) -> dict[str, Any]:
    """Returns the record that `from_json` reads."""
    # Call strings stand without their brackets, as in the released records (docs/method.md, section
    # 1.1).
    ground_truth = [print_calls([call])[1:-1] for call in self.calls]
    record = {
      'id': self.id,
      'kind': self.kind,
      'conversations': [message.to_json() for message in self.conversations],
      # A text in place of calls is how the released data marks a refusal.
      'ground_truth': ground_truth or self.answer,
      'tool_response': list(self.tool_response),
      'answer': self.answer,
    }
    # Absent fields keep files readable for programs that know nothing of them.
    if self.world:
      record['world'] = self.world
    if self.dialogue:
      record['dialogue'] = self.dialogue
    return record

  @classmethod
  def from_json(cls, record: Any) -> 'Seed':
    """Reads a record.

    `ground_truth` is a list of call strings, one string that holds a bracketed call list (as in
    BFCL), or a text. Without a `kind`, several calls are parallel where there are neither outputs
    nor a world to run them in.

    Raises:
      ValueError: the record is no seed, with its id.
    """
    # Checked apart from the rest, because the error below names the record by its id.
    if not isinstance(record, dict) or not {'id', 'conversations', 'ground_truth'} <= record.keys():
      raise ValueError(
        f'not a seed record (id, conversations, ground_truth): {str(record)[:120]!r}'
      )
    try:
      # A misspelt field would be ignored, and the seed would then say less than its author meant.
      known = [field.name for field in dataclasses.fields(cls)] + ['ground_truth']
      refuse_unknown(record, known, 'the record', FREE_FIELDS)
      truth = record['ground_truth']
      # A string is a call list or a refusal: a text that is no call list gives no calls.
      calls = tuple(parse_calls(truth) or () if isinstance(truth, str) else parse_reference(truth))
      responses = record.get('tool_response', [])
      if not isinstance(responses, list) or not all(isinstance(r, str) for r in responses):
        raise ValueError('tool_response is no list of texts')
      if not isinstance(record.get('dialogue', ''), str):
        raise ValueError('dialogue is no text')
      world = record.get('world')
      if world is not None and not (isinstance(world, dict) and isinstance(world.get('name'), str)):
        raise ValueError('world is no object with a name')
      answer = record.get('answer', '')
      # The refusal is in ground_truth, and `answer` is a copy of it or absent.
      if isinstance(truth, str) and not calls:
        answer = truth
      return cls(
        id=str(record['id']),
        kind=record.get('kind') or _guess_kind(calls, executed=bool(responses or world)),
        conversations=tuple(Message.from_json(message) for message in record['conversations']),
        calls=calls,
        tool_response=tuple(responses),
        answer=answer,
        world=world,
        dialogue=record.get('dialogue', ''),
      )
    except (TypeError, ValueError) as error:
      raise ValueError(f'seed record {record["id"]!r} cannot be read: {error}') from error


def _guess_kind(calls: tuple[ToolCall, ...], *, executed: bool) -> str:
  """Guesses the kind of a record that has none."""
  if not calls:
    return 'irrelevant'
  if len(calls) == 1:
    return 'single'
  # Where there are outputs, the next call may need that of the one before.
  return 'sequential' if executed else 'parallel'


def reference_steps(seed: Seed, done: int) -> list[Message]:
  """Writes the first `done` calls and outputs of the reference as later prompts show them."""
  calls = seed.calls[:done]
  responses = seed.tool_response[:done]
  steps = []
  # Parallel seeds may have no outputs, and then there is nothing to show.
  for call, response in zip(calls, responses, strict=False):
    steps.append(Message('assistant', print_calls([call])))
    steps.append(Message('user', tool_response(response)))
  return steps


@dataclasses.dataclass(frozen=True)
class DecisionPoint:
  """A prompt and the reference answer that the reward compares with.

  Attributes:
    id: the seed's, with the number of the step where the seed has several.
    kind: the seed's.
    messages: the prompt.
    reference: the calls of the step as text, or the text of an answer.
    task: a name that the prompts of one task or dialogue share; '' where it is not known.
    task_kind: the kind of that task, where it is another than the seed's.
  """

  id: str
  kind: str
  messages: tuple[Message, ...]
  reference: str
  task: str = ''
  task_kind: str = ''

  def to_row(self) -> dict[str, Any]:
    """Returns a training row whose answer is the reference, without thoughts."""
    answer = Message('assistant', self.reference)
    messages = [message.to_json() for message in (*self.messages, answer)]
    return {'id': self.id, 'conversations': messages}


def decision_points(seed: Seed) -> Iterator[DecisionPoint]:
  """Yields each prompt of the reference solution with the reference answer to it.

  There is one for each call and one for the report. If the calls go out together, or no call is
  right, there is only one.
  """
  # Parallel calls go out in one response, so that there is one prompt and one reference.
  if seed.kind in ('irrelevant', 'parallel'):
    reference = print_calls(list(seed.calls)) if seed.calls else seed.answer
    yield DecisionPoint(
      id=seed.id,
      kind=seed.kind,
      messages=seed.conversations,
      reference=reference,
      task=seed.dialogue,
    )
    return
  references = [print_calls([call]) for call in seed.calls]
  # A known report is one more decision: the model must stop calling and answer.
  if seed.answer:
    references.append(seed.answer)
  for done, reference in enumerate(references):
    yield DecisionPoint(
      id=f'{seed.id}/{done}',
      kind=seed.kind,
      # Steps before this one are the reference's and not the model's (teacher forcing).
      messages=(*seed.conversations, *reference_steps(seed, done)),
      reference=reference,
      task=seed.dialogue,
    )
