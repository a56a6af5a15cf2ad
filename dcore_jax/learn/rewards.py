"""Rewards of a response to a tool-use task: 1 for the format, up to 3 for the answer.

Rule rewards are functions (prediction, reference) -> Reward. `toolrl` is what the published models
were trained with, quirks included (docs/method.md, sections 4.1 to 4.4, golden values in section
8), its `_coarse`, `_refined` and `_intermediate` forms the published ablations; `paper` is the
formula printed in the paper (A.2); `corrected` keeps the scale of `toolrl` and mends what we take
for its mistakes. A prediction is a whole response, `<think>` block included; a reference is a call
list or plain text. Where responses have acted in a world, `state_reward` judges what they have done
instead.
"""

import collections
import functools
from typing import Any, Callable, Iterable, NamedTuple, Sequence

import numpy as np
import scipy.optimize

from dcore_jax.chat.call_text import split_answer
from dcore_jax.chat.lenient_calls import parse_lenient
from dcore_jax.chat.messages import ToolCall
from dcore_jax.chat.thoughts import taken_as_opened
from dcore_jax.chat.tool_calls import ToolCallError, parse_calls

_THOUGHTS_OPEN = '<think>\n'
_THOUGHTS_CLOSE = '\n</think>\n\n'
# The reference's parallel traces close their thoughts in the last line (docs/method.md, section
# 1.7): `toolrl` never pays their format.
_THOUGHTS_CLOSE_ANYWHERE = '</think>\n\n'
# What frames an assistant turn, for texts that were decoded with their special tokens (Qwen, Llama
# 3).
_TURN_STARTS = ('<|im_start|>assistant', '<|start_header_id|>assistant<|end_header_id|>')
_TURN_ENDS = ('<|im_end|>', '<|eot_id|>')


# Between them lies every total of the rewards below: 5 is that of a right and long answer by
# `toolrl_length`. Statistics of held-out rewards take it from here.
BOUNDS = (-3.0, 5.0)


class Reward(NamedTuple):
  """format in {0, 1}; correctness in [-3, 3] (`paper`: [0, 3]); total, their sum (`toolrl_length`:
  and the length's). Floats, or float64 [B] of a batch.
  """

  format: Any
  correctness: Any
  total: Any


# -- the reference's reward ------------------------------------------------------------------------


def toolrl_reward(
  prediction: str,
  reference: str,
  *,
  credit: str = 'partial',
  correct_max: float = 3.0,
  format_range: tuple[float, float] = (0.0, 1.0),
  length_words: int = 0,
) -> Reward:
  """The reward of the published runs (docs/method.md, section 4).

  Args:
    credit: what a nearly right call list earns. 'partial' (published): Jaccard overlaps of names
      and argument names plus equal values; 'refined': overlaps count only when they are whole;
      'intermediate': only identical calls; 'coarse': only an equal list.
    correct_max: correctness lies in [-correct_max, correct_max]; 3 (published) or 1 (the flag
      CORRECTMAX1).
    format_range: reward of a wrong and of a right format. The scheduled flags, whose step never
      advances, are this and `correct_max` at fixed values: SCHEDULEREWARD (-2, 2) and 2,
      MAX1STEP30MAX3 (0, 1) and 1.
    length_words: words of thought that earn 1 more, fewer a part of it in hundredths, untagged
      thoughts nothing; 0 (published) is off. The flag WITHLENGTH has 512, SCHEDULELENGTH 384, where
      its step stands still.

  Raises:
    ValueError: a reference without an answer, or an unknown credit.
  """
  if credit not in ('partial', 'refined', 'intermediate', 'coarse'):
    raise ValueError(
      f'unknown credit {credit!r}; expected partial, refined, intermediate or coarse'
    )
  # The released code cuts out the turn before it scores (docs/method.md, section 4.1).
  text = _own_turn(prediction)
  answer = _reference_answer(reference)
  predicted = _after_think(text)
  if predicted[:1] == '[' and predicted[-1:] == ']':
    score, attainable = _toolrl_score(predicted, answer, credit)
  else:
    # Any text is right where text is wanted, also an empty or unfinished one (docs/method.md,
    # section 7, point 8).
    score = float(answer[0] != '[' and answer[-1] != ']')
    attainable = 1.0
  # In this order of operations rewards equal the reference's to the last bit, which its
  # zero-advantage test can see.
  reward = _reward(
    _has_format(text), 2 * correct_max * score / attainable - correct_max, format_range
  )
  return (
    reward._replace(total=reward.total + _length_share(text, length_words))
    if length_words
    else reward
  )


