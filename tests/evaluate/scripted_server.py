"""A server that answers chats by a function, for suites that need a model they can predict."""

import contextlib
import http.server
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

# The body of a chat request -> its assistant message, or of a text request -> its text.
Answer = Callable[[dict[str, Any]], dict[str, Any] | str]


@contextlib.contextmanager
def scripted_server(answer: Answer) -> Iterator[str]:
  """Serves on a free port of this machine; yields the address, '/v1' included."""

  class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def do_GET(self):
      self._send({'object': 'list', 'data': [{'id': 'scripted', 'object': 'model'}]})

    def do_POST(self):
      body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
      found = answer(body)
      usage = {'prompt_tokens': 1, 'completion_tokens': 1, 'total_tokens': 2}
      shared = {'id': 'answer', 'created': 0, 'model': body.get('model', ''), 'usage': usage}
      if self.path.endswith('/chat/completions'):
        calls = isinstance(found, dict) and found.get('tool_calls')
        message = found if isinstance(found, dict) else {'role': 'assistant', 'content': found}
        reason = 'tool_calls' if calls else 'stop'
        choice = {'index': 0, 'message': message, 'finish_reason': reason}
        self._send(shared | {'object': 'chat.completion', 'choices': [choice]})
      else:
        choice = {'index': 0, 'text': found, 'finish_reason': 'stop', 'logprobs': None}
        self._send(shared | {'object': 'text_completion', 'choices': [choice]})

    def _send(self, content: dict[str, Any]) -> None:
      data = json.dumps(content).encode()
      self.send_response(200)
      self.send_header('Content-Type', 'application/json')
      self.send_header('Content-Length', str(len(data)))
      self.end_headers()
      self.wfile.write(data)

    def log_message(self, *values):
      """Says nothing."""

  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
  thread = threading.Thread(target=server.serve_forever, daemon=True)
  thread.start()
  try:
    yield f'http://127.0.0.1:{server.server_address[1]}/v1'
  finally:
    server.shutdown()
    thread.join()
