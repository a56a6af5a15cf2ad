"""Which tokens carry loss: the answer, the structure around messages, or every answer; and none of
the published slips.
"""

import numpy as np
import pytest

from dcore_jax.chat import examples
from dcore_jax.chat.examples import cut_example, encode_example, encode_pieces
from dcore_jax.chat.messages import Message
from dcore_jax.chat.template import qwen3_template, render_prompt, turn_format
from dcore_jax.organism.tokenizer import build_tokenizer
from dcore_jax.organism.vocabulary import sample_texts

CHAT = [
  Message('system', 'Be brief.'),
  Message('user', 'Weather?'),
  Message('assistant', "[weather(city='Rome')]"),
  Message('tool', 'sunny'),
  Message('assistant', 'Sunny.'),
  Message('user', 'So?'),
  Message('assistant', '<think>\nIt said sunny.\n</think>\n\nGo out.'),
]


@pytest.fixture(scope='module')
def tokenizer():
  return build_tokenizer(sample_texts(), 640)


def trained(tokenizer, tokens, weights):
  """The stretches of text that carry loss."""
  assert (
    tokens.dtype == np.int32 and weights.dtype == np.float32 and set(weights.tolist()) <= {0, 1}
  )
  cuts = np.flatnonzero(np.diff(weights)) + 1
  parts = zip(np.split(tokens, cuts), np.split(weights, cuts), strict=True)
  return [tokenizer.decode(part) for part, weight in parts if weight[0]]


def test_final_is_the_prompt_then_the_content_verbatim(tokenizer):
  tokens, weights = encode_example(tokenizer, CHAT)
  prompt = tokenizer.encode(render_prompt(tokenizer, CHAT[:-1]), add_special_tokens=False)
  answer = tokenizer.encode(CHAT[-1].content, add_special_tokens=False)
  assert tokens.tolist() == [
    *prompt,
    *answer,
    tokenizer.eos_token_id,
  ]  # the prompt as sampling starts from it
  assert weights.tolist() == [0] * len(prompt) + [1] * (len(answer) + 1)


def test_final_and_structure_is_what_the_released_code_supervises(tokenizer):
  tokens, weights = encode_example(tokenizer, CHAT, 'final+structure')
  text = tokenizer.decode(tokens)
  assert text == render_prompt(tokenizer, CHAT[:-1]) + CHAT[-1].content + '<|im_end|>\n'
  # System, user, assistant and tool turns alike; nothing predicts the first start.
  between = ['<|im_end|>\n<|im_start|>'] * (len(CHAT) - 1)
  assert trained(tokenizer, tokens, weights) == [*between, CHAT[-1].content + '<|im_end|>\n']


def test_final_and_structure_of_another_family(llama):
  tokens, weights = encode_example(llama, CHAT, 'final+structure')
  # The header that asks for an answer is structure; its two newlines belong to the prompt that
  # sampling starts from.
  parts = trained(llama, tokens, weights)
  assert (
    parts[:3] == ['<|start_header_id|>', '<|end_header_id|>', '<|eot_id|><|start_header_id|>']
    and len(parts) == 15
  )
  assert parts[-2:] == ['<|end_header_id|>', CHAT[-1].content + '<|eot_id|>']
  assert trained(llama, *encode_example(llama, CHAT)) == [CHAT[-1].content + '<|eot_id|>']


@pytest.mark.parametrize('family', ['tokenizer', 'llama'])
def test_all_assistant_trains_every_answer(family, request):
  tokenizer = request.getfixturevalue(family)
  end = turn_format(tokenizer).end_of_turn
  tokens, weights = encode_example(tokenizer, CHAT, 'all_assistant')
  assert trained(tokenizer, tokens, weights) == [
    m.content + end for m in CHAT if m.role == 'assistant'
  ]
  assert tokenizer.decode(tokens) == render_prompt(tokenizer, CHAT[:-1]) + CHAT[-1].content + end


def test_white_space_before_the_end_of_turn_is_trained_with_the_answer():
  tokenizer = build_tokenizer(sample_texts(), 640)
  tokenizer.chat_template = (
    "{%- for m in messages -%}{{- m.role + ':\n' + m.content + '\n<|im_end|>\n' -}}{%- endfor -%}"
    "{{- 'assistant:\n' if add_generation_prompt -}}"
  )
  tokens, weights = encode_example(tokenizer, CHAT)
  assert trained(tokenizer, tokens, weights) == [CHAT[-1].content + '\n<|im_end|>']
  tokens, weights = encode_example(tokenizer, CHAT, 'final+structure')
  assert (
    tokenizer.decode(tokens)
    == render_prompt(tokenizer, CHAT[:-1]) + CHAT[-1].content + '\n<|im_end|>\n'
  )


