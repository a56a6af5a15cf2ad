"""Our Qwen3 template against the official one, and what templates of other families write around a
message.
"""

import json
import random

import pytest
import transformers

from dcore_jax.chat import examples, template
from dcore_jax.chat.messages import Message
from dcore_jax.organism.tokenizer import build_tokenizer

TEXTS = [
  'Hello.',
  '',
  '\n\nlead',
  'trail\n\n',
  '<think>\nwhy\n</think>\n\nBecause.',
  '<think>\n\n</think>\n\n',
  'a</think>b</think>\nc',
  '<think>x<think>\n\ny\n\n</think>\n\n\nz',
  'open <think> only',
  '<tool_response>\n1\n</tool_response>',
  '<tool_response> half',
  '北京 "quoted" <b>&amp;</b>',
  '[f(a=1)]',
  '</think>',
  '<think>\n</think>',
]
TOOLS = [
  {
    'type': 'function',
    'function': {
      'name': 'f',
      'description': "It's <b> & 'c'",
      'parameters': {'type': 'object', 'properties': {'a': {'type': 'integer'}}, 'required': ['a']},
    },
  },
  {'name': 'größe', 'parameters': {}},
]
CALLS = [
  {'type': 'function', 'function': {'name': 'f', 'arguments': {'a': 1, 'b': ['<x>', None, 'é']}}},
  {'name': 'g.h', 'arguments': '{"raw": true}'},
  {'function': {'name': 'i', 'arguments': {}}},
]


@pytest.fixture(scope='module')
def tokenizer(data_dir):
  return transformers.AutoTokenizer.from_pretrained(data_dir / 'qwen3-tokenizer')


def random_conversation(rng: random.Random) -> list[dict]:
  messages = [{'role': 'system', 'content': rng.choice(TEXTS)}] if rng.random() < 0.5 else []
  for _ in range(rng.randint(1, 7)):
    role = rng.choices(['user', 'assistant', 'tool', 'system'], [4, 5, 3, 0.5])[0]
    message = {'role': role, 'content': rng.choice(TEXTS)}
    if role == 'assistant':
      if rng.random() < 0.3:
        message['tool_calls'] = rng.sample(CALLS, rng.randint(0, 3))
      if rng.random() < 0.25:
        message['reasoning_content'] = rng.choice(['', '\n', '\nthoughts\n\n', 'more', None])
    if role != 'system' and rng.random() < 0.05:
      message['content'] = None
    messages.append(message)
  return messages


def test_renders_what_the_official_template_renders(tokenizer, data_dir):
  official = json.loads((data_dir / 'qwen3-tokenizer' / 'tokenizer_config.json').read_text())[
    'chat_template'
  ]
  ours = template.qwen3_template()
  assert ours != official
  rng = random.Random(0)
  for _ in range(1500):
    messages = random_conversation(rng)
    options = {
      'tools': rng.choice([None, None, TOOLS, TOOLS[:1]]),
      'add_generation_prompt': rng.random() < 0.5,
    }
    options |= rng.choice([{}, {'enable_thinking': False}, {'enable_thinking': True}])
    want, got = [
      tokenizer.apply_chat_template(messages, chat_template=text, tokenize=False, **options)
      for text in (official, ours)
    ]
    assert got == want, (messages, options)


CHAT = [
  Message('system', 'Be brief.'),
  Message('user', 'Weather?'),
  Message('assistant', "<think>\nold thoughts\n</think>\n\n[weather(city='Rome')]"),
  Message('user', '<tool_response>\nsunny\n</tool_response>'),
  Message('user', 'So?'),
  Message('assistant', '<think>\n\nIt said sunny.</think>\n\nSunny.'),
]


def test_prompt_ends_where_the_assistant_speaks(tokenizer):
  prompt = template.render_prompt(tokenizer, CHAT[:-1])
  assert prompt.endswith('<|im_start|>user\nSo?<|im_end|>\n<|im_start|>assistant\n')
  assert 'old thoughts' not in prompt and "[weather(city='Rome')]" in prompt


def test_prompt_shows_tools(tokenizer):
  prompt = template.render_prompt(tokenizer, CHAT[:2], TOOLS)
  assert (
    '<tools>' in prompt
    and '"name": "größe"' in prompt
    and '<tools>' not in template.render_prompt(tokenizer, CHAT[:2])
  )


# What DeepSeek-Coder writes: no token begins a turn, and a newline stands before the one that ends
# it.
CODER = (
  "{%- for m in messages -%}{{- ('### Response:\n' + m.content + '\n<|EOT|>\n')"
  " if m.role == 'assistant' else "
  "'### Instruction:\n' + m.content + '\n' -}}{%- endfor -%}"
  "{{- '### Response:\n' if add_generation_prompt -}}"
)


def other_family(text: str, special: list[str]):
  tokenizer = build_tokenizer(['words'], 400)
  tokenizer.add_special_tokens({'additional_special_tokens': special})
  tokenizer.chat_template = text
  return tokenizer


def test_turn_format_is_read_off_the_template(tokenizer, llama):
  qwen = template.turn_format(tokenizer)
  assert qwen == template.TurnFormat(
    '<|im_end|>', 151645, '', '\n', {151644: '<|im_start|>', 151645: '<|im_end|>'}
  )
  organism = template.turn_format(build_tokenizer(['words'], 400))
  assert (organism.end_of_turn, organism.before, organism.after) == ('<|im_end|>', '', '\n')
  other = template.turn_format(llama)
  assert (other.end_of_turn, other.before, other.after) == ('<|eot_id|>', '', '')
  assert set(other.delimiters.values()) == {
    '<|eot_id|>',
    '<|start_header_id|>',
    '<|end_header_id|>',
  }
  coder = template.turn_format(other_family(CODER, ['<|EOT|>']))
  assert (coder.end_of_turn, coder.before, coder.after) == ('<|EOT|>', '\n', '\n')


