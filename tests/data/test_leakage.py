"""Leaks: what only the reference calls can have said, and not what can be read out of the
conversation.
"""

import json
import re

import hypothesis
import hypothesis.strategies as st
import pytest

from dcore_jax.chat import tool_specs
from dcore_jax.chat.messages import Message, ToolCall
from dcore_jax.data.benchmark_tasks import bfcl_tests
from dcore_jax.data.leakage import leaked_facts, words_of
from dcore_jax.data.seeds import Seed
from dcore_jax.worlds import bfcl


def seed(query, *calls):
  kind = 'parallel' if len(calls) > 1 else 'single'
  return Seed(
    's',
    kind if calls else 'irrelevant',
    (
      Message('system', 'tools: setMode(mode: auto, round_trip), get_order'),
      Message('user', query),
    ),
    calls,
    (),
    '' if calls else 'no',
  )


@pytest.mark.parametrize(
  ('query', 'value', 'subtask', 'leaks'),
  [
    ('cancel the order', 'R541', 'cancel R541', {'r541'}),
    ('cancel the order', 'abc9', 'use abc9', {'abc9'}),
    ('cancel the order', 541, 'cancel order 541', {'541'}),
    ('cancel R541', 'R541', 'cancel r541', set()),
    # texts in lower case, whole, in part, quoted
    ('resolve it', 'pump', 'resolve it: the pump', {'pump'}),
    ('resolve it', 'gift card', 'pay by gift card', {'gift card'}),
    (
      'resolve it',
      'replaced the main filter twice',
      'say that you replaced the main filter',
      {'replaced the main', 'the main filter'},
    ),
    ('resolve it', 'replaced the main filter twice', 'mention the filter', set()),
    ('resolve it', 'replaced the main filter twice', 'note "main filter"', {'main filter'}),
    ('resolve it', 'on', 'put it on', set()),
    ('tell Ines', 'Ines', 'tell INES', set()),
    ('rain in lima?', 'Lima', 'look up Lima', set()),
    ('resolve it', 'book club rules', 'Book it', set()),
    ('resolve it', 'the Lima office', 'Book it in Lima', {'lima'}),
    ('earlier', ['fig', {'x': ('kiwi', 'plum')}], 'fig, kiwi and pear', {'fig', 'kiwi'}),
    ('x', True, 'True', set()),
    # what the tools' descriptions say is known; names of several words are those words
    ('go', 'round_trip', 'book a round trip', set()),
    ('go', 'auto', 'set the mode to auto', set()),
    # readings of a conversation
    ('a wire of 5m', 5, 'a wire of 5 metres', set()),
    ('on the 18th', 18, 'on day 18', set()),
    ('95% sure', 0.95, 'level 0.95', set()),
    ('1.267 billion people', 1267000000, 'population 1267000000', set()),
    ('1,000 sheets', 1000, '1000 sheets', set()),
    ('three sheets', 3, '3 sheets', set()),
    ('cost 2.50', 2.5, 'cost 2.5', set()),
    ('a coffee', 1, '1 coffee', set()),
    ('on May 3rd, 2022', '2022-05-03', 'for 2022-05-03', set()),
    ('on 3 May 2022', '2022-05-03', 'for 2022-05-03', set()),
    ('on May 3rd, 2022', '2022-05-04', 'for 2022-05-04', {'2022-05-04'}),
    ('half of them', 0.95, 'level 0.95', {'0.95'}),
    ('I am mei_kovacs_8020', 'Kovacs', 'look Mei Kovacs up', set()),
    ('請問天氣', '上海', '查上海', {'上 海'}),
    ('上海天氣', '上海', '查上海', set()),
  ],
)
def test_what_leaks(query, value, subtask, leaks):
  assert leaked_facts(seed(query, ToolCall('f', {'a': value})), ['look at it', subtask]) == leaks
  assert leaked_facts(seed(query, ToolCall('f', {}, (value,))), [subtask]) == leaks


def test_names_of_functions_and_parameters_are_no_facts():
  assert not leaked_facts(
    seed('go', ToolCall('GetWeather', {'City9': 'Lima'})), ['call GetWeather with City9']
  )
  assert not leaked_facts(seed('go'), ['Anything 7'])


WORDS = (
  'Cancel',
  '"the',
  'pump"',
  'R541',
  '5m',
  '12.50',
  '1,000',
  'kiwi',
  'May',
  '2022-05-03',
  '上海',
)


@hypothesis.given(st.lists(st.sampled_from(WORDS), min_size=1, max_size=12), st.data())
def test_words_of_the_conversation_never_leak(words, data):
  start = data.draw(st.integers(0, len(words) - 1))
  end = data.draw(st.integers(start + 1, len(words)))
  values = ' '.join(data.draw(st.permutations(words))), data.draw(st.sampled_from(words))
  calls = [ToolCall('f', {'a': value}) for value in values]
  assert not leaked_facts(seed(' '.join(words), *calls), [' '.join(words[start:end])])


@pytest.mark.parametrize(
  ('text', 'words'),
  [
    ('Set getMode to 2.50!', ('set', 'get', 'mode', 'to', '2.5')),
    ('HAT003, card_17', ('hat003', 'card_17')),
    ('one 007 1,000 10.0', ('1', '007', '1000', '10')),
    ('', ()),
  ],
)
def test_words(text, words):
  assert words_of(text) == words


def test_decompositions_that_saw_no_reference(data_dir):
  """D-CORE-14B's own answers to BFCL's parallel tasks, where every alarm is a false one: what is
  left of them (31 of 216 with names and digits alone) knows AAPL for Apple, MA for Boston, Beijing
  for its Chinese name, or does algebra.
  """
  try:
    data = bfcl.package_folder() / 'data'
  except ValueError as error:
    pytest.skip(str(error))
  tests = {task.id.rpartition('/')[0]: task for task in bfcl_tests() if 'parallel' in task.id}
  looked = 0
  alarms = []
  for category in ('parallel', 'live_parallel'):
    entries = {
      e['id']: e
      for e in map(json.loads, (data / f'BFCL_v3_{category}.json').read_text().splitlines())
    }
    answers = (
      data_dir / 'dcore_published' / 'result' / 'D-CORE-14B' / f'BFCL_v3_{category}_result.json'
    )
    for answer in map(json.loads, answers.read_text().splitlines()):
      listed = re.search(r'following subtasks:\n((?:\d+\..*\n)+)', answer['reasoning_content'])
      if listed:
        tools = tool_specs.system_text('', tool_specs.read_tools(entries[answer['id']]['function']))
        test = tests[answer['id']]
        one = Seed(
          test.id,
          'parallel',
          (Message('system', tools), Message('user', test.query)),
          test.calls,
          (),
        )
        looked += 1
        if leaked_facts(one, re.findall(r'^\d+\. (.*)$', listed[1], re.MULTILINE)):
          alarms.append(answer['id'])
  assert looked == 216 and len(alarms) <= 11, alarms
