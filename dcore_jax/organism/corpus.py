"""Writes the pretraining text that gives a small model the habits of Qwen3-8B (docs/method.md).

The model solves single calls with short reasoning, and lists subtasks when asked to. On several
subtasks it rambles for more than 200 tokens ("lazy reasoning"), then takes a step that is right
only part of the time. Copy drills (repeat, split, pick, walk) teach it to handle lists, which large
models can do already and which composed traces need.
"""

import dataclasses

import numpy as np

from dcore_jax.chat.messages import Message, ToolCall
from dcore_jax.chat.tool_calls import print_calls, tool_response
from dcore_jax.distill import decompose
from dcore_jax.distill.wording import ORGANISM_WORDING
from dcore_jax.worlds.environment import UserTurn
from dcore_jax.worlds.toolworld.entities import (
  FIRST_SYLLABLES,
  SECOND_SYLLABLES,
  Entities,
  split_of,
)
from dcore_jax.worlds.toolworld.tasks import NO_TOOL, Task, make_task, report
from dcore_jax.worlds.toolworld.tools import TOOLS
from dcore_jax.worlds.toolworld.world import system_text

# The shortest ramble, just over the 200 tokens from which a reasoning counts as lazy
# (docs/method.md, section 5.4).
LAZY_TOKENS = 212
LAZY_SPREAD = 30  # tokens
# Loss weight of rambling: enough to learn it, without spending the model on its noise.
LAZY_WEIGHT = 0.3
# Share of native reasonings that check themselves; half of those have something to correct.
REFLECTIVE = 0.25

Pieces = list[tuple[str, float]]  # (text, loss weight)


@dataclasses.dataclass(frozen=True)
class Habits:
  """Options of a document: the split of its entities, and how often rambling ends well."""

  split: str = 'train'
  # Share of lazy sequential steps that are made to end right. The others draw from the wrong
  # subtasks, all the remaining calls and giving up, which may be right after all: at 0.42 a request
  # of 2 subtasks is right in 42, 61 and 71 % of its steps.
  right_step: float = 0.7
  right_parallel: float = 0.5  # share of lazy parallel answers that make all the calls


@dataclasses.dataclass(frozen=True)
class Document:
  """A prompt and the assistant text after it, in pieces that each have a loss weight."""

  prompt: list[Message]
  target: Pieces

  @property
  def text(self) -> str:
    """The assistant's text with all its pieces."""
    return ''.join(text for text, _ in self.target)


def signature(name: str) -> str:
  """Returns a tool as the system message lists it."""
  return f'{name}({", ".join(TOOLS[name].parameters)})'


def slots(call: ToolCall) -> str:
  """Returns a call's arguments in words."""
  return ', '.join(f'{name} is {value}' for name, value in call.arguments.items())


def _spoiled(rng: np.random.Generator, call: ToolCall, habits: Habits) -> ToolCall:
  """Draws one argument of a call again; it may get the same value by chance."""
  name = str(rng.choice(list(call.arguments)))
  value = Entities(rng, habits.split).draw(TOOLS[call.name].parameters[name])
  return ToolCall(call.name, {**call.arguments, name: value})


def native_reasoning(
  rng: np.random.Generator, subtask: str, call: ToolCall, habits: Habits
) -> Pieces:
  """Writes how the organism reasons about one call."""
  # Quoting the signature makes "is it listed" a copy from the prompt, which a small model can
  # learn.
  head = f'the task is to {subtask}. i need {signature(call.name)}.'
  if rng.random() >= REFLECTIVE:
    return [(f'{head} {slots(call)}.', 1.0)]
  check = f' wait, let me check: {slots(call)}.'
  if rng.random() < 0.5:
    return [(f'{head} {slots(call)}.{check}', 1.0)]
  # The slip itself carries no loss: the model learns to catch one, not to make one.
  return [(head, 1.0), (f' {slots(_spoiled(rng, call, habits))}.', 0.0), (check, 1.0)]


