r"""Makes tasks on an MCP server from recorded conversations (docs/your_tools.md).

    python -m experiments.mcp_tasks --server=server.json --conversations=rows.jsonl \
      --out=tasks.jsonl

Conversations are rows of messages with tool calls, or of another schema of data/row_schemas.py. The
calls are executed on the server. What fails there is left out; the reasons go to stderr, and counts
are printed as JSON.
"""

import json
import pathlib
import sys

from absl import app, flags

from dcore_jax.data.mcp_tasks import conversation_tasks
from dcore_jax.data.records import load_records
from dcore_jax.files import replace_text
from dcore_jax.run import program
from dcore_jax.worlds.mcpworld.world import McpWorld, read_options

_SERVER = flags.DEFINE_string('server', None, 'JSON file with the options of the world mcp.')
_CONVERSATIONS = flags.DEFINE_string('conversations', None, 'File of recorded conversations.')
_OUT = flags.DEFINE_string('out', None, 'File of tasks to write.')


def main() -> None:
  """Writes the tasks and prints what became of the conversations."""
  if not (_SERVER.value and _CONVERSATIONS.value and _OUT.value):
    raise app.UsageError('needs --server, --conversations and --out')
  # The file of tasks that the options name is the one that is being made.
  options = read_options(_SERVER.value) | {'tasks': ''}
  records = load_records(_CONVERSATIONS.value)
  stem = pathlib.Path(_CONVERSATIONS.value).name.partition('.')[0]
  made = conversation_tasks(McpWorld(**options), records, stem)
  for problem in made.problems:
    print(f'left out: {problem}', file=sys.stderr)
  if not made.tasks:
    raise ValueError(f'none of {len(records)} conversations gives a task')
  lines = [json.dumps(task, ensure_ascii=False) + '\n' for task in made.tasks]
  replace_text(pathlib.Path(_OUT.value), ''.join(lines))
  report = {
    'conversations': len(records),
    'tasks': len(made.tasks),
    'held_out': sum(task['split'] == 'eval' for task in made.tasks),
    'dropped': dict(made.dropped),
    'other_outputs': made.other_outputs,
    'out': _OUT.value,
  }
  print(json.dumps(report))


if __name__ == '__main__':
  program.run(main)