def _length_share(text: str, full: int) -> float:
  if '<think>' not in text or '</think>' not in text:
    return 0.0
  thoughts = text.rsplit('<think>', 1)[-1].split('</think>', 1)[0]
  return min(1.0, round(len(thoughts.split()) / full, 2))


def _toolrl_score(predicted: str, answer: str, credit: str) -> tuple[float, float]:
  """(score, attainable score) of a call-like prediction."""
  # Calls where text was wanted are wrong, however good they are.
  if answer[0] != '[':
    return 0.0, 1.0
  # The reference rewrites predictions only: `f(parameters=1)` loses against itself (golden row).
  calls = parse_lenient(predicted.replace('parameters', 'arguments'))
  wanted = _lenient_reference(answer)
  if calls == wanted:
    return 1.0, 1.0
  if credit == 'coarse':
    return 0.0, 1.0
  try:
    return _partial_score(
      [_entry(call) for call in calls], [_entry(call) for call in wanted], credit
    )
  except (TypeError, AttributeError):  # lists of something else than calls: scored as wrong
    return 0.0, 1.0


# A group's rollouts share their reference: reading it once saves half of the parsing. Nothing
# writes into what is read.
_lenient_reference = functools.lru_cache(maxsize=1024)(parse_lenient)


def _entry(call: Any) -> tuple[Any, Any]:
  """(name, arguments) of a call as `parse_lenient` has it: the first item of a dict."""
  if not isinstance(call, dict) or not call:
    raise TypeError('not a call')
  return next(iter(call.items()))


def _partial_score(calls: list[tuple], wanted: list[tuple], credit: str) -> tuple[float, float]:
  overlap = _same_list if credit == 'refined' else _jaccard
  identical_only = credit == 'intermediate'
  score = overlap([name for name, _ in wanted], [name for name, _ in calls])
  # 1 for the names, then 1 + number of arguments for each reference call (docs/method.md, section
  # 4.4).
  attainable = 1.0
  used = set()
  for name, arguments in wanted:
    attainable += 1.0 if identical_only else 1.0 + len(arguments)
    best = 0.0
    best_index = None
    # Greedy, in the order of the reference, the earlier of equals: section 8's greedy trap depends
    # on it.
    for i, (other_name, others) in enumerate(calls):
      if i in used or other_name != name:
        continue
      if identical_only:
        worth = float(others == arguments)
      else:
        worth = overlap(list(arguments.keys()), list(others.keys())) + _equal_values(
          arguments, others
        )
      # A call that is worth 0 is not used up, and stays for a later reference call.
      if worth > best:
        best = worth
        best_index = i
    if best_index is not None:
      used.add(best_index)
      score += best
  return score, attainable


# -- the paper's formula ---------------------------------------------------------------------------


def paper_reward(prediction: str, reference: str) -> Reward:
  """R_format + R_struct + R_key + R_value, each in [0, 1] (paper A.2, eq. 15-18): indicators and
  means, nothing negative.

  The paper does not say which predicted call answers which reference call, nor what a text answer
  earns. Here calls are paired by best assignment within a name, a call without arguments counts its
  keys as its value, and text earns 3 where text was wanted.
  """
  text = _own_turn(prediction)
  calls = _predicted_calls(_after_think(text))
  wanted = _reference_calls(reference)
  # At least one side is text: there are no calls to compare.
  if calls is None or wanted is None:
    return _reward(_has_format(text), 3.0 if calls == wanted else 0.0)
  fields = [_fields(call) for call in calls]
  wanted_fields = [_fields(call) for call in wanted]
  struct = float({call.name for call in calls} == {call.name for call in wanted})
  # Means over no reference calls do not exist: the set of names then decides alone.
  if not wanted:
    return _reward(_has_format(text), 3.0 * struct)

  def worth(i: int, j: int) -> float:
    return _same_keys(fields[i], wanted_fields[j]) + _value_mean(fields[i], wanted_fields[j])

  pairs = list(_assign(calls, wanted, worth))
  keys = sum(_same_keys(fields[i], wanted_fields[j]) for i, j in pairs) / len(wanted)
  values = sum(_value_mean(fields[i], wanted_fields[j]) for i, j in pairs) / len(wanted)
  return _reward(_has_format(text), struct + keys + values)


