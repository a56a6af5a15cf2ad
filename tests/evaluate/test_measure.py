"""Acting tasks out with a scripted model, and the figures that come of it."""

import dataclasses
import json

import numpy as np
import pytest

from dcore_jax.chat.tool_calls import print_calls
from dcore_jax.evaluate.measure import measure
from dcore_jax.organism.tokenizer import build_tokenizer
from dcore_jax.organism.vocabulary import sample_texts
from dcore_jax.rollout.backends import TOO_LONG, Reply
from dcore_jax.worlds.rollouts import act, act_through
from dcore_jax.worlds.toolworld.world import ToolWorld

KINDS = ('single', 'sequential', 'parallel', 'irrelevant', 'multi_turn')


@pytest.fixture(scope='module')
def tokenizer():
  return build_tokenizer(sample_texts(), 640)


@dataclasses.dataclass
class Done:
  tokens: np.ndarray
  finished: bool


class Scripted:
  """Answers each prompt with the next reference text of its task, each round in reverse order."""

  max_len = 1024

  def __init__(self, tokenizer, tasks, reasoning, cut=False):
    self.tokenizer = tokenizer
    self.reasoning = reasoning
    self.cut = cut
    self.script = {}
    for task in tasks:
      answers = []
      for turn in task.turns:
        answers += (
          [print_calls(list(turn.calls))]
          if task.kind == 'parallel'
          else [print_calls([c]) for c in turn.calls]
        )
        answers += [turn.answer]
      self.script[task.turns[0].query] = iter(answers)

  def stream(self, source, sampling):
    while arrivals := list(source(3)):
      for tag, request in reversed(arrivals):
        prompt = self.tokenizer.decode(request.prompt)
        query = next(q for q in self.script if q in prompt)
        text = f'<think>\n{self.reasoning}\n</think>\n\n{next(self.script[query])}'
        tokens = np.array(self.tokenizer(text)['input_ids'], np.int32)
        if self.cut:
          yield tag, Done(tokens[:5], False)
        else:
          yield tag, Done(np.append(tokens, self.tokenizer.eos_token_id), True)


def run(tokenizer, reasoning='find it.', cut=False, count=8):
  world = ToolWorld()
  result = {}
  for kind in KINDS:
    tasks = world.tasks(kind, count, seed=2, split='eval')
    assert len({t.turns[0].query for t in tasks}) == count
    result[kind] = act(Scripted(tokenizer, tasks, reasoning, cut), tokenizer, world, tasks, None)
  return result


def test_a_perfect_model_scores_one(tokenizer):
  trajectories = run(tokenizer)
  figures = measure(trajectories)
  assert figures['accuracy'] == dict.fromkeys(KINDS, 1.0) and figures['n'] == dict.fromkeys(
    KINDS, 8
  )
  assert figures['lazy_ratio'] == dict.fromkeys(KINDS, 0.0) and not any(
    figures['failures'].values()
  )
  for trajectory in trajectories['sequential']:
    assert len(trajectory.texts) == trajectory.task.steps + 1
  # Tokens of "\nfind it.\n" between the tags: what the lazy measure counts.
  inside = len(tokenizer('\nfind it.\n')['input_ids'])
  assert {n for group in trajectories.values() for t in group for n in t.reasoning_tokens} == {
    inside
  }


def test_right_answers_are_never_lazy_and_wrong_long_ones_are(tokenizer):
  ramble = 'wait, but however. ' * 60
  right = measure(run(tokenizer, ramble))
  assert right['lazy_ratio']['single'] == 0 and right['reflections_per_response'] == 180
  world = ToolWorld()
  tasks = world.tasks('single', 4, seed=2, split='eval')
  others = world.tasks('single', 8, seed=2, split='eval')[4:]
  script = Scripted(tokenizer, tasks, ramble)
  script.script = {
    t.turns[0].query: iter([print_calls(list(o.turns[0].calls))])
    for t, o in zip(tasks, others, strict=True)
  }
  wrong = measure({'single': act(script, tokenizer, world, tasks, None)})
  assert wrong['accuracy']['single'] == 0 and wrong['lazy_ratio']['single'] == 1


def test_a_prompt_too_long_for_the_engine_ends_its_episode_alone(tokenizer):
  world = ToolWorld()
  tasks = world.tasks('sequential', 8, seed=2, split='eval')
  engine = Scripted(tokenizer, tasks, 'find it.')
  first, *_ = [t.turns[0] for t in tasks]
  engine.script[first.query] = iter(
    ['[' + ', '.join([print_calls([first.calls[0]])[1:-1]] * 60) + ']']
  )
  trajectories = act(engine, tokenizer, world, tasks, None)
  assert [t.outcome.reason for t in trajectories] == ['prompt too long'] + [''] * 7


class Unmarked:
  """A tokenizer for which the tags are several tokens, as Llama's and Qwen2.5's."""

  unk_token_id = None

  def __init__(self, tokenizer):
    self._tokenizer = tokenizer

  def convert_tokens_to_ids(self, token):
    return None if token == '</think>' else self._tokenizer.convert_tokens_to_ids(token)

  def __call__(self, *arguments, **options):
    return self._tokenizer(*arguments, **options)

  def __len__(self):
    return len(self._tokenizer)

  def __getattr__(self, name):
    return getattr(self._tokenizer, name)


