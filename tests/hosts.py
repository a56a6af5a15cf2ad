"""Several hosts as processes on this one, with fake devices that talk over loopback."""

import json
import os
import pathlib
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]


def free_port() -> int:
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    return probe.getsockname()[1]


def places(count: int) -> list[str]:
  """What `--hosts` is on each of `count` hosts; '' for a process by itself."""
  port = free_port()
  return [f'127.0.0.1:{port},{count},{index}' if count > 1 else '' for index in range(count)]


def start(arguments: Sequence[str], devices: int) -> subprocess.Popen:
  """Starts Python as a host with so many devices."""
  environment = os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}',
    'PYTHONPATH': str(ROOT),
  }
  return subprocess.Popen(
    [sys.executable, *arguments],
    cwd=ROOT,
    env=environment,
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
  )


def result(process: subprocess.Popen, seconds: float = 600) -> Any:
  """Returns what a process has printed last, as JSON; it must have ended well."""
  try:
    out, err = process.communicate(timeout=seconds)
  except subprocess.TimeoutExpired:
    process.kill()
    raise
  assert process.returncode == 0, err[-3000:]
  # Every line is JSON: libraries write to stderr.
  return [json.loads(line) for line in out.splitlines()][-1]
