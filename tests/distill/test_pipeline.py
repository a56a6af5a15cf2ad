"""Self-distillation with a scripted model: what is kept, what is dropped, and why."""
import dataclasses
import json

import numpy as np
import pytest

from dcore_jax.chat.messages import Message, ToolCall
from dcore_jax.chat.tool_calls import print_calls
from dcore_jax.distill import verify
from dcore_jax.distill.pipeline import Distiller, Dropped, distill
from dcore_jax.distill.prompts import print_subtasks
from dcore_jax.distill.seeds import Seed, decision_points
from dcore_jax.learn.rewards import toolrl_reward
from dcore_jax.worlds.toolworld.seeds import task_seeds
from dcore_jax.worlds.toolworld.world import ToolWorld

THINK = '<think>\nreasoning.\n</think>\n\n'
LEAKY = Seed('s', 'sequential', (Message('user', 'find the order of Karo, then cancel that order'),),
             (ToolCall('f', {'c': 'Karo'}), ToolCall('g', {'o': 'R541'})), ('{}', '{}'))


def seeds(kind, count=20):
  return [s for t in ToolWorld().tasks(kind, count, seed=9, split='train') for s in task_seeds(t)]


def run(seed, answer, **options):
  """Drives one seed with `answer(messages) -> text`; its rows, or the reason it was dropped for."""
  ask = Distiller(**options).rows(seed)
  try:
    text = None
    while True:
      text = answer(ask.send(text))
  except StopIteration as stop:
    return stop.value
  except Dropped as drop:
    return str(drop)


def oracle(task_seed, subtasks):
  """Answers as a perfect model would, given the reference decomposition."""
  answers = dict(zip(subtasks, task_seed.calls))

  def answer(messages):
    last = messages[-1].content
    if last.startswith('list the subtasks'):
      return THINK + print_subtasks(list(subtasks))
    if last.startswith('say which'):
      return THINK + task_seed.answer
    return THINK + print_calls([answers.get(last, task_seed.calls[0] if task_seed.calls else None)])
  return answer


def with_subtasks(kind, count=20):
  for task in ToolWorld().tasks(kind, count, seed=9, split='train'):
    for seed, turn in zip(task_seeds(task), task.turns):
      yield seed, turn.subtasks


@pytest.mark.parametrize('kind', ['single', 'sequential', 'parallel', 'irrelevant', 'multi_turn'])
def test_a_perfect_model_keeps_everything(kind):
  for seed, subtasks in with_subtasks(kind):
    if len(set(subtasks)) < len(subtasks):
      continue  # two equal subtask texts: the scripted model could not tell them apart
    rows = run(seed, oracle(seed, subtasks))
    assert isinstance(rows, list), (rows, seed)
    if seed.kind == 'sequential':
      assert len(rows) == len(seed.calls) + bool(seed.answer)
    for row in rows:
      assert row['conversations'][-1]['role'] == 'assistant'
      assert not any('<think>' in m['content'] for m in row['conversations'][:-1])
    # The rows train what reinforcement learning asks for: each answers one decision point with the best reward.
    points = {tuple(m.content for m in p.messages): p.reference for p in decision_points(seed)}
    for row in rows:
      reference = points[tuple(m['content'] for m in row['conversations'][:-1])]
      assert toolrl_reward(row['conversations'][-1]['content'], reference).total == 4


@pytest.mark.parametrize(('text', 'reason'), [
    ('nothing', 'decomposition unparsable'),
    (THINK + print_subtasks(['only one']), 'decomposition does not partition the calls'),
    (THINK + print_subtasks(['x', 'y'], [[1], [0]]), 'decomposition does not partition the calls'),
    (THINK + print_subtasks(['x', ' ']), 'empty subtask'),
    (THINK + print_subtasks(['x', 'use R541']), 'leaks a fact')])
def test_bad_decompositions_are_counted(text, reason):
  seed = LEAKY
  assert run(seed, lambda _: text) == reason


@pytest.mark.parametrize(('text', 'reason'), [
    ("[f(a=1)]", 'unclosed reasoning'), (THINK + 'I cannot.', 'no call'), (THINK + '[f(a b)]', 'unreadable call'),
    (THINK + "[nope(a='b')]", 'wrong call')])
def test_bad_solutions_are_counted(text, reason):
  assert run(seeds('single')[0], lambda _: text) == reason


def test_retries_are_used_up_and_no_more():
  seed = seeds('single')[0]
  good = THINK + print_calls(list(seed.calls))
  for bad, retries, kept in ((1, 1, True), (2, 1, False), (2, 2, True), (0, 0, True)):
    texts = iter(['bad'] * bad + [good])
    assert isinstance(run(seed, lambda _: next(texts), retries=retries), list) == kept


def test_one_subtask_may_own_several_calls():
  """The released code drops these: it compares the number of subtasks with the number of responses (method: 7.12)."""
  seed = next(s for s in seeds('sequential') if len(s.calls) == 3)

  def answer(messages):
    if messages[-1].content.startswith('list the subtasks'):
      return THINK + print_subtasks(['first', 'the rest'], [[0], [1, 2]])
    return THINK + print_calls(list(seed.calls[:1] if messages[-1].content == 'first' else seed.calls[1:]))
  rows = run(seed, answer)
  assert len(rows) == 2 + bool(seed.answer)