def _same_keys(fields: dict, wanted: dict) -> float:
  return float(fields.keys() == wanted.keys())


def _value_mean(fields: dict, wanted: dict) -> float:
  return _equal_values(wanted, fields) / len(wanted) if wanted else _same_keys(fields, wanted)


# -- the corrected reward --------------------------------------------------------------------------


def corrected_reward(prediction: str, reference: str) -> Reward:
  """The partial credit of `toolrl_reward` without its traps.

  The thoughts may close in their last line; positional arguments count; values are read with JSON's
  true, false and null; no word is rewritten; predicted calls are assigned to reference calls
  optimally; and a text answer must be one: not empty, and not an unfinished thought.
  """
  text = _own_turn(prediction)
  calls = _predicted_calls(_after_think(text))
  wanted = _reference_calls(reference)
  # Here a text answer must be one: not empty, no call list, and no unfinished thought.
  if wanted is None:
    has_answer = (
      calls is None
      and _after_think(text) != ''
      and not ('<think>' in text and '</think>' not in text)
    )
    share = float(has_answer)
  elif calls is None:
    share = 0.0
  else:
    share = _assigned_share(calls, wanted)
  return _reward(_has_format(text, _THOUGHTS_CLOSE_ANYWHERE), 6.0 * share - 3.0)


def _assigned_share(calls: list[ToolCall], wanted: list[ToolCall]) -> float:
  if not wanted:
    return float(not calls)
  fields = [_fields(call) for call in calls]
  wanted_fields = [_fields(call) for call in wanted]

  def worth(i: int, j: int) -> float:
    return _jaccard(list(wanted_fields[j]), list(fields[i])) + _equal_values(
      wanted_fields[j], fields[i]
    )

  score = _jaccard([call.name for call in wanted], [call.name for call in calls])
  score += sum(worth(i, j) for i, j in _assign(calls, wanted, worth))
  return score / (1 + sum(1 + len(arguments) for arguments in wanted_fields))


# -- by what the calls have done -------------------------------------------------------------------


def state_reward(texts: Sequence[str], correct: bool) -> Reward:
  """The reward of an episode: correctness 3 or -3, format 1 where every response has it.

  `correct` is the verdict of the world, which judges the state that the executed calls have left
  and not how they were worded. The format of the parallel template counts as well.

  Where a response does not close its thoughts, or has none, the episode is wrong here, whatever it
  leaves: it is reasoning that is trained, and format alone is not rewarded by `Episodes`. A world
  may count it as right.
  """
  # The world does not look at thoughts, and they are what is trained.
  thought = all('</think>' in text for text in texts)
  well_formed = bool(texts) and all(
    _has_format(_own_turn(text), _THOUGHTS_CLOSE_ANYWHERE) for text in texts
  )
  return _reward(well_formed, 3.0 if correct and thought else -3.0)


# -- shared pieces ---------------------------------------------------------------------------------


def _has_format(text: str, close: str = _THOUGHTS_CLOSE) -> bool:
  """Tells whether the thoughts open the text and close somewhere; all other text is free."""
  return text.startswith(_THOUGHTS_OPEN) and text.find(close, len(_THOUGHTS_OPEN)) >= 0


def _reward(
  has_format: bool, correctness: float, format_range: tuple[float, float] = (0.0, 1.0)
) -> Reward:
  form = format_range[has_format]
  return Reward(form, correctness, form + correctness)


def _own_turn(text: str) -> str:
  """The assistant's own text, stripped: without an answer the lines after `</think>` go, and the
  format with them.
  """
  # The last header begins the assistant's own turn; what stands before it is the prompt.
  for start in _TURN_STARTS:
    text = text.rsplit(start, 1)[-1]
  for end in _TURN_ENDS:
    text = text.split(end, 1)[0]
  return text.strip()


def _after_think(text: str) -> str:
  return split_answer(text)[1].strip()


