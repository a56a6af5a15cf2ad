"""One simulation of tau2-bench, in a process of its own that can do little else.

Of packages it imports tau2, and what tau2 imports.
"""

import contextlib
import importlib
import inspect
import json
import logging
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dcore_jax.evaluate.confined.harness import confine_harness, limit_seconds
from dcore_jax.evaluate.tau2.scripted_user import STOP, ScriptedUser
from dcore_jax.evaluate.tau2.sides import Fault, Side, message_record

_BYTES = 8 << 30  # address space; litellm and its threads reserve 3 GB of it
_CPU_SECONDS = 600  # of a simulation, whose 200 steps need less than 20


class Harness:
  """The parts of tau2 that a simulation needs."""

  def __init__(self):
    # tau2 and litellm report every request.
    importlib.import_module('loguru').logger.remove()
    logging.disable(logging.CRITICAL)
    self.registry = importlib.import_module('tau2.registry').registry
    self.orchestrator = importlib.import_module('tau2.orchestrator.orchestrator')
    self.evaluator = importlib.import_module('tau2.evaluator.evaluator')
    self.agent = importlib.import_module('tau2.agent.llm_agent').LLMAgent
    self.user = importlib.import_module('tau2.user.user_simulator').UserSimulator
    self.messages = importlib.import_module('tau2.data_model.message')
    self.simulation = importlib.import_module('tau2.data_model.simulation')
    self.task = importlib.import_module('tau2.data_model.tasks').Task

  def warm_up(self) -> None:
    """Makes litellm import what a first request needs: once, and not in each fork (1.5 s)."""
    generate = importlib.import_module('tau2.utils.llm_utils').generate
    asked = [self.messages.UserMessage(role='user', content='?')]
    with socket.socket() as nobody:
      # A port that is taken, and that nobody listens at: the request fails at once.
      nobody.bind(('127.0.0.1', 0))
      url = f'http://127.0.0.1:{nobody.getsockname()[1]}/v1'
      side = {'base_url': url, 'model': 'none', 'key': '', 'temperature': 0.0, 'timeout': 1.0}
      model = _endpoint(side)
      options = model['llm_args'] | {'num_retries': 0, 'max_retries': 0}
      with contextlib.suppress(Exception):
        generate(model['llm'], asked, **options)

  def simulate(
    self, job: Mapping[str, Any], order: Mapping[str, Any], tell: Callable[..., None]
  ) -> dict[str, Any]:
    """Runs and judges one simulation -> {'ended', 'reward', 'breakdown'}.

    Raises:
      Fault: it could not come to its end.
    """
    domain = job['domain']
    record = order['tasks'][domain][job['task']]
    task = self.task.model_validate(record)
    environment = self.registry.get_env_constructor(domain)()
    environment.policy = order['policies'].get(domain, environment.policy)
    self._watch(environment, tell)
    agent = self.agent(
      tools=environment.get_tools(),
      domain_policy=environment.get_policy(),
      **_endpoint(order['agent']),
    )
    orchestrator = self.orchestrator.Orchestrator(
      domain=domain,
      agent=Side('agent', agent, tell),
      user=Side('user', self._make_user(order['user'], record, task, environment), tell),
      environment=environment,
      task=task,
      max_steps=order['max_steps'],
      max_errors=order['max_errors'],
      seed=job['seed'],
    )
    # The orchestrator begins with a greeting that no side was asked for.
    tell({'message': message_record(self.orchestrator.DEFAULT_FIRST_AGENT_MESSAGE)})
    simulation = orchestrator.run()
    tell({'turn': 'judge'})
    ended = simulation.termination_reason
    found = self._judge(simulation, task, domain)
    reason = getattr(ended, 'value', ended)
    if reason == 'max_steps' and could_stop(simulation.messages):
      # Judged as though the user had stopped: if the task was done, the user should have.
      simulation.termination_reason = self.simulation.TerminationReason.USER_STOP
      if self._judge(simulation, task, domain)['reward'] == 1.0:
        reason = 'never_stops'
    return found | {'ended': reason}

  def _make_user(self, user: Any, record: Any, task: Any, environment: Any) -> Any:
    if user is None:
      instructions = record['user_scenario']['instructions']
      return ScriptedUser(instructions, self.messages.UserMessage)
    tools = environment.get_user_tools() if environment.user_tools is not None else None
    return self.user(tools=tools, instructions=str(task.user_scenario), **_endpoint(user))

  def floor(self, job: Mapping[str, Any], order: Mapping[str, Any]) -> dict[str, Any]:
    """Judges a task in which the user stops at once, and the agent has done nothing."""
    task = self.task.model_validate(order['tasks'][job['domain']][job['task']])
    now = '2025-01-01T00:00:00'
    simulation = self.simulation.SimulationRun(
      id='floor',
      task_id=task.id,
      start_time=now,
      end_time=now,
      duration=0.0,
      termination_reason='user_stop',
      messages=[
        self.messages.AssistantMessage(role='assistant', content='Hi! How can I help you today?'),
        self.messages.UserMessage(role='user', content=STOP),
      ],
    )
    return self._judge(simulation, task, job['domain'])

  def _judge(self, simulation: Any, task: Any, domain: str) -> dict[str, Any]:
    evaluator = self.evaluator
    found = evaluator.evaluate_simulation(
      simulation=simulation,
      task=task,
      evaluation_type=evaluator.EvaluationType.ALL,
      solo_mode=False,
      domain=domain,
    )
    parts = found.reward_breakdown or {}
    breakdown = {getattr(name, 'value', name): value for name, value in parts.items()}
    return {'reward': found.reward, 'breakdown': breakdown}

  def _watch(self, environment: Any, tell: Callable[..., None]) -> None:
    """Makes an environment tell its calls and their outputs."""
    respond = environment.get_response

    def watched(call: Any) -> Any:
      tell({'turn': 'tool', 'of': call.requestor})
      answer = respond(call)
      tell({'message': message_record(answer)})
      problem = self._problem(environment, call, answer.error)
      if problem:
        side = 'agent' if call.requestor == 'assistant' else 'user'
        tell({'problem': problem, 'of': side})
      return answer

    environment.get_response = watched

  def _problem(self, environment: Any, call: Any, failed: bool) -> str:
    """Returns what is wrong with a call: '' if nothing is."""
    kit = environment.tools if call.requestor == 'assistant' else environment.user_tools
    tools = kit.tools if kit is not None else {}
    if call.name not in tools:
      return 'unknown_tool'
    try:
      inspect.signature(tools[call.name]).bind(**call.arguments)
    except TypeError:
      return 'invalid_arguments'
    # The tool itself said no, for instance to an order that does not exist.
    return 'failed_call' if failed else ''


