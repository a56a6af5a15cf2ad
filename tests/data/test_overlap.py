"""Test tasks are recognised by their words, by their calls, and by their people."""

import dataclasses

import pytest

from dcore_jax.chat.messages import Message, ToolCall
from dcore_jax.data.overlap import Overlap, TestTask, fingerprint
from dcore_jax.data.seeds import Seed

QUERY = (
  'Please move the final report into the archive and tell my colleague Ines that it is done by noon'
)
CALLS = (
  ToolCall('mv', {'source': 'report.txt', 'destination': 'archive'}),
  ToolCall('cd', {'folder': 'archive'}),
  ToolCall('send', {'to': 'Ines', 'text': 'It is done.', 'priority': 2}),
)
ONES = tuple(ToolCall('cat', {'file_name': name}) for name in 'xyz')
OVERLAP = Overlap(
  [
    TestTask('ones', 'x', ONES),
    TestTask('t', QUERY, CALLS, ('ines_okafor_2207',)),
    TestTask('short', 'Turn it off'),
  ]
)


def seed(query, *calls, system='tools'):
  kind = 'sequential' if len(calls) > 1 else 'single'
  return Seed(
    's',
    kind if calls else 'irrelevant',
    (Message('system', system), Message('user', query)),
    calls,
    ('',) * len(calls),
    'answer',
  )


@pytest.mark.parametrize(
  ('query', 'found'),
  [
    (QUERY, ('t', 'query')),
    (QUERY.upper().replace(' ', ' -- ') + '!', ('t', 'query')),
    ('Well then. ' + QUERY + ' and thank you', ('t', 'query')),  # most of its 8-grams
    (
      ' '.join(QUERY.split()[:9])
      + ' nothing of the kind, but rather sort it by date and print the last ten lines of it',
      None,
    ),
    ('turn it off.', ('short', 'query')),
    ('turn it off and on', None),
    ('Something else altogether', None),
  ],
)
def test_words(query, found):
  assert OVERLAP.find(seed(query, ToolCall('f', {}))) == found


@pytest.mark.parametrize(
  ('calls', 'found'),
  [
    (CALLS, True),
    ((ToolCall('ls', {}), *CALLS), True),
    (CALLS[:2], False),
    (CALLS[1:], True),  # 3 values; 4 values
    (
      (
        dataclasses.replace(CALLS[0], arguments={'destination': 'Archive', 'source': 'report.TXT'}),
        *CALLS[1:],
      ),
      True,
    ),
    ((*CALLS[:2], ToolCall('send', {'to': 'Ines', 'text': 'it is done', 'priority': 2.0})), True),
    (ONES, True),
    (ONES[:2], False),
    ((*ONES[:2], ToolCall('ls', {}), ONES[2]), False),
    ((CALLS[2],), False),
    ((CALLS[1], CALLS[0], CALLS[2]), False),  # none of its runs is the test's
    (
      (
        ToolCall('mv', {'source': 'other.txt', 'destination': 'archive'}),
        CALLS[1],
        ToolCall('send', {'to': 'Ines'}),
      ),
      False,
    ),
  ],
)
def test_calls(calls, found):
  assert OVERLAP.find(seed('something new', *calls)) == (
    ('ones' if calls == ONES else 't', 'calls') if found else None
  )


def test_words_of_earlier_turns_and_of_long_requests():
  later = dataclasses.replace(
    seed('And thank her'), conversations=(Message('user', QUERY), Message('user', 'And thank her'))
  )
  assert OVERLAP.find(later) == ('t', 'query')
  other = 'sort the ledger by date and print the last ten lines of it for me as well as you can '
  assert OVERLAP.find(seed(other * 3 + QUERY + ' ' + other * 3)) == (
    't',
    'query',
  )  # a tenth of its words, and all of the test's


@pytest.mark.parametrize('copies', [1, 2, 4])
def test_a_request_of_several_test_tasks_is_found_as_that_of_one(copies):
  """BFCL asks the same in its base, long-context and missing-function tasks."""
  overlap = Overlap(TestTask(f't{n}', QUERY) for n in range(copies))
  other = 'sort the ledger by date and print the last ten lines of it for me as well as you can '
  assert overlap.find(seed(other * 3 + QUERY + ' ' + other * 3)) == ('t0', 'query')
  assert (
    overlap.find(seed(other * 3 + ' '.join(QUERY.split()[:12]) + ' ' + other * 3)) is None
  )  # 5 of its 12 runs


def test_people():
  assert OVERLAP.find(seed('I am ines_okafor_2207', ToolCall('f', {}))) == ('t', 'name')
  assert OVERLAP.find(seed('It is me', ToolCall('get_user', {'user_id': 'ines_okafor_2207'}))) == (
    't',
    'name',
  )
  assert (
    OVERLAP.find(seed('It is me', ToolCall('get_user', {'user_id': 'ines_okafor_2208'}))) is None
  )


def test_duplicates_differ_in_spelling_alone():
  one = seed('Close it, please', CALLS[1])
  assert fingerprint(one) == fingerprint(
    dataclasses.replace(seed('close it please', CALLS[1]), id='other')
  )
  assert fingerprint(one) != fingerprint(
    seed('close it please', ToolCall('cd', {'folder': 'inbox'}))
  )
  assert fingerprint(one) != fingerprint(seed('close it please', CALLS[1], system='other tools'))
