"""Rows on their way to training: prompts, turns, masks, long rows; and that the slips of the
released code are not repeated.
"""

import dataclasses
import json
import random

import numpy as np
import pytest
import transformers

from dcore_jax import tokentree
from dcore_jax.chat.messages import Message
from dcore_jax.data import rows as sft_rows
from dcore_jax.learn.batches import BatchShape, batches
from dcore_jax.organism.tokenizer import build_tokenizer
from dcore_jax.organism.vocabulary import sample_texts
from dcore_jax.run.config import default_config

END = '<|im_end|>'


@pytest.fixture(scope='module')
def tokenizer():
  return build_tokenizer(sample_texts(), 640)


def message(role, content):
  return {'role': role, 'content': content}


def dialogue(name='d', **fields):
  return {
    'id': name,
    **fields,
    'conversations': [
      message('system', 'rules'),
      message('user', 'find'),
      message('assistant', '<think>\nx\n</think>\n\n[find_order()]'),
      message('user', '<tool_response>\npaid\n</tool_response>'),
      message('assistant', '<think>\ny\n</think>\n\npaid'),
      message('user', 'go'),
      message('assistant', 'end'),
    ],
  }


def one_turn(i, question='find'):
  return {'id': i, 'conversations': [message('user', question), message('assistant', f'done {i}')]}


def encode(tokenizer, records, **options):
  return sft_rows.encode_rows(tokenizer, sft_rows.parse_rows(records), **options)


def split(records):
  return sft_rows.split_turns(sft_rows.parse_rows(records))


def trained_text(tokenizer, sequence):
  return tokenizer.decode(sequence.tokens[sequence.weights > 0])


def test_rows_are_trained_on_their_last_message_only(tokenizer):
  (sequence,) = encode(tokenizer, [dialogue()])
  assert trained_text(tokenizer, sequence) == 'end' + END and sequence.shared == len(
    sequence.tokens
  )
  for row, name in (
    ({'id': 'bad', 'conversations': [message('user', 'x')]}, "row 'bad'"),
    ({}, 'row 0'),
    (3, 'row 0'),
  ):
    with pytest.raises(ValueError, match=name):
      encode(tokenizer, [row])
  with pytest.raises(ValueError, match="row 'd'.*split_turns"):
    encode(tokenizer, [dialogue()], loss_mask='all_assistant')


def test_tools_of_a_row_are_shown_by_the_template(tokenizer):
  tools = [
    {'type': 'function', 'function': {'name': 'find_order', 'description': '', 'parameters': {}}}
  ]
  plain, shown = encode(tokenizer, [dialogue(), dialogue(tools=tools)])
  assert '<tools>' in tokenizer.decode(shown.tokens) and '<tools>' not in tokenizer.decode(
    plain.tokens
  )
  assert trained_text(tokenizer, shown) == trained_text(tokenizer, plain)


def test_a_row_for_every_turn_and_only_its_target_thinks(tokenizer):
  rows = split([dialogue(tools=['t']), one_turn(5)])
  assert [row.id for row in rows] == ['d/0', 'd/1', 'd/2', 5] and all(
    row.tools == ['t'] for row in rows[:3]
  )
  assert [len(row.messages) for row in rows] == [3, 5, 7, 2]
  targets = [row.messages[-1].content for row in rows[:3]]
  assert targets == [
    '<think>\nx\n</think>\n\n[find_order()]',
    '<think>\ny\n</think>\n\npaid',
    'end',
  ]
  for row in rows[:3]:
    earlier = [m.content for m in row.messages[:-1] if m.role == 'assistant']
    assert earlier == ['[find_order()]', 'paid'][: len(earlier)]
  for mask in ('final', 'all_assistant'):  # split rows are prefix-stable
    plain = [dataclasses.replace(row, tools=None) for row in rows]
    sft_rows.encode_rows(tokenizer, plain, loss_mask=mask)
  with pytest.raises(ValueError, match="row 'q' cannot be split"):
    split([{'id': 'q', 'conversations': [message('user', 'x')]}])
  with pytest.raises(ValueError, match="row 'q' has no readable conversation"):
    split([{'id': 'q', 'conversations': [{'role': 'user'}]}])


def test_system_prompts_are_added_and_stock_ones_replaced_only_if_asked():
  bare = one_turn(0)
  with_rules = dialogue()
  stock = one_turn(1)
  stock['conversations'].insert(0, message('system', 'You are a helpful assistant.'))
  rows = sft_rows.parse_rows([bare, with_rules, stock])

  def heads(rows):
    return [row.messages[0].content for row in rows]

  assert sft_rows.with_system_prompt(rows, '') == rows
  assert heads(sft_rows.with_system_prompt(rows, 'Act.')) == [
    'Act.',
    'rules',
    'You are a helpful assistant.',
  ]
  replaced = sft_rows.with_system_prompt(rows, 'Act.', ('You are a helpful assistant.',))
  assert heads(replaced) == ['Act.', 'rules', 'Act.'] and len(replaced[2].messages) == 3
  assert rows == sft_rows.parse_rows([bare, with_rules, stock])  # what was given is not changed
  with pytest.raises(ValueError, match='sft.system_prompt is empty'):
    sft_rows.with_system_prompt(rows, '', ('stock',))


