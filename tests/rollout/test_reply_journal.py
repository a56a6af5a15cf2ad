"""Journals of several hosts: each writes its own, and reads those of the others."""

import pytest

from dcore_jax.rollout.backends import Reply
from dcore_jax.rollout.reply_journal import ReplyJournal


def reply(text):
  return Reply(text=text, finished=True, prompt_tokens=1, completion_tokens=2)


def test_what_another_host_was_answered_is_known(tmp_path):
  paths = [tmp_path / name for name in ('replies.jsonl', 'replies.host1.jsonl', 'other.jsonl')]
  for number, path in enumerate(paths):
    ReplyJournal(path).append({'question': number}, reply(f'answer {number}'))
  for path in (*paths[:2], tmp_path / 'replies.host12.jsonl'):
    journal = ReplyJournal(path)
    for number in (0, 1):
      assert journal.find({'question': number}) == reply(f'answer {number}')
    # A journal of other questions is none of a host.
    assert journal.find({'question': 2}) is None
    journal.append({'question': 3}, reply('new'))
    assert journal.find({'question': 3}) == reply('new')
    assert journal.find({'question': 1}) == reply('answer 1')
  assert ReplyJournal(paths[2]).find({'question': 0}) is None


def test_a_line_that_another_host_has_not_finished_is_left_alone(tmp_path):
  theirs = tmp_path / 'replies.host1.jsonl'
  ReplyJournal(theirs).append({'question': 1}, reply('whole'))
  half = theirs.read_bytes() + b'{"key": "half'
  theirs.write_bytes(half)
  journal = ReplyJournal(tmp_path / 'replies.jsonl')
  assert journal.find({'question': 1}) == reply('whole')
  assert theirs.read_bytes() == half
  theirs.write_bytes(b'no reply\n')
  with pytest.raises(ValueError, match=r'replies\.host1\.jsonl, line 1 is no reply'):
    ReplyJournal(tmp_path / 'replies.jsonl')