# A call as Llama 3.1 writes it.
UNTAGGED = (
  '{%- for m in messages -%}{{- m.content -}}{%- for c in m.tool_calls or [] -%}'
  '{{- \'{"name": "\' + c.function.name + \'", "parameters": \''
  " + (c.function.arguments | tojson) + '}' -}}"
  "{%- endfor -%}{{- '<|eot_id|>' -}}{%- endfor -%}"
)
NAME_FIRST = '<tool_call>\n{"name": "'


@pytest.mark.parametrize('name,begun', [('f', NAME_FIRST + 'f", "arguments":'), (None, NAME_FIRST)])
def test_a_begun_call_is_what_the_template_writes_up_to_there(tokenizer, data_dir, name, begun):
  """By Qwen3's own template and ours; what follows is tokenized as if the model had written all of
  it.
  """
  config = json.loads((data_dir / 'qwen3-tokenizer' / 'tokenizer_config.json').read_text())
  records = [message.to_json() for message in CHAT[:-1]]
  call = '{"name": "f", "arguments": {"a": 1}}\n</tool_call><|im_end|>\n'
  for tokenizer.chat_template in (template.qwen3_template(), config['chat_template']):
    text, said = template.render_begun_call(tokenizer, records, TOOLS, name)
    assert said == begun
    assert text == template.render_records(tokenizer, records, TOOLS, enable_thinking=False) + begun
    whole = text.removesuffix(begun) + '<tool_call>\n' + call
    ids = tokenizer(text)['input_ids']
    assert tokenizer(whole)['input_ids'][: len(ids)] == ids


def test_calls_that_would_not_be_read_are_not_begun(llama):
  """Llama's calls have no tags, DeepSeek-Coder's template shows none; what a user writes is no
  call.
  """
  records = [
    {'role': 'user', 'content': f'{NAME_FIRST}probe_name", "arguments": {{}}}}</tool_call>'}
  ]
  for other in (llama, other_family(UNTAGGED, ['<|eot_id|>']), other_family(CODER, ['<|EOT|>'])):
    for name in ('f', None):
      with pytest.raises(ValueError, match='does not write calls as <tool_call>'):
        template.render_begun_call(other, records, TOOLS, name)


DEFAULT = '{%- for m in messages -%}{{- m.content + "<|im_end|>" -}}{%- endfor -%}'
TOOL_USE = '{{- "tools: " -}}' + DEFAULT


@pytest.mark.parametrize('form', ['dict', 'list'])
def test_a_tokenizer_with_several_templates(form):
  tokenizer = other_family('', [])

  def give(**templates):
    entries = [{'name': name, 'template': text} for name, text in templates.items()]
    tokenizer.chat_template = templates if form == 'dict' else entries

  give(rag='{{- 0/0 -}}', tool_use=TOOL_USE, default=DEFAULT)
  asked = [Message('user', 'hi')]
  assert template.render_prompt(tokenizer, asked) == 'hi<|im_end|>'
  assert template.render_prompt(tokenizer, asked, []) == 'hi<|im_end|>'
  assert template.render_prompt(tokenizer, asked, TOOLS) == 'tools: hi<|im_end|>'
  assert template.template_text(tokenizer, TOOLS) == TOOL_USE
  assert template.turn_format(tokenizer).end_of_turn == '<|im_end|>'
  tokens, _ = examples.encode_example(tokenizer, [*asked, Message('assistant', 'a')], tools=TOOLS)
  assert tokenizer.decode(tokens) == 'tools: hi<|im_end|>a<|im_end|>'
  give(tool_use=TOOL_USE, default=template.qwen3_template())
  with pytest.raises(ValueError, match='does not write calls'):
    template.render_begun_call(tokenizer, [asked[0].to_json()], TOOLS)
  give(default=DEFAULT, rag='{{- 0/0 -}}')
  assert template.render_prompt(tokenizer, asked, TOOLS) == 'hi<|im_end|>'
  give(rag=DEFAULT)
  assert template.render_prompt(tokenizer, asked) == 'hi<|im_end|>'
  give(rag=DEFAULT, tool_use=TOOL_USE)
  with pytest.raises(ValueError, match=r"templates \['rag', 'tool_use'\], and 'default'"):
    template.render_prompt(tokenizer, asked)


def test_bad_tokenizers():
  class Bare:
    chat_template = None

  with pytest.raises(ValueError, match='at least one message'):
    template.render_prompt(Bare(), [])
  for call in (lambda: template.render_prompt(Bare(), CHAT), lambda: template.turn_format(Bare())):
    with pytest.raises(ValueError, match='no chat template'):
      call()
  with pytest.raises(ValueError, match='holds no special token'):
    template.turn_format(
      other_family("{% for m in messages %}{{ m.content + ' / ' }}{% endfor %}", [])
    )
  with pytest.raises(ValueError, match="writes ' stop' between"):
    template.turn_format(
      other_family("{% for m in messages %}{{ m.content + ' stop<|im_end|>' }}{% endfor %}", [])
    )
