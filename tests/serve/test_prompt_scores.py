"""What teachers, trainers and multiple-choice benchmarks ask: ids and log-probabilities of prompts
and answers, on the organism.
"""

import numpy as np
import openai
import pytest

from tests.serve.test_openai_api import task_messages

PROMPT = 'the task is to find the order of'


@pytest.fixture
def client(served):
  url, _ = served
  with openai.OpenAI(base_url=f'{url}/v1', api_key='none', max_retries=0) as client:
    yield client


def complete(client, **asked):
  return client.completions.create(**{'model': 'organism', 'temperature': 0, **asked})


def test_an_echoed_prompt_has_the_log_probabilities_that_sampling_gives(client, organism):
  """The prompt and what it is answered, sent back as a prompt, score as they were sampled."""
  asked = dict(prompt=PROMPT, max_tokens=12, logprobs=1, extra_body={'return_token_ids': True})
  [sampled] = complete(client, **asked).choices
  ids = organism.tokenizer(PROMPT)['input_ids']
  assert sampled.prompt_token_ids == ids and len(sampled.token_ids) == 12
  whole = ids + sampled.token_ids
  answer = complete(client, prompt=whole, max_tokens=0, echo=True, logprobs=1)
  [choice] = answer.choices
  assert choice.text == organism.tokenizer.decode(whole) and choice.finish_reason == 'length'
  assert answer.usage.completion_tokens == 0 and answer.usage.prompt_tokens == len(whole)
  shown = choice.logprobs
  assert shown.tokens == [organism.tokenizer.decode([token]) for token in whole]
  assert shown.token_logprobs[0] is None and shown.top_logprobs[0] is None
  np.testing.assert_allclose(
    shown.token_logprobs[len(ids) :], sampled.logprobs.token_logprobs, atol=1e-4
  )
  for token, top in zip(shown.tokens[len(ids) :], shown.top_logprobs[len(ids) :], strict=True):
    assert max(top, key=top.get) == token  # it was sampled greedily
  assert [choice.text[start:][:1] for start in shown.text_offset] == [
    text[:1] for text in shown.tokens
  ]


def test_lm_evals_loglikelihood(client, organism):
  """Token ids of several lengths, one sampled token behind each: what the harness takes apart."""
  rows = [organism.tokenizer(text)['input_ids'] for text in (PROMPT, 'find the order', 'order')]
  asked = dict(max_tokens=1, logprobs=1, seed=1234, echo=True)
  answer = complete(client, prompt=rows, **asked)
  for row, choice in zip(rows, answer.choices, strict=True):
    lengths = {len(values) for values in (choice.logprobs.tokens, choice.logprobs.token_logprobs)}
    assert lengths == {len(row) + 1}
    assert all(number <= 0 for number in choice.logprobs.token_logprobs[1:])
    [alone] = complete(client, prompt=row, **asked).choices
    np.testing.assert_allclose(
      choice.logprobs.token_logprobs[1:], alone.logprobs.token_logprobs[1:], atol=1e-4
    )


def test_a_prompt_is_echoed_in_pieces_too(client):
  asked = dict(prompt=PROMPT, max_tokens=5, echo=True, logprobs=2)
  [whole] = complete(client, **asked).choices
  pieces = [piece.choices[0] for piece in complete(client, **asked, stream=True)]
  assert ''.join(piece.text for piece in pieces) == whole.text
  assert whole.text.startswith(PROMPT) and len(whole.text) > len(PROMPT)
  shown = [piece.logprobs for piece in pieces if piece.logprobs]
  assert [token for one in shown for token in one.tokens] == whole.logprobs.tokens
  assert [place for one in shown for place in one.text_offset] == whole.logprobs.text_offset
  plain = complete(client, prompt=PROMPT, max_tokens=0, echo=True, n=2)
  assert [one.text for one in plain.choices] == [PROMPT] * 2
  assert plain.choices[0].logprobs is None


def test_echo_and_the_prompts_own_field_have_as_many_alternatives_as_each_wants(client):
  asked = dict(prompt=PROMPT, max_tokens=1, echo=True, logprobs=1)
  [choice] = complete(client, **asked, extra_body={'prompt_logprobs': 3}).choices
  tables = choice.prompt_logprobs
  assert tables[0] is None and len(tables) == len(choice.logprobs.tokens) - 1
  assert {len(table) for table in tables[1:]} <= {3, 4}
  assert {len(top) for top in choice.logprobs.top_logprobs[1:]} <= {1, 2}


def test_prompt_log_probabilities_name_every_token_by_its_id(client, organism):
  ids = organism.tokenizer(PROMPT)['input_ids']
  body = {'prompt_logprobs': 0, 'return_token_ids': True}
  [choice] = complete(client, prompt=ids, max_tokens=0, extra_body=body).choices
  [echo] = complete(client, prompt=ids, max_tokens=0, echo=True, logprobs=0).choices
  assert choice.prompt_token_ids == ids and choice.token_ids == [] and choice.text == ''
  for token, table, logprob in zip(
    ids[1:], choice.prompt_logprobs[1:], echo.logprobs.token_logprobs[1:], strict=True
  ):
    [(name, entry)] = table.items()
    assert int(name) == token and entry['logprob'] == pytest.approx(logprob, abs=1e-5)
    assert entry['decoded_token'] == organism.tokenizer.decode([token]) and entry['rank'] >= 1


@pytest.mark.parametrize('stream', [False, True])
def test_chat_gives_the_ids_that_were_read_and_sampled(client, organism, stream):
  asked = dict(
    model='organism',
    messages=task_messages(),
    temperature=0,
    max_tokens=64,
    logprobs=True,
    extra_body={'return_token_ids': True, 'return_tokens_as_token_ids': True},
  )
  if stream:
    pieces = list(client.chat.completions.create(**asked, stream=True))
    prompt = pieces[0].prompt_token_ids
    choices = [piece.choices[0] for piece in pieces]
    ids = [token for one in choices for token in getattr(one, 'token_ids', None) or ()]
    names = [token.token for one in choices if one.logprobs for token in one.logprobs.content]
  else:
    answer = client.chat.completions.create(**asked)
    prompt = answer.prompt_token_ids
    ids = answer.choices[0].token_ids
    names = [token.token for token in answer.choices[0].logprobs.content]
  assert names == [f'token_id:{token}' for token in ids] and ids[-1] in organism.engine.stop_ids
  text = organism.tokenizer.apply_chat_template(
    asked['messages'], tokenize=False, add_generation_prompt=True
  )
  assert prompt == organism.tokenizer(text, add_special_tokens=False)['input_ids']


def test_chat_scores_its_prompt(client):
  asked = dict(model='organism', messages=task_messages(), max_tokens=1)
  answer = client.chat.completions.create(**asked, n=2, extra_body={'prompt_logprobs': 1})
  assert len(answer.prompt_logprobs) == answer.usage.prompt_tokens
  nothing = client.chat.completions.create(
    **asked | {'max_tokens': 0}, extra_body={'prompt_logprobs': 1}
  )
  assert nothing.choices[0].finish_reason == 'length' and nothing.usage.completion_tokens == 0
  assert nothing.prompt_logprobs[1].keys() == answer.prompt_logprobs[1].keys()


def test_an_echo_does_not_change_what_is_sampled(client):
  [alone] = complete(client, prompt=PROMPT, max_tokens=10, seed=2).choices
  both = complete(client, prompt=[PROMPT, 'find'], max_tokens=10, echo=True, logprobs=0, seed=2)
  assert both.choices[0].text == PROMPT + alone.text
