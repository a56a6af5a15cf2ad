"""Runs the worker of tau2-bench without tau2: what a simulation does is the id of its task."""

import os
import pathlib
import socket
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[3]))
from dcore_jax.evaluate.tau2 import worker
from dcore_jax.evaluate.tau2.sides import Fault


class FakeHarness:
  def simulate(self, job, order, tell):
    task = job['task']
    tell({'turn': 'agent'})
    tell({'message': {'role': 'assistant', 'content': 'hello'}})
    if task == 'slow user':
      tell({'turn': 'user'})
      time.sleep(60)
    if task == 'endless sum':
      tell({'turn': 'tool', 'of': 'assistant'})
      time.sleep(60)
    if task == 'dies':
      tell({'turn': 'judge'})
      os._exit(7)
    if task == 'raises':
      raise KeyError('a fault of the harness')
    if task == 'empty user':
      raise Fault('user', 'empty_reply')
    if task == 'nobody there':
      raise Fault('agent', 'unreachable', 'no such port', final=True)
    if task == 'elsewhere':
      # Not an endpoint, though on this machine.
      socket.create_connection(('localhost', 1))
    if task == 'writes':
      pathlib.Path('written').write_text('x')
    if task == 'starts':
      os.system('true')
    tell({'problem': 'unknown_tool', 'of': 'agent'})
    return {'reward': 1.0, 'breakdown': {'DB': 1.0}, 'ended': 'user_stop'}

  def floor(self, job, order):
    return {'reward': 0.0, 'breakdown': {}}

  def warm_up(self):
    """Needs nothing."""


worker.Harness = FakeHarness
worker.main()
