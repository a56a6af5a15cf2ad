"""Runs `bfcl generate` and `bfcl evaluate`, in the environment of a release of bfcl-eval.

`process` starts it with the Python of that environment and a job as a line of JSON on stdin,
see `Job`. What the harness prints goes to stderr.

    generate    stdout gets a line whenever the model has answered; ends when stdin does
    evaluate    stdout gets the id of every task before it is judged

Tasks, prompts, decoding of calls and the loop over turns are the harness's own. This file adds the
handler of a model behind any address, which differs from the harness's handler of Qwen3 in three
things. Thoughts of earlier answers are not put back into the prompt, as D-CORE is trained (its own
handler does the same). What the model wrote is shown to it as it wrote it: the handler of release
2025.6.16 leaves calls out of the history, and the end of what tools return. And what tools return
is only text, see `make_prompt`: a file that a model wrote could else end a turn and begin another.

Both commands pass text that a model wrote to `eval`. It gets the `Evaluator` of `checker` in
its place, which computes literals and calls public methods of the task's APIs.
"""

import importlib
import importlib.abc
import importlib.machinery
import json
import os
import pathlib
import sys
import threading
import time
from typing import Any, TypedDict
from unittest import mock

if __name__ == '__main__':
  # Behind the packages of the environment, which has its own of what both need. Imported from
  # there is only what uses Python alone.
  sys.path.append(str(pathlib.Path(__file__).resolve().parents[3]))

from dcore_jax.chat.encoding import encode_rendered, mark_records, shown
from dcore_jax.evaluate.bfcl.checker import Evaluator
from dcore_jax.evaluate.confined.harness import confine_harness, limit_seconds

# What the release asks for and this job does not use: clients of other services, and embeddings.
_ABSENT = (
  'anthropic',
  'boto3',
  'botocore',
  'cohere',
  'datamodel_code_generator',
  'faiss',
  'google',
  'mistralai',
  'qwen_agent',
  'sentence_transformers',
  'vertexai',
  'writerai',
)
AWAY = 3  # the exit status where the server could not be reached
# Begins the error of a task for which the model has no room.
TOO_LONG = 'the prompt does not fit into the context of the model'
_BEGIN = '<|im_start|>'
_END = '<|im_end|>\n'
_SECONDS = 10  # processor time of one item; the slowest right answers take a tenth of a second
_BYTES = 4 << 30  # address space of judging, of which numpy and pandas map a part


class Job(TypedDict, total=False):
  """What is to be done.

  Attributes:
    command: 'generate' or 'evaluate'.
    arguments: of the command, without --model.
    name: of the model, which names the folder of results.
    fc: functions as data in place of the harness's system prompt.
    root: the folder that the harness writes in.
    base_url, model, key: see `suites.Served`.
    context: tokens of prompt and answer that the server takes; None where it does not say.
    temperature, max_tokens, seed, timeout, concurrency: see `suites.SuiteSettings`.
  """

  command: str
  arguments: list[str]
  name: str
  fc: bool
  root: str
  base_url: str
  model: str
  key: str
  context: int | None
  temperature: float
  max_tokens: int
  seed: int
  timeout: float
  concurrency: int


class _Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
  """Finds empty modules in the place of packages that are imported and not used."""

  def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
    """Returns a spec of any module of these packages."""
    if name.partition('.')[0] in _ABSENT:
      return importlib.machinery.ModuleSpec(name, self, is_package=True)
    return None

  def create_module(self, spec: Any) -> Any:
    """Returns a module that has every attribute."""
    module = mock.MagicMock(name=spec.name)
    module.__path__ = []
    module.__spec__ = spec
    return module

  def exec_module(self, module: Any) -> None:
    """Does nothing: there is no source."""


