"""Servers of a fleet without a model: threads of this process that answer as a script says."""

import contextlib
import http.server
import json
import threading

import numpy as np

from dcore_jax.models.hf_checkpoint import load_params

STOP = 5
VOCAB = 37
LOGPROB = -1.25


def draw(prompt, seed, limit, vocab=VOCAB, stop=STOP):
  """What a fake draws: it follows from what is asked alone."""
  rng = np.random.default_rng([seed, *prompt])
  tokens = rng.integers(6, vocab, rng.integers(1, 12)).tolist() + [stop]
  return tokens[:limit]


class FakeServer:
  """One server; `answer` may be replaced to lie, and `gate` holds its answers back.

  Attributes:
    version: of its weights; 0 as it starts.
    asked: (prompt, seed, version) of each request that came.
    taken: the versions that it was given.
    folder: where published weights are read; None: it takes none.
  """

  def __init__(self, folder, key='k', port=0, *, tells_versions=True, vocab=VOCAB, stop=STOP):
    self.version = 0
    self.asked = []
    self.taken = []
    self.answers = 0
    self.gate = threading.Event()
    self.gate.set()
    self.folder = folder
    self.key = key
    self.tells_versions = tells_versions
    self.vocab = vocab
    self.stop = stop
    self.answer = self.honest
    self.card = {'id': 'm', 'object': 'model', 'created': 0, 'owned_by': 'x', 'max_model_len': 96}
    self.last_params = None
    server = self

    class Handler(http.server.BaseHTTPRequestHandler):
      def do_GET(self):
        self.reply(200, {'object': 'list', 'data': [server.card]})

      def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers['content-length'])))
        if self.headers.get('authorization') != f'Bearer {server.key}':
          self.reply(401, {'error': {'message': 'no key'}})
          return
        status, record = server.post(self.path, body)
        # The client may have gone meanwhile: somebody else was faster.
        with contextlib.suppress(OSError):
          self.reply(status, record)

      def reply(self, status, record):
        data = record if isinstance(record, bytes) else json.dumps(record).encode()
        self.send_response(status)
        self.send_header('Content-Type', 'application/json')
        self.send_header('Content-Length', str(len(data)))
        self.end_headers()
        self.wfile.write(data)

      def log_message(self, *_):
        pass

    self._server = http.server.ThreadingHTTPServer(('127.0.0.1', port), Handler)
    self._server.daemon_threads = True
    self.port = self._server.server_address[1]
    self.url = f'http://127.0.0.1:{self.port}/v1'
    self._thread = threading.Thread(target=self._server.serve_forever, args=[0.01], daemon=True)
    self._thread.start()

  def post(self, path, body):
    if path == '/update_weights':
      if self.folder is None:
        return 404, {'error': {'message': 'there is no such path'}}
      # As our server does, the weights are read before the answer.
      self.last_params = load_params(self.folder / body['path'])[1]
      self.version = body['version']
      self.taken.append(self.version)
      return 200, {'version': self.version}
    self.asked.append((tuple(body['prompt']), body['seed'], self.version))
    assert body['return_token_ids'] and body['logprobs'] == 0 and body['top_p'] == 1.0
    self.gate.wait()
    self.answers += 1
    return self.answer(body)

  def draw(self, body):
    return draw(body['prompt'], body['seed'], body['max_tokens'], self.vocab, self.stop)

  def honest(self, body):
    tokens = self.draw(body)
    choice = {
      'index': 0,
      'text': '',
      'finish_reason': 'stop' if tokens[-1] == self.stop else 'length',
      'token_ids': tokens,
      'prompt_token_ids': body['prompt'],
      'logprobs': {'token_logprobs': [LOGPROB] * len(tokens)},
    }
    if self.tells_versions:
      choice['weight_versions'] = [self.version] * len(tokens)
    return 200, {'id': 'x', 'object': 'text_completion', 'created': 0, 'model': 'm'} | {
      'choices': [choice]
    }

  def close(self):
    """As a kill does: nobody listens, and who waits gets nothing."""
    self.gate.set()
    self._server.shutdown()
    self._server.server_close()