@pytest.mark.parametrize('loss_mask', ['final', 'final+structure', 'all_assistant'])
def test_tool_messages_are_never_trained(tokenizer, llama, loss_mask):
  """The released tokenization trains the content of every role it does not know, as of `tool`."""
  for family in (tokenizer, llama):
    tokens, weights = encode_example(family, CHAT, loss_mask)
    where = family.decode(tokens).index('sunny')
    starts = np.cumsum([0, *(len(family.decode([token])) for token in tokens)])
    inside = (starts[:-1] >= where) & (starts[:-1] < where + len('sunny'))
    assert inside.any() and not weights[inside].any()


def test_the_denominator_holds_trained_tokens_only(tokenizer):
  """The released loss divides by the content tokens of earlier answers too, which have no loss."""
  turns = turn_format(tokenizer)
  final = len(tokenizer.encode(CHAT[-1].content)) + 1
  assert encode_example(tokenizer, CHAT)[1].sum() == final
  # Structure: start, end and newline of seven messages, without the first start and with the
  # answer's own end counted once.
  assert encode_example(tokenizer, CHAT, 'final+structure')[1].sum() == final + 3 * len(CHAT) - 2
  answers = [len(tokenizer.encode(m.content)) + 1 for m in CHAT if m.role == 'assistant']
  assert encode_example(tokenizer, CHAT, 'all_assistant')[1].sum() == sum(answers)
  assert turns.end_of_turn_id == tokenizer.eos_token_id


def test_a_template_that_rewrites_earlier_messages_is_refused(tokenizer):
  thoughts = [*CHAT[:2], Message('assistant', '<think>\nRome?\n</think>\n\nOslo.'), *CHAT[5:]]
  with pytest.raises(ValueError, match='does not render message 2 as it is.*split_turns'):
    encode_example(tokenizer, thoughts, 'all_assistant')
  assert encode_example(tokenizer, thoughts)[
    1
  ].sum()  # nothing but the last answer is trained: what precedes may be rewritten
  # Thoughts since the last question are replayed; once another question follows, they are not.
  acting = [
    *CHAT[:2],
    Message('assistant', '<think>\na\n</think>\n\nb'),
    Message('user', '<tool_response>\nc\n</tool_response>'),
    Message('assistant', 'd'),
  ]
  assert len(trained(tokenizer, *encode_example(tokenizer, acting, 'all_assistant'))) == 2
  with pytest.raises(ValueError, match='does not render message 2|not prefix-stable'):
    encode_example(tokenizer, [*acting, *CHAT[5:]], 'all_assistant')
  unstable = build_tokenizer(sample_texts(), 640)
  unstable.chat_template = '{{- messages | length ~ " messages" -}}' + qwen3_template()
  with pytest.raises(ValueError, match='not prefix-stable: what comes before message 2'):
    encode_example(unstable, CHAT, 'all_assistant')


@pytest.mark.parametrize(
  ('messages', 'loss_mask', 'reason'),
  [
    ([], 'final', 'got none'),
    (CHAT[:-1], 'final', "role 'user'"),
    (CHAT[-1:], 'final', 'a message before'),
    ([CHAT[1], Message('assistant', 'ab<|im_end|>c')], 'final', 'at character 2'),
    (
      [CHAT[1], Message('assistant', 'a<|im_end|>'), *CHAT[1:3]],
      'all_assistant',
      'message 1 holds',
    ),
    ([CHAT[2], *CHAT[1:3]], 'all_assistant', 'nothing comes before'),
    (CHAT, 'last', "unknown loss_mask 'last'"),
  ],
)
def test_bad_examples(tokenizer, messages, loss_mask, reason):
  with pytest.raises(ValueError, match=reason):
    encode_example(tokenizer, messages, loss_mask)


def test_many_examples_have_the_tokens_of_each_alone(tokenizer, monkeypatch):
  monkeypatch.setattr(examples, '_BATCH', 3)  # a batch ends inside an example
  turns = turn_format(tokenizer)
  for loss_mask in examples.LOSS_MASKS:
    chats = [CHAT[:size] for size in (3, 5, 7)] * 2
    together = encode_pieces(
      tokenizer,
      turns,
      [cut_example(tokenizer, turns, chat, loss_mask) for chat in chats],
      loss_mask,
    )
    for chat, (tokens, weights) in zip(chats, together, strict=True):
      alone = encode_example(tokenizer, chat, loss_mask)
      np.testing.assert_array_equal(tokens, alone[0])
      np.testing.assert_array_equal(weights, alone[1])