def test_every_field_of_the_config_is_obeyed(tmp_path):
  path = tmp_path / 'rows.jsonl'
  xlam = {
    'id': 1,
    'query': 'q',
    'tools': '[{"name": "f", "parameters": {}}]',
    'answers': '[{"name": "f", "arguments": {}}]',
  }
  path.write_text('\n'.join(map(json.dumps, [dialogue(), xlam, xlam | {'answers': '[]'}])))

  def load(**changes):
    config = default_config().sft
    config.update(dict(files=(str(path),), unreadable='drop') | changes)
    return sft_rows.training_rows(config, tmp_path)

  rows, unreadable = load()
  assert [row.id for row in rows] == ['d', '1'] and unreadable == 1
  with pytest.raises(ValueError, match='row 2'):
    load(unreadable='error')
  assert [row.id for row in load(max_rows=1)[0]] == ['d']
  # Rows are counted as they are published.
  assert [row.id for row in load(split_turns=True, max_rows=1)[0]] == ['d/0', 'd/1', 'd/2']
  assert load(call_style='hermes')[0][1].tools and rows[1].tools is None
  assert load(call_style='hermes', system_prompt='Act.')[0][1].messages[0] == Message(
    'system', 'Act.'
  )
  replaced = load(system_prompt='Act.', stock_system_prompts=('rules',))[0][0]
  assert replaced.messages[0] == Message('system', 'Act.')
  with pytest.raises(ValueError, match='run the stage distill first'):
    load(files=())
  (tmp_path / 'distill').mkdir()
  (tmp_path / 'distill' / 'rows.jsonl').write_text(json.dumps(one_turn(4)) + '\n')
  with pytest.raises(ValueError, match='has not ended'):
    load(files=())
  (tmp_path / 'distill' / 'distill.json').write_text('{}')
  assert load(files=()) == (sft_rows.parse_rows([one_turn(4)]), 0)


def test_long_rows_are_counted_and_dropped_or_an_error_but_never_cut(tokenizer, caplog):
  rows = sft_rows.parse_rows(
    [one_turn(0), one_turn('long', 'find ' * 50), one_turn('longer', 'find ' * 60)]
  )
  sequences = sft_rows.encode_rows(tokenizer, rows, capacity=40)
  assert (
    "2 of 3 rows are longer than sft.capacity = 40 tokens; the longest, 'longer', has"
    in caplog.text
  )
  tree = tokentree.pack(sequences, 40)
  assert tree.dropped == [1, 2] and len(tree.paths[0]) == len(sequences[0].tokens)
  with pytest.raises(ValueError, match="the longest, 'longer'"):
    sft_rows.encode_rows(tokenizer, rows, capacity=40, overlong='error')
  assert len(sft_rows.encode_rows(tokenizer, rows[:1], capacity=40, overlong='error')) == 1
  for option in (dict(overlong='truncate'), dict(loss_mask='last')):
    with pytest.raises(ValueError, match=f'sft.{next(iter(option))}'):
      sft_rows.encode_rows(tokenizer, rows, **option)


# --- slips of the released code -------------------------------------------------------------------


@pytest.mark.parametrize('loss_mask', ['final', 'final+structure'])
def test_the_loss_is_divided_by_what_is_trained(tokenizer, loss_mask):
  """Released: earlier answers have weight 1 and no label, so that they dilute the loss of a
  multi-turn row.
  """
  rows = split([dialogue()])
  sequences = sft_rows.encode_rows(tokenizer, rows, loss_mask=loss_mask)
  batch = next(iter(batches(sequences, BatchShape(rows=1), capacity=128, epochs=1, seed=0)))
  assert batch.weight.sum() == sum(sequence.weights.sum() for sequence in sequences)
  for row, sequence in zip(rows, sequences, strict=True):
    answer = row.messages[-1].content
    structure = 3 * len(row.messages) - 2 if loss_mask == 'final+structure' else 0
    assert sequence.weights.sum() == len(tokenizer.encode(answer)) + 1 + structure