def test_thoughts_are_measured_where_their_tags_are_no_tokens(tokenizer):
  world = ToolWorld()
  tasks = world.tasks('single', 4, seed=2, split='eval')
  measured = [
    act(Scripted(tokenizer, tasks, 'find it.'), t, world, tasks, None)
    for t in (tokenizer, Unmarked(tokenizer))
  ]
  assert (
    measured[0][0].reasoning_tokens
    == measured[1][0].reasoning_tokens
    == [len(tokenizer('\nfind it.\n')['input_ids'])]
  )


@pytest.mark.parametrize('kind', KINDS)
def test_a_model_that_does_not_think_is_right_where_its_answers_are(tokenizer, kind):
  world = ToolWorld()
  tasks = world.tasks(kind, 8, seed=2, split='eval')
  backend = ScriptedBackend(Scripted(tokenizer, tasks, None))
  found = act_through(backend, tokenizer, world, tasks, None)
  assert [t.outcome.reason for t in found] == [''] * 8
  figures = measure({kind: found})
  assert figures['reasoning_tokens_mean'] == 0 and figures['reflections_per_response'] == 0


def test_a_response_without_tags_that_is_cut_off_is_no_answer(tokenizer):
  """It may be thoughts whose opening tag is in the prompt, and must not pass for an explanation."""
  world = ToolWorld()
  tasks = world.tasks('irrelevant', 4, seed=2, split='eval')
  found = act_through(
    ScriptedBackend(Scripted(tokenizer, tasks, None), finished=False), tokenizer, world, tasks, None
  )
  assert [t.outcome.reason for t in found] == ['no answer'] * 4 and all(
    t.unfinished == 1 for t in found
  )
  assert all(t.reasonings == t.texts for t in found)


def test_nothing_measured_is_none(tokenizer):
  world = ToolWorld()
  tasks = world.tasks('single', 2, seed=2, split='eval')
  refused = ScriptedBackend(
    Scripted(tokenizer, tasks, None), {t.turns[0].query: TOO_LONG for t in tasks}
  )
  figures = measure({'single': act_through(refused, tokenizer, world, tasks, None)})
  assert figures['accuracy'] == {'single': 0.0} and figures['reasoning_tokens_mean'] is None
  json.dumps(figures, allow_nan=False)


def test_responses_cut_off_are_counted_and_wrong(tokenizer):
  trajectories = run(tokenizer, cut=True, count=4)
  figures = measure(trajectories)
  assert figures['accuracy'] == dict.fromkeys(KINDS, 0.0) and figures['unfinished']['single'] == 4
  assert all(n == 4 for t in trajectories['single'] for n in t.reasoning_tokens)


class ScriptedBackend:
  """`Scripted` as a backend; a query of `refused` has an error for an answer."""

  def __init__(self, scripted, refused=(), finished=True):
    self.scripted = scripted
    self.refused = dict(refused)
    self.finished = finished

  def stream(self, source, sampling):
    del sampling
    while arrivals := list(source(3)):
      for tag, request in reversed(arrivals):
        query = next(m.content for m in request.messages if m.role == 'user')
        if query in self.refused:
          yield tag, Reply('', False, 0, 0, self.refused[query])
        else:
          block = (
            f'<think>\n{self.scripted.reasoning}\n</think>\n\n' if self.scripted.reasoning else ''
          )
          yield tag, Reply(f'{block}{next(self.scripted.script[query])}', self.finished, 1, 1)


def test_a_backend_is_measured_as_the_engine_is(tokenizer):
  world = ToolWorld()
  trajectories = {}
  for kind in KINDS:
    tasks = world.tasks(kind, 8, seed=2, split='eval')
    told = []
    trajectories[kind] = act_through(
      ScriptedBackend(Scripted(tokenizer, tasks, 'find it.')),
      tokenizer,
      world,
      tasks,
      None,
      told.append,
    )
    assert told == [1] * 8
  assert measure(trajectories) == measure(run(tokenizer))


def test_an_endpoint_without_an_answer_costs_its_task_alone(tokenizer):
  world = ToolWorld()
  tasks = world.tasks('sequential', 6, seed=2, split='eval')
  errors = [TOO_LONG, 'refused with status 400: 812 tokens', 'no answer: timed out']
  refused = zip([t.turns[0].query for t in tasks[:3]], errors, strict=True)
  told = []
  found = act_through(
    ScriptedBackend(Scripted(tokenizer, tasks, 'find it.'), refused),
    tokenizer,
    world,
    tasks,
    None,
    told.append,
  )
  assert [t.outcome.reason for t in found] == [
    TOO_LONG,
    'refused with status 400',
    'no answer',
    '',
    '',
    '',
  ] and told == [1] * 6


def test_every_figure_has_an_interval_over_tasks(tokenizer):
  figures = measure(run(tokenizer))
  intervals = figures['intervals']
  for kind in KINDS:
    found = intervals['accuracy'][kind]
    assert (found['mean'], found['n'], found['unit']) == (1.0, 8, 'tasks')
    assert found['interval'] == pytest.approx([0.67559, 1], abs=1e-5)
    # A dialogue has several responses, which are one unit.
    lazy = intervals['lazy_ratio'][kind]
    assert lazy['n'] == 8 and lazy['interval'] == pytest.approx([0, 1 - 0.025 ** (1 / 8)])
  assert intervals['decomposition_rate']['n'] == 16
  for name in ('decomposition_rate', 'reflections_per_response', 'reasoning_tokens_mean'):
    assert intervals[name]['mean'] == pytest.approx(figures[name])
  assert intervals['reasoning_tokens_mean']['n'] == 40
  json.dumps(figures, allow_nan=False)