def _endpoint(side: Mapping[str, Any]) -> dict[str, Any]:
  """Returns how tau2's sides are told their model."""
  options = {
    'api_base': side['base_url'],
    # OpenAI's client refuses to send none.
    'api_key': side['key'] or 'none',
    'temperature': side['temperature'],
    'timeout': side['timeout'],
    # tau2-bench's own number, also of empty replies.
    'num_retries': 3,
  }
  if side.get('max_tokens'):
    options['max_tokens'] = side['max_tokens']
  return {'llm': f'openai/{side["model"]}', 'llm_args': options}


def could_stop(messages: Sequence[Any]) -> bool:
  """Whether the user has spoken since the agent's last call, and might have stopped."""
  for message in reversed(messages):
    if message.role == 'user':
      return True
    if message.role == 'tool':
      return False
  return False


def work(harness: Harness, job: Any, order: Any, pipe: Any) -> None:
  """Is one process: runs a job and sends what happens as JSON."""

  def tell(event: dict[str, Any]) -> None:
    pipe.send_bytes(json.dumps(event).encode())

  _confine(order)
  try:
    if job['trial'] is None:
      tell(harness.floor(job, order) | {'ended': 'floor'})
    else:
      tell(harness.simulate(job, order, tell))
  except Fault as fault:
    found = {'of': fault.side, 'reason': fault.reason, 'detail': fault.detail}
    tell({'ended': 'fault', 'fault': found, 'final': fault.final})
  # An error of the harness is a missing verdict, and no reason to lose the others.
  except Exception as error:  # pylint: disable=broad-except
    detail = f'{type(error).__name__}: {error}'[:500]
    tell({'ended': 'fault', 'fault': {'of': 'harness', 'reason': 'error', 'detail': detail}})


def _confine(order: Mapping[str, Any]) -> None:
  """Takes from this process what a simulation does not need: other hosts, programs, files."""
  sides = [order['agent'], *([order['user']] if order['user'] else [])]
  proxies = [os.environ.get(name) for name in ('HTTP_PROXY', 'HTTPS_PROXY')]
  addresses = [side['base_url'] for side in sides] + [proxy for proxy in proxies if proxy]
  confine_harness(memory=_BYTES, addresses=addresses)
  limit_seconds(_CPU_SECONDS)