class Asker:
  """Sends prompts to the server, from all threads of the harness.

  Args:
    job: see `Job`.
    said: is called whenever the server has answered.
  """

  def __init__(self, job: Job, said: Any):
    self._openai = importlib.import_module('openai')
    self._job = job
    self._said = said
    self.context = job['context']
    # The harness has as many threads as it likes.
    self._room = threading.BoundedSemaphore(job['concurrency'])
    self.away = threading.Event()
    self._client = self._openai.OpenAI(
      base_url=job['base_url'],
      # The client refuses to begin without a key.
      api_key=job['key'] or 'none',
      timeout=job['timeout'],
      max_retries=3,
    )

  def ask(self, prompt: str | list[int], room: int) -> Any:
    """Returns the completion of a prompt.

    Args:
      prompt: the text, or its ids.
      room: tokens that fit behind it.

    Raises:
      ConnectionError: the server is away, now or since an earlier request.
    """
    with self._room:
      # Whoever waited for a server that is gone need not try again.
      if self.away.is_set():
        raise ConnectionError('the server is away')
      try:
        return self._client.completions.create(
          model=self._job['model'],
          prompt=prompt,
          temperature=self._job['temperature'],
          max_tokens=min(self._job['max_tokens'], room),
          seed=self._job['seed'],
        )
      except self._openai.APITimeoutError:
        # One that takes too long over a task may still answer others.
        raise
      except self._openai.APIConnectionError as error:
        self.away.set()
        raise ConnectionError(f'the server is away: {error}') from error
      finally:
        self._said()


def _replaces(method: Any) -> Any:
  """Marks a method that replaces one of the harness's classes, which refuse any other.

  The decorator that they use finds a base class only by its name in the source.
  """
  method.__override__ = True
  return method


def make_handler(base: type, asker: Asker | None) -> type:
  """Returns the class of the handler of a model.

  Args:
    base: the harness's handler of Qwen3, with functions as data or in the system prompt.
    asker: None where nothing is asked.
  """

  class Handler(base):
    """Asks one server in D-CORE's format."""

    def __init__(self, *arguments: Any, **options: Any):
      super().__init__(*arguments, **options)
      # An answer is appended. Where ids are named, the harness would write all others again with
      # each, and whoever ends it meanwhile would lose them.
      append = self.write
      self.write = lambda result, result_dir, update_mode=False: append(result, result_dir)

    @_replaces
    def _format_prompt(self, messages, function):
      # What comes before the first turn is the harness's: of one message it writes no more.
      if messages[0]['role'] == 'system':
        opened = super()._format_prompt(messages[:1], function)
        return opened.removesuffix(f'{_BEGIN}assistant\n') + format_turns(messages[1:])
      first = format_turns(messages[:1])
      opened = super()._format_prompt(messages[:1], function)
      return opened.removesuffix(first) + format_turns(messages)

    @_replaces
    def _query_prompting(self, inference_data: dict):
      messages = mark_records(self.tokenizer, inference_data['message'])
      rendered = self._format_prompt(messages, inference_data['function'])
      inference_data['inference_input_log'] = {'formatted_prompt': shown(rendered)}
      prompt, tokens = make_prompt(self.tokenizer, rendered)
      # Two tokens less, as the harness reckons.
      context = min(asker.context or self.max_context_length, self.max_context_length)
      room = context - tokens - 2
      if room < 1:
        raise ValueError(f'{TOO_LONG}: {tokens} of {context} tokens')
      started = time.time()
      return asker.ask(prompt, room), time.time() - started

    @_replaces
    def _add_assistant_message_prompting(
      self, inference_data: dict, model_response_data: dict
    ) -> dict:
      # Without thoughts, which the harness has split off.
      answer = {'role': 'assistant', 'content': model_response_data['model_responses']}
      inference_data['message'].append(answer)
      return inference_data

  return Handler


def make_prompt(tokenizer: Any, rendered: str) -> tuple[str | list[int], int]:
  """Returns (a prompt, its tokens) of a conversation whose texts `mark_records` has marked.

  It is the text, as the harness sends it, unless a server would read markup in what a tool or a
  user says, such as the end of a turn. Then it is the ids, in which such text is only text.
  """
  ids = encode_rendered(tokenizer, rendered)
  text = shown(rendered)
  plain = tokenizer(text, add_special_tokens=False)['input_ids']
  return (text if ids == plain else ids), len(ids)


def format_turns(messages: list[dict[str, Any]]) -> str:
  """Writes turns in Qwen3's format, and opens the model's next one.

  What several tools return is one turn of the user.
  """
  parts = []
  for place, message in enumerate(messages):
    if message['role'] != 'tool':
      parts.append(f'{_BEGIN}{message["role"]}\n{message["content"]}{_END}')
      continue
    if not place or messages[place - 1]['role'] != 'tool':
      parts.append(f'{_BEGIN}user')
    parts.append(f'\n<tool_response>\n{message["content"]}\n</tool_response>')
    if place + 1 == len(messages) or messages[place + 1]['role'] != 'tool':
      parts.append(_END)
  return ''.join(parts) + f'{_BEGIN}assistant\n'