def test_a_tool_message_is_context(tokenizer):
  """Released: the content of every role but system, user and earlier assistant is trained, `tool`
  included.
  """
  rows = [
    {
      'id': 0,
      'conversations': [
        message('user', 'find'),
        message('assistant', '[find_order()]'),
        message('tool', 'paid'),
        message('assistant', 'end'),
      ],
    }
  ]
  for loss_mask, said in (('final', ['end']), ('all_assistant', ['[find_order()]', 'end'])):
    (sequence,) = encode(tokenizer, rows, loss_mask=loss_mask)
    assert trained_text(tokenizer, sequence) == ''.join(text + END for text in said)
    assert 'paid' in tokenizer.decode(sequence.tokens[sequence.weights == 0])


def test_rows_of_a_pack_never_see_each_other(tokenizer):
  """Released: system messages tell rows apart, and a pack of one row runs into the next.

  No row has a system message here.
  """
  rows = [
    one_turn(i, question)
    for i, question in enumerate(('find', 'cancel the order', 'ship it', 'go'))
  ]
  sequences = encode(tokenizer, rows)
  for merge in (True, False):
    tree = tokentree.pack(sequences, 128, merge=merge)
    assert tree.rows == 1 and not tree.dropped
    roots = set()
    for path, sequence in zip(tree.paths, sequences, strict=True):
      columns = path % tree.capacity
      roots.add(int(columns[0]))
      assert tree.parent[0, columns[0]] == -1
      np.testing.assert_array_equal(tree.position[0, columns], np.arange(len(columns)))
      for depth, query in enumerate(
        columns
      ):  # it sees what stands before it in its own row, and nothing else
        keys = np.flatnonzero((np.arange(tree.capacity) <= query) & (query < tree.end[0]))
        np.testing.assert_array_equal(keys, columns[: depth + 1])
        np.testing.assert_array_equal(tree.tokens[0, keys], sequence.tokens[: depth + 1])
    assert len(roots) == len(rows)  # a header of three tokens is not worth sharing


def test_packs_and_their_order_come_from_the_seed_alone(tokenizer):
  """Released: groups are shuffled by unseeded generators, so that no pack can be made again."""
  rows = split([dialogue(str(i)) for i in range(3)])
  rows += sft_rows.parse_rows([one_turn(i, 'find ' * i) for i in range(1, 12)])

  def epoch(seed, disturbance):
    random.seed(disturbance)
    np.random.seed(disturbance)
    sequences = sft_rows.encode_rows(tokenizer, rows)
    return [
      batch.tokens.tobytes()
      for batch in batches(sequences, BatchShape(rows=1), capacity=64, epochs=2, seed=seed)
    ]

  assert epoch(0, 1) == epoch(0, 2) != epoch(1, 1)


# --- the published sample -------------------------------------------------------------------------


@pytest.fixture(scope='module')
def qwen(data_dir):
  return transformers.AutoTokenizer.from_pretrained(data_dir / 'qwen3-tokenizer')


def test_packing_the_published_rows_trains_the_messages_of_the_published_pack(data_dir, qwen):
  rows = json.loads((data_dir / 'dcore_sft_sample' / 'rows.json').read_text())
  (pack,) = map(
    json.loads, (data_dir / 'dcore_sft_sample' / 'packed_16k.jsonl').read_text().splitlines()
  )
  assert [len(row['conversations']) for row in rows] == [5, 7] and pack['single_conv_last_idx'] == [
    4,
    11,
  ]
  tree = tokentree.pack(encode(qwen, rows, capacity=16384, overlong='error'), 16384)
  assert tree.rows == 1
  finals = []
  for row, path in zip(rows, tree.paths, strict=True):
    columns = path[tree.weight.reshape(-1)[path] > 0]
    answer = qwen.decode(tree.tokens.reshape(-1)[columns]).removesuffix(END)
    start = finals[-1] + 1 if finals else 0  # where the row begins in the pack
    finals.append(start + [m['content'] for m in row['conversations']].index(answer))
    assert pack['conversations'][finals[-1]]['content'] == answer
  assert finals == pack['single_conv_last_idx']


def test_structure_of_the_published_rows(data_dir, qwen):
  """Start, end and newline of every message and all of the answer, as released; only the row's
  first token is not predicted.
  """
  rows = json.loads((data_dir / 'dcore_sft_sample' / 'rows.json').read_text())
  for row, sequence in zip(rows, encode(qwen, rows, loss_mask='final+structure'), strict=True):
    released_tokens = []
    released_labels = []
    for index, item in enumerate(row['conversations']):
      content = qwen.encode(item['content'])
      head = [151644, *qwen.encode(item['role']), *qwen.encode('\n')]
      tail = [151645, *qwen.encode('\n')]
      released_tokens += [*head, *content, *tail]
      answer = index == len(row['conversations']) - 1
      released_labels += [1] + [0] * (len(head) - 1) + [int(answer)] * len(content) + [1, 1]
    assert sequence.tokens.tolist() == released_tokens
    assert sequence.weights.tolist() == [0, *released_labels[1:]]
