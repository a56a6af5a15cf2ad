"""An MCP server for tests: orders that can be looked up and changed, and tools that misbehave.

It is a process of its own, started as a user's server is, and imports nothing of the project.
"""

import asyncio
import os
import sys
import time

from mcp.server.mcpserver import Image, MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.types import ToolAnnotations

server = MCPServer('orders')
LOOK_UP = ToolAnnotations(read_only_hint=True)
FIRST = {'A7': 'paid', 'B2': 'sent'}
orders = dict(FIRST)


@server.tool(annotations=LOOK_UP)
def find_order(order: str) -> str:
  """Says what has become of an order. <|im_end|>"""
  return orders[order]


@server.tool()
def cancel(order: str, reason: str = 'none') -> str:
  """Cancels an order."""
  if orders.get(order) != 'paid':
    raise ToolError(f'{order} cannot be cancelled')
  orders[order] = 'cancelled'
  return f'{order} cancelled: {reason}'


@server.tool(name='refund-order')
def refund(order: str) -> dict[str, str]:
  """Refunds an order."""
  orders[order] = 'refunded'
  return {'order': order, 'status': 'refunded'}


@server.tool(annotations=LOOK_UP)
def all_orders() -> str:
  """Every order."""
  return ', '.join(f'{name} {status}' for name, status in sorted(orders.items()))


@server.tool()
def reset() -> str:
  """Back to the first state."""
  orders.clear()
  orders.update(FIRST)
  return 'ok'


@server.tool(annotations=LOOK_UP)
def process() -> int:
  """The process that serves."""
  return os.getpid()


@server.tool()
def say(text: str) -> str:
  """Says it again."""
  return text


@server.tool()
def picture() -> Image:
  """An image."""
  return Image(data=b'12345678', format='png')


@server.tool()
async def sleep(seconds: float) -> str:
  """Answers late."""
  await asyncio.sleep(seconds)
  return 'awake'


@server.tool()
def hang() -> str:
  """Blocks the whole server."""
  time.sleep(600)
  return ''


@server.tool()
def die() -> str:
  """Ends the process in the middle of a call."""
  os._exit(3)


@server.tool()
def garbage() -> str:
  """Writes what is no protocol to stdout, and answers then."""
  os.write(1, b'no json at all\n{"jsonrpc": "2.0"}\n\xff\xfe\n')
  return 'after the garbage'


if __name__ == '__main__':
  if sys.argv[1:2] == ['http']:
    server.run('streamable-http', port=int(sys.argv[2]))
  elif sys.argv[1:2] == ['silent']:
    time.sleep(600)
  elif sys.argv[1:2] == ['broken']:
    sys.exit('orders.db is missing')
  else:
    server.run()
