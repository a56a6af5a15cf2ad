"""Drives a real browser, Chromium, through its debugging pipe; needs no package beside it."""

import base64
import contextlib
import fcntl
import json
import os
import pathlib
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from typing import Any

_NAMES = ('chromium', 'chromium-browser', 'google-chrome')
_PATIENCE = 120  # seconds


def find_browser() -> str | None:
  """Returns the path of a Chromium; None without one."""
  return next(filter(None, map(shutil.which, _NAMES)), None)


class Tab:
  """One tab of the browser."""

  def __init__(self, write: int, read: int):
    self._write = write
    self._read = read
    self._number = 0
    self._session: str | None = None
    self._rest = b''
    self._events: set[str] = set()  # what the page has told, by name
    target = self.call('Target.createTarget', url='about:blank')['targetId']
    found = self.call('Target.attachToTarget', targetId=target, flatten=True)
    self._session = found['sessionId']
    self.call('Page.enable')

  def call(self, method: str, **params: Any) -> dict[str, Any]:
    self._number += 1
    message = {'id': self._number, 'method': method, 'params': params}
    if self._session:
      message['sessionId'] = self._session
    os.write(self._write, json.dumps(message).encode() + b'\0')
    while True:
      reply = self._take()
      if reply.get('id') == self._number:
        assert 'error' not in reply, reply
        return reply['result']

  def _take(self) -> dict[str, Any]:
    reply = json.loads(self._line())
    if 'method' in reply:
      self._events.add(reply['method'])
    return reply

  def _line(self) -> bytes:
    while b'\0' not in self._rest:
      ready, _, _ = select.select([self._read], [], [], _PATIENCE)
      assert ready, 'the browser does not answer'
      data = os.read(self._read, 1 << 20)
      assert data, 'the browser has gone'
      self._rest += data
    line, self._rest = self._rest.split(b'\0', 1)
    return line

  def open(self, path: pathlib.Path) -> None:
    """Opens a file and waits until it is loaded."""
    self._events.clear()
    self.call('Page.navigate', url=path.resolve().as_uri())
    while 'Page.loadEventFired' not in self._events:
      self._take()

  def run(self, script: str) -> Any:
    """Returns the value of an expression, which may be a promise."""
    found = self.call('Runtime.evaluate', expression=script, awaitPromise=True, returnByValue=True)
    assert 'exceptionDetails' not in found, found
    return found['result'].get('value')

  def wait(self, script: str) -> Any:
    """Waits until an expression is true, and returns its value."""
    end = time.monotonic() + _PATIENCE
    while True:
      value = self.run(script)
      if value:
        return value
      assert time.monotonic() < end, f'{script} stays {value!r}'
      time.sleep(0.05)

  def picture(self, path: pathlib.Path, **options: Any) -> None:
    """Writes a picture of the tab."""
    path.write_bytes(base64.b64decode(self.call('Page.captureScreenshot', **options)['data']))


@contextlib.contextmanager
def browser(folder: pathlib.Path) -> Iterator[Tab]:
  """Starts a browser with its profile in `folder`; yields a tab."""
  to_browser, write = os.pipe()
  read, from_browser = os.pipe()
  command = [
    find_browser(),
    '--headless=new',
    '--no-sandbox',
    '--disable-gpu',
    '--disable-dev-shm-usage',
    '--remote-debugging-pipe',
    f'--user-data-dir={folder}',
    '--window-size=1280,800',
  ]
  # The browser reads from its descriptor 3 and writes to its descriptor 4. Copies above both, so
  # that setting the one cannot close the other. A shell sets them: Python could do it between fork
  # and exec alone, where jax's threads may hold locks. Plain sh knows descriptors up to 9 only.
  ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (to_browser, from_browser)]
  shell = ['bash', '-c', f'exec "$@" 3<&{ends[0]} 4>&{ends[1]}', 'bash', *command]
  process = subprocess.Popen(shell, pass_fds=ends, stderr=subprocess.DEVNULL)
  for end in ends:
    os.close(end)
  os.close(to_browser)
  os.close(from_browser)
  try:
    yield Tab(write, read)
  finally:
    os.close(write)
    process.terminate()
    process.wait(30)
    os.close(read)