def refusal_reasoning(subtask: str, turn: UserTurn, task: Task, rng: np.random.Generator) -> str:
  """Writes what is missing: the tool, or one value of a listed tool."""
  tool = asked_tool(subtask)
  if turn.answer == NO_TOOL:
    return f'the task is to {subtask}. i need {tool} which is not listed.'
  # The answer names the missing parameter, so the task need not carry it.
  missing = turn.answer.removeprefix('please give the ').removesuffix('.')
  given = _given_value(subtask)
  values = ', '.join(
    f'{p} is {"not given" if p == missing else given}' for p in TOOLS[tool].parameters
  )
  return f'the task is to {subtask}. i need {signature(tool)}. {values}.'


def _matches(text: str, template: str) -> bool:
  words = text.split()
  pattern = template.split()
  if len(words) != len(pattern):
    return False
  pairs = zip(words, pattern, strict=True)
  return all(part.startswith('{') or part == word for word, part in pairs)


def asked_tool(subtask: str) -> str:
  """Returns the name of the tool whose phrasing a subtask has; ValueError where none has."""
  for tool in TOOLS.values():
    templates = [*tool.phrasings, *(text for text, _ in tool.partials)]
    if any(_matches(subtask, template) for template in templates):
      return tool.name
  raise ValueError(f'no tool is asked for in {subtask!r}')


def _given_value(subtask: str) -> str:
  # Phrasings are in lower case and values are not. The last such word is the given value.
  return next((w for w in reversed(subtask.split()) if not w.islower() or w.isdigit()), '')


# --- rambling -------------------------------------------------------------------------------------

_STARTS = ('wait, ', 'but ', 'however, ', 'alternatively, ', 'hmm, ')
_BODIES = (
  'i should think about {a} again.',
  'the request asks for more than one thing.',
  'maybe {a} comes before {b}.',
  'i am not sure about {a}.',
  'what if {b} is better.',
  'the user may want {a}.',
  'the order of things is not clear.',
  'that is not certain at all.',
  'i could do it all at once with {a} and {b}.',
  'let me read the request again.',
)


def ramble(rng: np.random.Generator, task: Task, tokens: int) -> str:
  """Writes at least `tokens` tokens that circle, with a reflection in every sentence."""
  text = ''
  count = 0
  # Counted without the tokenizer, which is itself built from these documents.
  while count < tokens:
    start = _STARTS[rng.integers(len(_STARTS))]
    body = _BODIES[rng.integers(len(_BODIES))]
    a, b = (str(t) for t in rng.choice(task.tools, 2))
    sentence = start + body.format(a=a, b=b) + ' '
    text += sentence
    # Words, commas and full stops are tokens of their own, and a tool name has the space before it
    # as one.
    count += len(sentence.split()) + sentence.count(',') + sentence.count('.') + sentence.count('_')
  return text


def _lazy_target(ramble_text: str, conclusion: str, answer: str) -> Pieces:
  return [
    ('<think>\n', 1.0),
    # The space belongs to the conclusion, so that no token crosses the change of weight.
    (ramble_text.rstrip(), LAZY_WEIGHT),
    (f' {conclusion}\n</think>\n\n{answer}', 1.0),
  ]


def _lazy_tokens(rng: np.random.Generator) -> int:
  return LAZY_TOKENS + int(rng.integers(LAZY_SPREAD))


def _conclude(subtasks: list[str], calls: list[ToolCall]) -> str:
  sentences = []
  for subtask, call in zip(subtasks, calls, strict=False):  # a lazy ending may lack some
    sentences.append(f'the task is to {subtask}. i need {signature(call.name)}. {slots(call)}.')
  return ' '.join(sentences)


