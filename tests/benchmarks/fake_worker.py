"""Stands in for a part of `benchmarks.device` that goes wrong; the part's name says how."""

import json
import os
import signal
import subprocess
import sys
import time

name, told = sys.argv[1:]
print('a library says something', flush=True)
print(
  json.dumps({'part': name, 'case': 'first', 'value': 2.0, 'unit': 's', 'count': 1}), flush=True
)
if name == 'hangs':
  # What a part has started ends with it.
  child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])
  print(json.dumps({'part': name, 'case': 'child', 'value': child.pid}), flush=True)
  time.sleep(600)
if name == 'crashes':
  os.kill(os.getpid(), signal.SIGSEGV)
if name == 'exits':
  sys.exit(3)
if name == 'sees':
  folder = json.loads(told)['folder']
  print(json.dumps({'part': name, 'case': folder, 'value': len(os.listdir(folder))}), flush=True)
