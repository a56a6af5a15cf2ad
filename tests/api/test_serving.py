"""A model behind a server of this process, and in a terminal."""

import socket
import threading

import openai
import pytest

import dcore_jax


def engine_threads():
  return {thread for thread in threading.enumerate() if thread.name == 'engine'}


def test_a_model_is_served_and_taken_back(organism):
  # Other tests of this process may have a server of their own under way.
  before = engine_threads()
  server = dcore_jax.serve_model(
    organism, port=0, name=['small', 'other'], lanes=2, background=True, api_key='secret'
  )
  try:
    assert len(engine_threads() - before) == 1
    with openai.OpenAI(base_url=server.url, api_key='guessed', max_retries=0) as client:
      with pytest.raises(openai.AuthenticationError):
        client.models.list()
    with openai.OpenAI(base_url=server.url, api_key='secret', max_retries=0) as client:
      assert [model.id for model in client.models.list()] == ['small', 'other']
      choice = client.completions.create(model='small', prompt='find the order', max_tokens=4)
      assert choice.usage.completion_tokens == 4
  finally:
    server.close()
  assert engine_threads() <= before
  with pytest.raises(openai.APIConnectionError):
    with openai.OpenAI(base_url=server.url, api_key='none', max_retries=0) as client:
      client.models.list()


def test_a_port_that_is_taken_is_named(tiny):
  with pytest.raises(ValueError, match='port = 65536'):
    dcore_jax.serve_model(tiny, port=65536, background=True)
  with socket.socket() as taken:
    taken.bind(('127.0.0.1', 0))
    taken.listen()
    port = taken.getsockname()[1]
    with pytest.raises(OSError, match=f'listen on 127.0.0.1:{port}'):
      dcore_jax.serve_model(tiny, port=port, lanes=2, background=True)


def test_others_are_served_only_with_a_key(tiny):
  for host in ('0.0.0.0', '::', 'example.org'):
    with pytest.raises(ValueError, match='may be reached by others.*api_key'):
      dcore_jax.serve_model(tiny, host=host, port=0, background=True)


def test_a_conversation_in_the_terminal(organism, capsys):
  lines = ['find the order of Mora.', '/new', '/nonsense']
  dcore_jax.chat_with(organism, system='Be brief.', lines=lines, max_tokens=1, temperature=0)
  said = capsys.readouterr().out
  assert 'Ctrl-D ends the program' in said and 'the budget is used up' in said
  assert 'there is no /nonsense' in said


def test_what_is_typed_ends_with_the_input(organism, capsys, monkeypatch):
  typed = iter(['/nonsense', KeyboardInterrupt, EOFError])

  def type_line(prompt):
    line = next(typed)
    if isinstance(line, str):
      return line
    raise line

  monkeypatch.setattr('builtins.input', type_line)
  dcore_jax.chat_with(organism, world='toolworld', kind='single')
  assert 'there is no /nonsense' in capsys.readouterr().out
  with pytest.raises(ValueError, match="unknown world 'mars'"):
    dcore_jax.chat_with(organism, world='mars')