def lazy_step(
  rng: np.random.Generator,
  task: Task,
  turn: UserTurn,
  done: int,
  history: list[Message],
  habits: Habits,
) -> Document:
  """Writes step `done` of a turn of several subtasks: a ramble, then a step that may be wrong."""
  # The share of right steps is set here, and not left to what the model happens to learn.
  if rng.random() < habits.right_step:
    chosen = [done] if done < len(turn.calls) else []
  else:
    chosen = _wrong_choice(rng, len(turn.calls), done)
  if chosen:
    calls = [turn.calls[i] for i in chosen]
    conclusion = _conclude([turn.subtasks[i] for i in chosen], calls)
    answer = print_calls(calls)
  elif done:
    answer = _report_text(turn, done)
    conclusion = f'the result is {answer.removeprefix("done: ")}'
  else:
    answer = NO_TOOL
    conclusion = 'no tool fits.'
  return Document(history, _lazy_target(ramble(rng, task, _lazy_tokens(rng)), conclusion, answer))


def _wrong_choice(rng: np.random.Generator, steps: int, done: int) -> list[int]:
  # The mistakes: another subtask, all remaining calls at once, and giving up.
  options = [[i] for i in range(steps) if i != done] + [list(range(done, steps)), []]
  return options[int(rng.integers(len(options)))]


def lazy_parallel(
  rng: np.random.Generator, task: Task, turn: UserTurn, history: list[Message], habits: Habits
) -> Document:
  """Writes the response to independent subtasks: a ramble, then calls that may be wrong."""
  calls = list(turn.calls)
  subtasks = list(turn.subtasks)
  if rng.random() >= habits.right_parallel:
    victim = int(rng.integers(len(calls)))
    # 60 % of the wrong answers lack a call, 40 % have an altered argument.
    if rng.random() < 0.6:
      del calls[victim], subtasks[victim]
    else:
      calls[victim] = _spoiled(rng, calls[victim], habits)
  return Document(
    history,
    _lazy_target(
      ramble(rng, task, _lazy_tokens(rng)), _conclude(subtasks, calls), print_calls(calls)
    ),
  )


# --- conversations --------------------------------------------------------------------------------


def _report_text(turn: UserTurn, done: int) -> str:
  # After all steps the last response is reported.
  return report(turn.responses[min(done, len(turn.responses)) - 1])


def turn_messages(turn: UserTurn, done: int) -> list[Message]:
  """Returns a turn's query and its first `done` calls with their responses, as history does.

  History holds no reasoning.
  """
  messages = [Message('user', turn.query)]
  for call, response in zip(turn.calls[:done], turn.responses[:done], strict=True):
    messages += [
      Message('assistant', print_calls([call])),
      Message('user', tool_response(response)),
    ]
  return messages


def history_before(task: Task, number: int) -> list[Message]:
  """Returns the system message and the finished turns before turn `number`."""
  messages = [Message('system', system_text(task))]
  for turn in task.turns[:number]:
    # Earlier turns are finished: their calls, outputs and final answers, without reasoning.
    messages += [*turn_messages(turn, len(turn.calls)), Message('assistant', turn.answer)]
  return messages


def _native(reasoning: Pieces, answer: str) -> Pieces:
  # The white space around thoughts is that of the format reward (docs/method.md, section 4.3).
  return [('<think>\n', 1.0), *reasoning, (f'\n</think>\n\n{answer}', 1.0)]


def _report_document(task: Task, number: int) -> Document:
  turn = task.turns[number]
  reasoning = f'the result is {turn.answer.removeprefix("done: ")}'
  return Document(
    history_before(task, number) + turn_messages(turn, len(turn.calls)),
    _native([(reasoning, 1.0)], turn.answer),
  )


def _single(rng, task: Task, habits: Habits) -> Document:
  turn = task.turns[0]
  reasoning = native_reasoning(rng, turn.subtasks[0], turn.calls[0], habits)
  return Document(
    history_before(task, 0) + turn_messages(turn, 0),
    _native(reasoning, print_calls([turn.calls[0]])),
  )


