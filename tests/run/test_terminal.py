"""The conversation in a terminal: what is shown, what is sent, and what Ctrl-C leaves behind."""

import io
import types

import pytest
import transformers

from dcore_jax.chat.messages import Message, ToolCall
from dcore_jax.chat.tool_calls import print_calls, tool_response
from dcore_jax.rollout.policy import ORGANISM
from dcore_jax.rollout.sampling import SamplingParams
from dcore_jax.run.terminal import Cancelled, Chat, Speaker
from dcore_jax.serve.scheduler import Scheduler
from dcore_jax.serve.server import load_model
from dcore_jax.worlds.registry import WORLDS
from dcore_jax.worlds.toolworld.world import ToolWorld
from tests.serve.servers import ScriptedEngine
from tests.waiting import until


@pytest.fixture(scope='module')
def tokenizer():
  return transformers.AutoTokenizer.from_pretrained(str(ORGANISM))


class Scripted:
  """A speaker that says what it is told to, and shows everything."""

  def __init__(self, *texts):
    self.texts = list(texts)
    self.asked = []
    self.shown = ''

  def answer(self, messages):
    self.asked.append([(message.role, message.content) for message in messages])
    text = self.texts.pop(0)
    if text is None:
      raise Cancelled
    return text

  def show(self, text, style=''):
    self.shown += text


def speaker(tokenizer, text, colour=True):
  engine = ScriptedEngine([*tokenizer(text)['input_ids'], tokenizer.eos_token_id])
  scheduler = Scheduler(engine, 0)
  out = io.StringIO()
  return types.SimpleNamespace(
    engine=engine,
    scheduler=scheduler,
    out=out,
    speaker=Speaker(scheduler, tokenizer, SamplingParams(), out, colour),
  )


def test_thoughts_are_dimmed_and_nothing_steers_the_terminal(tokenizer):
  made = speaker(tokenizer, '<think>\nhm\n</think>\n\nfine \x1b[31m\u202e \u00e9')
  assert (
    made.speaker.answer([Message('user', 'x')])
    == '<think>\nhm\n</think>\n\nfine \x1b[31m\u202e \u00e9'
  )
  assert made.out.getvalue().startswith('\x1b[2mh')
  assert (
    made.out.getvalue().endswith('\ufffd[31m\ufffd \u00e9\n')
    and made.out.getvalue().count('\x1b[31') == 0
  )
  plain = speaker(tokenizer, '<think>\nhm\n</think>\n\nfine', colour=False)
  plain.speaker.answer([Message('user', 'x')])
  assert plain.out.getvalue() == 'hm\nfine\n'
  made.scheduler.close()
  plain.scheduler.close()


def test_ctrl_c_cancels_the_answer_and_frees_the_lane(tokenizer):
  made = speaker(tokenizer, 'find the order')

  class Interrupted(io.StringIO):
    def flush(self):
      if self.getvalue() == 'find':
        raise KeyboardInterrupt

  out = Interrupted()
  with pytest.raises(Cancelled):
    Speaker(made.scheduler, tokenizer, SamplingParams(), out, False).answer([Message('user', 'x')])
  until(lambda: made.scheduler.in_flight == 0)
  assert out.getvalue() == 'find\n(cancelled)\n'
  made.scheduler.close()


def test_a_conversation_remembers_answers_without_thoughts_and_forgets_cancelled_turns():
  voice = Scripted('<think>\nhm\n</think>\n\nfine', None, 'yes')
  chat = Chat(voice, system='be brief')
  chat.start()
  for line in ('one', 'two', '', 'three', '/what', '/state'):
    chat.take(line)
  assert voice.asked[-1] == [
    ('system', 'be brief'),
    ('user', 'one'),
    ('assistant', 'fine'),
    ('user', 'three'),
  ]
  assert 'there is no /what' in voice.shown and 'there is no /state' in voice.shown
  chat.take('/new')
  voice.texts.append('again')
  chat.take('four')
  assert voice.asked[-1] == [('system', 'be brief'), ('user', 'four')]


def test_a_task_of_a_world_is_acted_out_and_judged():
  [task] = ToolWorld().tasks('sequential', 1, seed=0, split='eval')
  [turn] = task.turns
  texts = [f'<think>\nhm\n</think>\n\n{print_calls([call])}' for call in turn.calls]
  voice = Scripted(*texts, f'<think>\nhm\n</think>\n\n{turn.answer}', 'wrong')
  chat = Chat(voice, world=ToolWorld(), kind='sequential')
  chat.start()
  assert turn.query in voice.shown
  chat.take('')
  assert f'right after {len(turn.calls) + 1} answers' in voice.shown
  assert all(response in voice.shown for response in turn.responses)
  chat.take('')
  assert 'wrong: wrong state' in voice.shown


def test_requests_of_ones_own_act_on_the_tools_and_the_state():
  [*_, task] = ToolWorld().tasks('single', 3, seed=0, split='eval')
  [call] = task.turns[0].calls
  voice = Scripted(
    print_calls([call]), 'done', '[f(]', 'sorry', print_calls([ToolCall('eval', {})]), 'no'
  )
  chat = Chat(voice, world=ToolWorld(), kind='single')
  chat.start()
  chat.take('/new single 2')
  chat.take('please do it')
  assert voice.asked[-1][-2:] == [
    ('assistant', print_calls([call])),
    ('user', tool_response(task.turns[0].responses[0])),
  ]
  chat.take('and again')
  assert 'unreadable calls' in voice.asked[-1][-1][1]
  chat.take('and run this')
  assert 'unknown tool' in voice.asked[-1][-1][1]
  for line in ('/state', '/new nonsense', '/new single x'):
    chat.take(line)
  assert all(
    f'{table} {key}' in voice.shown for table, rows in task.initial_state.items() for key in rows
  )
  assert "unknown task kind 'nonsense'" in voice.shown and "'x' is no number" in voice.shown


def test_a_task_of_bfcl_is_acted_out_and_its_apis_answer_requests():
  try:
    world = WORLDS['bfcl']()
  except ValueError as error:
    pytest.skip(str(error))
  [task] = world.tasks('sequential', 1, seed=0, split='eval')
  [turn] = task.turns
  voice = Scripted(
    *(f'<think>\nhm\n</think>\n\n{print_calls([call])}' for call in turn.calls),
    f'<think>\nhm\n</think>\n\n{turn.answer}',
    print_calls([turn.calls[0]]),
    'done',
  )
  chat = Chat(voice, world=world, kind='sequential')
  chat.start()
  assert turn.query in voice.shown and f'"name": "{turn.calls[0].name}"' in voice.shown
  chat.take('')
  assert f'right after {len(turn.calls) + 1} answers' in voice.shown
  chat.take('do the first part alone')
  assert voice.asked[-1][-1] == ('user', tool_response(turn.responses[0]))
  chat.take('/state')
  assert f'{task.classes[0]} ' in voice.shown


def test_the_organism_acts_a_task_out():
  organism = load_model('', lanes=1, max_len=192, max_new=64)
  scheduler = Scheduler(organism.engine, 1)
  out = io.StringIO()
  voice = Speaker(scheduler, organism.tokenizer, SamplingParams(0, max_tokens=64), out, False)
  chat = Chat(voice, world=ToolWorld(), kind='single')
  chat.start()
  chat.take('')
  scheduler.close()
  assert out.getvalue().endswith('right after 1 answers\n')
