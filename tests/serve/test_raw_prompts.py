"""Prompts of completions, which no template has rendered."""

import json
import urllib.request

import tokenizers
from tokenizers import processors

from dcore_jax.organism.tokenizer import build_tokenizer
from dcore_jax.organism.vocabulary import sample_texts
from dcore_jax.serve.openai_api import Limits, Service
from dcore_jax.serve.scheduler import Scheduler
from tests.serve.servers import ScriptedEngine, running

BEGIN = '<|begin_of_text|>'
USER = [{'role': 'user', 'content': 'find it'}]


def tokenizer_with_begin(puts_it: bool):
  tokenizer = build_tokenizer(sample_texts(), 600)
  tokenizer.add_special_tokens({'bos_token': BEGIN})
  if puts_it:
    core = tokenizer.backend_tokenizer
    assert isinstance(core, tokenizers.Tokenizer)
    core.post_processor = processors.TemplateProcessing(
      single=f'{BEGIN} $A', special_tokens=[(BEGIN, tokenizer.bos_token_id)]
    )
  return tokenizer


def sent_prompts(tokenizer, bodies):
  engine = ScriptedEngine([*tokenizer('fine')['input_ids'], tokenizer.eos_token_id])
  service = Service(Scheduler(engine, 2), tokenizer, 'm', Limits(8))
  with running(service) as (url, _):
    for path, body in bodies:
      data = json.dumps({'model': 'm', 'max_tokens': 4, **body}).encode()
      request = urllib.request.Request(
        f'{url}/v1/{path}', data, {'Content-Type': 'application/json'}
      )
      with urllib.request.urlopen(request) as answer:
        assert answer.status == 200
  return engine.prompts


def test_a_completion_begins_as_the_tokenizer_begins_a_text():
  for puts_it in (True, False):
    tokenizer = tokenizer_with_begin(puts_it)
    plain = tokenizer('find it', add_special_tokens=False)['input_ids']
    begun = [tokenizer.bos_token_id, *plain]
    got = sent_prompts(
      tokenizer,
      [
        ('completions', {'prompt': 'find it'}),
        ('completions', {'prompt': BEGIN + 'find it'}),
        ('completions', {'prompt': [plain]}),
      ],
    )
    assert got == [begun if puts_it else plain, begun, plain]


def test_a_rendered_conversation_has_what_its_template_writes():
  tokenizer = tokenizer_with_begin(True)
  first = tokenizer.bos_token_id
  for head, count in (('', 0), (BEGIN, 1)):
    tokenizer.chat_template = head + '{{- messages[0].content -}}'
    [ids] = sent_prompts(tokenizer, [('chat/completions', {'messages': USER})])
    assert ids.count(first) == count


def test_a_template_of_several_takes_the_tools():
  tokenizer = build_tokenizer(sample_texts(), 600)
  tokenizer.chat_template = {
    'default': '{{- messages[0].content -}}',
    'tool_use': '{{- "tool " + messages[0].content -}}{%- if enable_thinking %}{%- endif -%}',
  }
  tool = {'type': 'function', 'function': {'name': 'f', 'parameters': {'type': 'object'}}}
  options = {'enable_thinking': False}
  got = sent_prompts(
    tokenizer,
    [
      ('chat/completions', {'messages': USER}),
      ('chat/completions', {'messages': USER, 'tools': [tool]}),
      (
        'chat/completions',
        {'messages': USER, 'tools': [tool], 'chat_template_kwargs': options},
      ),
    ],
  )
  assert [tokenizer.decode(ids) for ids in got] == ['find it', 'tool find it', 'tool find it']