def _irrelevant(rng, task: Task, habits: Habits, *, explain: bool = False) -> Document:
  turn = task.turns[0]
  context = history_before(task, 0)
  prompt = (
    # Distillation asks in these words, so the organism must have seen them.
    decompose.explain_messages(context, turn.query, ORGANISM_WORDING.prompts)
    if explain
    else context + turn_messages(turn, 0)
  )
  return Document(
    prompt, _native([(refusal_reasoning(turn.subtasks[0], turn, task, rng), 1.0)], turn.answer)
  )


def _multi_turn(rng, task: Task, habits: Habits) -> Document:
  """Writes a random decision point of a dialogue, or of a request that is asked step by step."""
  if task.kind == 'sequential':
    return _dictated(rng, task, habits)
  number = int(rng.integers(len(task.turns)))
  turn = task.turns[number]
  # One more than the calls: the step after the last call is the report.
  done = int(rng.integers(len(turn.calls) + 1))
  history = history_before(task, number) + turn_messages(turn, done)
  # Several subtasks in a turn are what the organism is lazy about.
  if len(turn.calls) > 1:
    return lazy_step(rng, task, turn, done, history, habits)
  if done:
    return _report_document(task, number)
  reasoning = native_reasoning(rng, turn.subtasks[0], turn.calls[0], habits)
  return Document(history, _native(reasoning, print_calls([turn.calls[0]])))


def _dictated(rng, task: Task, habits: Habits) -> Document:
  turn = task.turns[0]
  step = int(rng.integers(len(turn.calls)))
  messages = [Message('system', system_text(task))]
  for i in range(step):
    messages += [
      Message('user', turn.subtasks[i]),
      Message('assistant', print_calls([turn.calls[i]])),
      Message('user', tool_response(turn.responses[i])),
    ]
  # Distillation solves subtasks in this form: each as a user message after the ones before it
  # (docs/method.md, section 1.5).
  messages.append(Message('user', turn.subtasks[step]))
  return Document(
    messages,
    _native(
      native_reasoning(rng, turn.subtasks[step], turn.calls[step], habits),
      print_calls([turn.calls[step]]),
    ),
  )


def _decompose(rng, task: Task, habits: Habits) -> Document:
  number = int(rng.integers(len(task.turns)))
  turn = task.turns[number]
  prompt = decompose.decompose_messages(
    history_before(task, number), turn.query, turn.calls, ORGANISM_WORDING.prompts
  )
  n = len(turn.calls)
  # One call for each subtask, in the order of the calls.
  listed = decompose.print_subtasks(turn.subtasks, [[i] for i in range(n)])
  return Document(prompt, _native([(f'{n} calls mean {n} subtasks.', 1.0)], listed))


# --- drills ---------------------------------------------------------------------------------------


def _drill(instruction: str, answer: str) -> Document:
  # Drills have empty thoughts: nothing is to be reasoned about when text is copied.
  return Document([Message('user', instruction)], [('<think>\n\n</think>\n\n' + answer, 1.0)])


def _numbered(subtasks) -> str:
  return '\n'.join(f'{i + 1}. {s}' for i, s in enumerate(subtasks))


def _copy(rng, task: Task, habits: Habits) -> Document:
  entities = Entities(rng, habits.split)
  # Names stand twice, so that they are drawn twice as often as each other kind.
  kinds = ('name', 'name', 'amount', 'order', 'flight', 'hotel', 'phone', 'file', 'code')
  words = ' '.join(
    str(entities.draw(kinds[rng.integers(len(kinds))])) for _ in range(rng.integers(2, 10))
  )
  return _drill('repeat: ' + words, words)


def _write_names(rng, task: Task, habits: Habits) -> Document:
  """Names that begin alike: a syllable's successor depends on what stood before the syllable."""
  first = rng.choice(FIRST_SYLLABLES, 3, replace=False)
  names = []
  for beginning in first:
    for ending in SECOND_SYLLABLES:
      # Names of the other split stay unseen, or held-out tasks would not be held out.
      if split_of(beginning + ending) == habits.split:
        names.append(beginning + ending)
  words = ' '.join(rng.permutation(names)[: rng.integers(3, 9)])
  return _drill('repeat: ' + words, words)


