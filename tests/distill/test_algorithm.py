"""Many seeds at once: each has one outcome, order and lanes do not matter, and counts add up."""

import collections

import pytest

from dcore_jax.chat.tool_calls import print_calls
from dcore_jax.data.world_seeds import task_seeds
from dcore_jax.distill.algorithm import by_length, distill, label, summarise
from dcore_jax.distill.decompose import print_subtasks
from dcore_jax.distill.solve import Distiller
from dcore_jax.rollout.backends import Reply
from dcore_jax.rollout.sampling import SamplingParams
from dcore_jax.worlds.toolworld.world import ToolWorld

THINK = '<think>\nreasoning.\n</think>\n\n'
SAMPLING = SamplingParams(temperature=0.6, max_tokens=64, seed=3)


def some_seeds(seed=9, **counts):
  """(seeds, answer(messages) of a perfect model for all of them)."""
  chosen = []
  known = {}
  for kind, count in counts.items():
    for task in ToolWorld(4).tasks(kind, count, seed=seed, split='train'):
      for one, turn in zip(task_seeds(ToolWorld(), task), task.turns, strict=True):
        chosen.append(one)
        # An irrelevant turn has a subtask, and no call that would solve it.
        for text, call in zip(turn.subtasks, turn.calls, strict=False):
          # Queries of one subtask are asked as they stand, and subtasks without their courtesies.
          for asked in (text, f'{text}.', f'please {text}.'):
            known[asked] = THINK + print_calls([call])
        if len(turn.calls) > 1:
          known[turn.query] = THINK + print_subtasks(
            turn.subtasks, [[i] for i in range(len(turn.calls))]
          )
        elif not turn.calls:
          known[turn.query] = THINK + turn.answer

  def answer(messages):
    last = messages[-1].content
    for line in last.splitlines():
      if line.startswith('request: '):
        return known[line.removeprefix('request: ')]
    return known[last]

  return chosen, answer


class ScriptedBackend:
  """Answers from a function, a few requests at a time and the last ones first.

  `asked` is every request in the order it came, `widths` how many came at once.
  """

  model = 'scripted'

  def __init__(self, answer, width=4):
    self.answer = answer
    self.width = width
    self.asked = []
    self.widths = []

  def stream(self, source, sampling):
    while batch := list(source(self.width)):
      self.widths.append(len(batch))
      for tag, request in reversed(batch):
        self.asked.append(request)
        text = self.answer(request.messages)
        if not isinstance(text, Reply):
          text = Reply(text=text, finished=True, prompt_tokens=10, completion_tokens=5, seconds=0.5)
        yield tag, text


def run(seeds, answer, width=4, **options):
  backend = ScriptedBackend(answer, width)
  return dict(distill(seeds, backend, SAMPLING, Distiller(**options))), backend


def test_every_seed_has_one_outcome_and_rows_say_how_they_were_made():
  seeds, answer = some_seeds(single=6, sequential=6, parallel=6, irrelevant=6, multi_turn=4)
  outcomes, backend = run(seeds, answer)
  assert sorted(outcomes) == list(range(len(seeds))) and not any(
    o.reason for o in outcomes.values()
  )
  for number, outcome in outcomes.items():
    seed = seeds[number]
    assert (outcome.seed, outcome.kind) == (seed.id, seed.kind)
    calls = len(seed.calls) + 1 if seed.kind in ('sequential', 'parallel') else 1
    assert (outcome.calls, outcome.completion_tokens, outcome.prompt_tokens) == (
      calls,
      5 * calls,
      10 * calls,
    )
    # Completions that were under way together took their time together.
    assert outcome.seconds == (1.0 if seed.kind == 'parallel' else calls * 0.5)
    assert all(row['id'].startswith(seed.id) for row in outcome.value)
    made = outcome.value[0]['provenance']
    assert (made['seed'], made['model'], made['calls'], made['seconds']) == (
      seed.id,
      'scripted',
      calls,
      outcome.seconds,
    )
    assert (
      made['sampling']['temperature'] == 0.6
      and made['sampling']['seed'] == 3
      and made['wording'].startswith('organism-')
    )


def test_a_seed_gives_the_same_whoever_else_is_there():
  """Neither the order of seeds nor the number of lanes changes what is asked about one."""
  seeds, answer = some_seeds(sequential=5, parallel=5, single=5)
  everything, backend = run(seeds, answer)
  asked = {(request.key_id, request.messages) for request in backend.asked}
  assert len({key for key, _ in asked}) == len(backend.asked)
  for some, width in ((seeds[::-1], 1), (seeds[2:9], 64)):
    outcomes, other = run(some, answer, width)
    assert {(request.key_id, request.messages) for request in other.asked} <= asked
    for number, outcome in outcomes.items():
      same = everything[seeds.index(some[number])]
      assert outcome.value == same.value and outcome.calls == same.calls


