"""An MCP server for tests: some of ToolWorld's tools, whose words the packaged organism knows.

python tests/worlds/mcp_shop.py STATE.json
"""

import json
import pathlib
import sys

# A server gets no variables but PATH, HOME and their like.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from mcp.server.mcpserver import MCPServer  # noqa: E402
from mcp.types import ToolAnnotations  # noqa: E402

from dcore_jax.worlds.toolworld.tools import execute  # noqa: E402

server = MCPServer('shop')
path = pathlib.Path(sys.argv[1])
state = json.loads(path.read_text())


def call(name: str, **arguments: str) -> str:
  return json.dumps(execute(state, name, arguments))


@server.tool(annotations=ToolAnnotations(read_only_hint=True))
def find_order(customer: str) -> str:
  return call('find_order', customer=customer)


@server.tool()
def cancel_order(order: str) -> str:
  return call('cancel_order', order=order)


@server.tool()
def refund_order(order: str) -> str:
  return call('refund_order', order=order)


@server.tool()
def start_again() -> str:
  state.clear()
  state.update(json.loads(path.read_text()))
  return 'ok'


if __name__ == '__main__':
  server.run()