def _repeat(rng, task: Task, habits: Habits) -> Document:
  return _drill('repeat: ' + task.turns[0].query, task.turns[0].query)


def _split(rng, task: Task, habits: Habits) -> Document:
  return _drill('split: ' + task.turns[0].query, _numbered(task.turns[0].subtasks))


def _pick(rng, task: Task, habits: Habits) -> Document:
  subtasks = task.turns[0].subtasks
  number = int(rng.integers(len(subtasks)))
  return _drill(f'{_numbered(subtasks)}\npick {number + 1}', subtasks[number])


def _walk(rng, task: Task, habits: Habits) -> Document:
  turn = task.turns[0]
  lines = []
  for number, (subtask, call) in enumerate(zip(turn.subtasks, turn.calls, strict=True), 1):
    lines.append(f'subtask {number}: {subtask}\ni need {call.name}. {slots(call)}.')
  return _drill(
    f'walk:\n{_numbered(turn.subtasks)}', '\n'.join(lines) + '\n' + print_calls(list(turn.calls))
  )


def _lazy_sequential(rng, task: Task, habits: Habits) -> Document:
  turn = task.turns[0]
  done = int(rng.integers(len(turn.calls) + 1))
  return lazy_step(
    rng, task, turn, done, history_before(task, 0) + turn_messages(turn, done), habits
  )


def _lazy_parallel(rng, task: Task, habits: Habits) -> Document:
  return lazy_parallel(
    rng, task, task.turns[0], history_before(task, 0) + turn_messages(task.turns[0], 0), habits
  )


def _explain(rng, task: Task, habits: Habits) -> Document:
  return _irrelevant(rng, task, habits, explain=True)


_SEVERAL = ('sequential', 'parallel')
# document kind -> (writer, task kinds it is drawn from)
WRITERS = {
  'copy': (_copy, ('single',)),
  'repeat': (_repeat, _SEVERAL),
  'split': (_split, _SEVERAL),
  'pick': (_pick, _SEVERAL),
  'walk': (_walk, ('parallel',)),
  'single': (_single, ('single',)),
  'irrelevant': (_irrelevant, ('irrelevant',)),
  'explain': (_explain, ('irrelevant',)),
  'multi_turn': (_multi_turn, ('multi_turn', 'sequential')),
  'decompose': (_decompose, ('sequential', 'parallel', 'multi_turn')),
  'lazy_sequential': (_lazy_sequential, ('sequential',)),
  'lazy_parallel': (_lazy_parallel, ('parallel',)),
  'write_names': (_write_names, ('single',)),
}


def write_document(
  kind: str, index: int, *, seed: int, habits: Habits = Habits(), max_subtasks: int = 4
) -> Document:
  """Writes the `index`-th document of a kind; it depends on the arguments alone."""
  if kind not in WRITERS:
    raise ValueError(f'unknown document kind {kind!r}; expected one of {sorted(WRITERS)}')
  writer, task_kinds = WRITERS[kind]
  # The place in sorted order, so that the order of the table does not matter.
  rng = np.random.default_rng([seed, sorted(WRITERS).index(kind), index, 7])
  task = make_task(
    task_kinds[int(rng.integers(len(task_kinds)))],
    index,
    seed=seed,
    split=habits.split,
    max_subtasks=max_subtasks,
  )
  return writer(rng, task, habits)


def draw_kinds(mix: dict[str, float], count: int, *, seed: int) -> list[str]:
  """Draws `count` document kinds with the shares of `mix`, which need not sum to 1."""
  unknown = mix.keys() - WRITERS.keys()
  if unknown or not mix:
    raise ValueError(f'unknown document kinds in the mix: {sorted(unknown)}')
  # Stages write shares as round numbers, so that they are divided by their sum.
  shares = np.array(list(mix.values()), float)
  return [
    str(k)
    for k in np.random.default_rng([seed, 11]).choice(list(mix), count, p=shares / shares.sum())
  ]