def test_whatever_can_be_asked_is_under_way():
  seeds, answer = some_seeds(single=10, sequential=10, parallel=10)
  seeds = [seeds[n] for n in by_length(seeds)]
  _, backend = run(seeds, answer, width=8)
  full = next(n for n, width in enumerate(backend.widths) if width < 8)
  # Only the last dependent subtasks find no company: all lanes are busy until less than one round
  # of work is left.
  assert sum(backend.widths[full:]) <= 8 and sum(backend.widths) == len(backend.asked)
  lengths = [len(seed.calls) if seed.kind == 'sequential' else 0 for seed in seeds]
  assert lengths == sorted(lengths, reverse=True)


def test_counts_add_up_and_rates_are_those_of_the_paper_and_of_everything():
  seeds, answer = some_seeds(single=4, sequential=8, parallel=4, irrelevant=4)
  several = [seed for seed in seeds if seed.kind == 'sequential']
  undecomposed = several[:1]
  cut = several[1:3]
  wrong = several[3:6]

  def spoiled(messages):
    def of(group):
      return any(messages[0] == seed.conversations[0] and seed.calls for seed in group)

    last = messages[-1].content
    asks_list = last.startswith('list the subtasks')
    if asks_list and any(s.query in last for s in undecomposed):
      return 'nothing'
    if not asks_list and of(cut) and not of(wrong + undecomposed):
      return 'no end'
    if not asks_list and of(wrong) and not of(cut + undecomposed):
      return THINK + '[f(a=1)]'
    return answer(messages)

  outcomes, _ = run(seeds, spoiled)
  s = summarise(outcomes.values())
  reasons = collections.Counter(o.reason for o in outcomes.values() if o.reason)
  assert s['dropped'] == dict(reasons) and s['kept'] + sum(reasons.values()) == s['seeds'] == 20
  assert (
    s['kept_by_kind'] == {k: v['kept'] for k, v in s['scenarios'].items()} and s['several'] == 12
  )
  dropped = {
    reason: reasons[reason]
    for reason in ('decomposition unparsable', 'unclosed reasoning', 'wrong call')
  }
  assert dropped == {'decomposition unparsable': 1, 'unclosed reasoning': 2, 'wrong call': 3}
  assert s['decomposition_rate'] == 11 / 12
  # The paper leaves out what was dropped before a reasoning was complete.
  assert s['success_rate'] == 6 / 9
  assert s['success_rate_all'] == 6 / 12
  assert s['rows'] == sum(len(o.value) for o in outcomes.values()) and s['calls'] == sum(
    o.calls for o in outcomes.values()
  )
  lost = next(o for o in outcomes.values() if o.reason == 'unclosed reasoning')
  assert lost.last == 'no end' and lost.stage == 'generate' and not lost.value


def test_an_outcome_as_a_record_counts_the_same():
  seeds, answer = some_seeds(single=3, sequential=3)
  outcomes, _ = run(seeds, answer)
  records = [vars(o) | {'value': len(o.value)} for o in outcomes.values()]
  assert summarise(records) == summarise(outcomes.values())


def test_labels_are_sampled_for_all_seeds_together():
  seeds, answer = some_seeds(single=4, irrelevant=4)
  queries = {s.query: s for s in seeds}
  backend = ScriptedBackend(
    lambda messages: (
      THINK
      + (
        print_calls(list(queries[messages[-1].content].calls))
        if queries[messages[-1].content].calls
        else queries[messages[-1].content].answer
      )
    )
  )
  found = dict(label(seeds, backend, SAMPLING, 3))
  assert [found[n].value.calls for n in range(8)] == [s.calls for s in seeds]
  assert [found[n].value.kind for n in range(8)] == [s.kind for s in seeds] and len(
    backend.asked
  ) == 24
  with pytest.raises(ValueError, match='samples = 0'):
    list(label(seeds, backend, SAMPLING, 0))


def test_bad_sets_of_seeds_are_named():
  seeds, answer = some_seeds(single=1)
  with pytest.raises(ValueError, match='twice'):
    run(seeds * 2, answer)
  with pytest.raises(ValueError, match='no seeds'):
    run([], answer)