def _register(job: Job, asker: Asker | None) -> None:
  """Enters the handler among the models that the harness knows."""
  place = 'bfcl_eval.model_handler.local_inference'
  if job['fc']:
    base = importlib.import_module(f'{place}.qwen_fc').QwenFCHandler
  else:
    base = importlib.import_module(f'{place}.qwen').QwenHandler
  models = importlib.import_module('bfcl_eval.constants.model_config')
  models.MODEL_CONFIG_MAPPING[job['name']] = models.ModelConfig(
    model_name=job['name'],
    display_name=job['name'],
    url='',
    org='',
    license='',
    model_handler=make_handler(base, asker),
    is_fc_model=job['fc'],
    underscore_to_dot=False,
  )


def _guard() -> None:
  """Puts the evaluator in the place of `eval` wherever a model's text gets there."""
  refusals: list[str] = []
  for name in (
    'bfcl_eval.model_handler.utils',
    'bfcl_eval.model_handler.local_inference.qwen_fc',
    'bfcl_eval.eval_checker.multi_turn_eval.multi_turn_utils',
  ):
    module = importlib.import_module(name)
    # A name of the module is found before the builtin one of the same name.
    module.eval = Evaluator(vars(module), refusals)


def _run_cli(job: Job) -> None:
  cli = importlib.import_module('bfcl_eval.__main__').cli
  cli([job['command'], '--model', job['name'], *job['arguments']], standalone_mode=False)


def _end_with_parent() -> None:
  """Ends this process when stdin does: whoever started it is gone, or wants no more.

  Answers of two processes would mix in the files.
  """
  sys.stdin.read()
  os._exit(1)


def generate(job: Job, output: int) -> int:
  """Asks the model; returns the exit status."""
  threading.Thread(target=_end_with_parent, daemon=True).start()
  asker = Asker(job, lambda: os.write(output, b'\n'))
  _register(job, asker)
  _guard()
  # The harness would wait for ever for a list of models, and asks without the key. Whoever starts
  # this has waited for the server.
  local = importlib.import_module('bfcl_eval.model_handler.local_inference.base_oss_handler')
  local.requests = mock.MagicMock()
  local.requests.get.return_value.status_code = 200
  local.requests.exceptions.ConnectionError = ConnectionError
  _run_cli(job)
  return AWAY if asker.away.is_set() else 0


def evaluate(job: Job, output: int) -> int:
  """Judges what was answered, without network and within limits; returns the exit status."""
  _register(job, None)
  _guard()
  runner = importlib.import_module('bfcl_eval.eval_checker.eval_runner')
  turns = importlib.import_module('bfcl_eval.eval_checker.multi_turn_eval.multi_turn_utils')
  for name in turns.CLASS_FILE_PATH_MAPPING.values():
    # Web search and embeddings are not run, and import what is not there.
    if 'web_search' not in name and 'memory_vector' not in name:
      importlib.import_module(name)
  for kind in ('ast', 'relevance', 'multi_turn', 'agentic'):
    name = f'_evaluate_single_{kind}_entry'
    setattr(runner, name, _announced(getattr(runner, name), output))
  confine_harness(memory=_BYTES, writable=job['root'])
  _run_cli(job)
  return 0


def _announced(judge: Any, output: int) -> Any:
  """Returns a function that names a task and limits its time before it is judged."""

  def announced(handler: Any, name: str, *arguments: Any, **options: Any) -> Any:
    os.write(output, (json.dumps(name) + '\n').encode())
    limit_seconds(_SECONDS)
    try:
      return judge(handler, name, *arguments, **options)
    # The checker was written for answers of well-known models, and raises over others.
    except Exception as error:  # pylint: disable=broad-except
      text = f'the checker raised {type(error).__name__}: {str(error)[:200]}'
      return {'id': name, 'valid': False, 'error': [text], 'error_type': 'checker_failed'}

  return announced


def main() -> int:
  """Does the job of stdin; returns the exit status."""
  job: Job = json.loads(sys.stdin.readline())
  # The harness prints, and whoever started this reads stdout.
  output = os.dup(1)
  os.dup2(2, 1)
  # The package reads it when it is imported.
  os.environ['BFCL_PROJECT_ROOT'] = job['root']
  sys.meta_path.insert(0, _Absent())
  commands = {'generate': generate, 'evaluate': evaluate}
  return commands[job['command']](job, output)


if __name__ == '__main__':
  # Threads that wait for a server that is gone must not keep the process.
  status = main()
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(status)