def test_leaks_are_facts_of_the_calls_alone():
  assert verify.leaked_facts(LEAKY, ['find the order of Karo', 'cancel R541']) == {'R541'}
  assert not verify.leaked_facts(LEAKY, ['Find the order of Karo', 'Cancel that order'])


def test_only_what_cannot_be_read_is_asked_again():
  seed = seeds('single')[0]
  good = THINK + print_calls(list(seed.calls))
  texts = iter([THINK + "[nope(a='b')]", good])
  assert run(seed, lambda _: next(texts)) == 'wrong call'
  assert next(texts) == good


def test_calls_are_trained_in_one_form_whatever_form_they_were_written_in():
  seed, subtasks = next((s, t) for s, t in with_subtasks('parallel') if len(set(t)) == len(t))
  written = {text: '\n'.join(f'<tool_call>\n{{"name": "{c.name}", "arguments": {json.dumps(c.arguments)}}}\n</tool_call>'
                             for c in [call]) for text, call in zip(subtasks, seed.calls)}

  def answer(messages):
    last = messages[-1].content
    return THINK + (written[last] if last in written else print_subtasks(list(subtasks)))
  [row] = run(seed, answer)
  assert row['conversations'][-1]['content'].endswith('</think>\n\n' + print_calls(list(seed.calls)))


def test_refusals_may_be_asked_to_be_exact():
  seed = seeds('irrelevant')[0]
  assert run(seed, lambda _: THINK + 'I cannot.', exact_refusals=True) == 'wrong explanation'
  [row] = run(seed, lambda _: THINK + 'I cannot.')
  assert row['conversations'][-1]['content'].endswith('</think>\n\n' + seed.answer)


def test_prompts_too_long_for_the_engine_are_counted(tokenizer):
  chosen = seeds('single', 6)
  engine = ScriptedEngine(tokenizer, lambda prompt: THINK + print_calls(list(chosen[0].calls)))
  engine.max_len = 8
  result = distill(chosen, engine, tokenizer, None)
  assert not result.rows and result.dropped == {'prompt too long': 6}


class ScriptedEngine:
  """Stands in for the engine: answers every request from a table of prompt -> text, in reverse order."""

  max_len = 1024

  def __init__(self, tokenizer, answer):
    self.tokenizer, self.answer = tokenizer, answer

  def stream(self, source, sampling):
    while arrivals := list(source(4)):
      for tag, request in reversed(arrivals):
        text = self.answer(self.tokenizer.decode(request.prompt))
        tokens = np.array(self.tokenizer(text)['input_ids'] + [self.tokenizer.eos_token_id], np.int32)
        yield tag, dataclasses.make_dataclass('Done', ['tokens', 'finished'])(tokens, True)


@pytest.fixture(scope='module')
def tokenizer():
  from dcore_jax.worlds.toolworld.tokenizer import build_tokenizer
  from dcore_jax.worlds.toolworld.vocabulary import sample_texts
  return build_tokenizer(sample_texts(), 640)


def test_counts_add_up(tokenizer):
  chosen = seeds('single', 6) + seeds('sequential', 6) + seeds('irrelevant', 6)
  known = {tokenizer.decode(tokenizer(s.query)['input_ids']): s for s in chosen}

  def answer(prompt):
    seed = next(s for query, s in known.items() if query in prompt)
    return THINK + (print_calls(list(seed.calls)) if seed.kind == 'single' else seed.answer)
  result = distill(chosen, ScriptedEngine(tokenizer, answer), tokenizer, None)
  assert result.seeds == 18 and result.kept == 12 == 18 - sum(result.dropped.values())
  assert result.dropped == {'decomposition unparsable': 6} and result.decomposition_rate == 0
  assert [row['id'] for row in result.rows] == [s.id for s in chosen if s.kind != 'sequential']


@pytest.mark.parametrize('kind', ['single', 'sequential', 'parallel', 'irrelevant'])
def test_seeds_round_trip_as_json(kind):
  for seed in seeds(kind, 5):
    assert Seed.from_json(json.loads(json.dumps(seed.to_json()))) == seed
  if kind == 'single':  # BFCL writes the reference as one string
    record = seed.to_json()
    assert Seed.from_json(record | {'ground_truth': print_calls(list(seed.calls))}) == seed


def test_bad_seeds_are_named(tokenizer):
  seed = seeds('single', 1)[0]
  with pytest.raises(ValueError, match='twice'):
    distill([seed, seed], None, tokenizer, None)
  with pytest.raises(ValueError, match='no seeds'):
    distill([], None, tokenizer, None)
  for change in ({'ground_truth': ['f(a=']}, {'ground_truth': '[f(a=]'}, {'conversations': [{'role': 'user'}]}, {'tool_response': []},
                 {'tool_response': '{}'}, {'kind': 'odd'}):
    with pytest.raises(ValueError, match=seed.id):
      Seed.from_json(seed.to_json() | change)
  with pytest.raises(ValueError, match='not a seed record'):
    Seed.from_json({'id': 3})