def _reference_answer(reference: str) -> str:
  answer = _after_think(reference)
  if not answer:
    raise ValueError(f'the reference holds no answer: {reference[:80]!r}')
  return answer


@functools.lru_cache(maxsize=1024)
def _reference_calls(reference: str) -> list[ToolCall] | None:
  answer = _reference_answer(reference)
  try:
    return parse_calls(answer)
  except ToolCallError as error:
    raise ValueError(f'the reference {answer[:80]!r} cannot be read: {error}') from error


def _predicted_calls(answer: str) -> list[ToolCall] | None:
  """Reads calls; None for text, and for an unreadable list one call that no reference makes."""
  try:
    return parse_calls(answer)
  except ToolCallError:
    # An unreadable list is an attempt at calls and not a text, so that it earns nothing where text
    # is wanted.
    return [ToolCall('', {})]


def _fields(call: ToolCall) -> dict[str | int, Any]:
  """Arguments by name, positional ones by place."""
  return {**dict(enumerate(call.positional)), **call.arguments}


def _jaccard(wanted: list, given: list) -> float:
  """Multiset Jaccard overlap in [0, 1]; 1 for two empty lists."""
  if wanted == given:
    return 1.0
  # Multisets: a tool that is called twice counts twice.
  common = (collections.Counter(wanted) & collections.Counter(given)).total()
  return common / (len(wanted) + len(given) - common)


def _same_list(wanted: list, given: list) -> float:
  return float(wanted == given)


def _equal_values(wanted: dict, given: dict) -> float:
  return float(sum(key in given and given[key] == value for key, value in wanted.items()))


def _assign(
  calls: Sequence[ToolCall], wanted: Sequence[ToolCall], worth: Callable[[int, int], float]
) -> Iterable[tuple[int, int]]:
  """Pairs (call, wanted) of equal names with the largest total worth; every index at most once."""
  # In the order of the reference: a sum of floats must not depend on the hashing of a set.
  for name in dict.fromkeys(call.name for call in wanted):
    rows = [j for j, call in enumerate(wanted) if call.name == name]
    columns = [i for i, call in enumerate(calls) if call.name == name]
    if not rows or not columns:
      continue
    # Only calls of equal names are paired, so that each name is a small problem of its own.
    worth_RC = np.zeros((len(rows), len(columns)))
    for r, row in enumerate(rows):
      for c, column in enumerate(columns):
        worth_RC[r, c] = worth(column, row)
    assigned = scipy.optimize.linear_sum_assignment(worth_RC, maximize=True)
    for row, column in zip(*assigned, strict=True):
      yield columns[column], rows[row]


# -- by name ---------------------------------------------------------------------------------------

REWARDS: dict[str, Callable[[str, str], Reward]] = {
  'toolrl': toolrl_reward,
  **{
    f'toolrl_{credit}': functools.partial(toolrl_reward, credit=credit)
    for credit in ('coarse', 'refined', 'intermediate')
  },
  'toolrl_length': functools.partial(toolrl_reward, length_words=512),
  'paper': paper_reward,
  'corrected': corrected_reward,
}


def batch_reward(
  name: str, predictions: Sequence[str], references: Sequence[str], *, whole: bool = False
) -> Reward:
  """Rewards of B responses, each against its own reference: a Reward of float64 arrays [B].

  Args:
    name: one of REWARDS.
    predictions: B responses.
    references: B references.
    whole: whether a response whose prompt has opened the thoughts begins with that tag. Otherwise
      one that closes thoughts without opening any is taken for such a response.

  Raises:
    ValueError: an unknown reward, different lengths, or a bad reference (with its row).
  """
  if name not in REWARDS:
    raise ValueError(f'unknown reward {name!r}; expected one of {sorted(REWARDS)}')
  if len(predictions) != len(references):
    raise ValueError(f'{len(predictions)} predictions for {len(references)} references')
  rows = []
  for row, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
    try:
      # A template may put the opening tag into the prompt, and the response then lacks it.
      text = prediction if whole else taken_as_opened(_own_turn(prediction))
      rows.append(REWARDS[name](text, reference))
    except ValueError as error:
      raise ValueError(f'row {row}: {error}') from error
  form, correctness, total = np.asarray(rows, np.float64).reshape(-1, 3).T
  return Reward(form, correctness, total)
