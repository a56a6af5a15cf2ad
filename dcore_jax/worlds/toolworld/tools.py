"""The tools of ToolWorld: what they are called, how people ask for them, and what they really do to the state."""

import dataclasses
from collections.abc import Callable
from typing import Any

from dcore_jax.chat.messages import ToolSpec

State = dict[str, dict[str, Any]]
TABLES = ('orders', 'flights', 'hotels', 'phones', 'files', 'accounts')


class ToolError(Exception):
  """A call that a tool cannot carry out; its text becomes the tool's response."""


@dataclasses.dataclass(frozen=True)
class Tool:
  """`parameters` maps a parameter to the kind of entity it takes; `produces` is the key of the entity it returns.

  Phrasings name an id as '<kind> {<parameter>}' so that a chained request can say 'that <kind>' instead. `partials`
  are requests that leave out one required parameter, with the name of what is missing.
  """

  name: str
  parameters: dict[str, str]
  phrasings: tuple[str, ...]
  run: Callable[..., dict[str, Any]]
  partials: tuple[tuple[str, str], ...]
  produces: str | None = None

  @property
  def spec(self) -> ToolSpec:
    properties = {
      p: {'type': 'integer' if kind in ('amount', 'nights') else 'string'}
      for p, kind in self.parameters.items()
    }
    return ToolSpec(
      self.name,
      self.name.replace('_', ' '),
      {'type': 'object', 'properties': properties, 'required': list(self.parameters)},
    )


def _row(state: State, table: str, key: Any) -> dict[str, Any]:
  if key not in state[table]:
    raise ToolError(f'no such {table[:-1]}')
  return state[table][key]


def _find(state: State, table: str, field: str, value: Any, key: str) -> dict[str, Any]:
  for identifier, row in state[table].items():
    if row.get(field) == value:
      return {key: identifier}
  raise ToolError(f'no {key} found')


def _set(state: State, table: str, key: Any, status: str, **fields) -> dict[str, Any]:
  _row(state, table, key).update(status=status, **fields)
  return {'status': status}


def _refund(state: State, order: str) -> dict[str, Any]:
  row = _row(state, 'orders', order)
  row['status'] = 'refunded'
  return {'amount': row['price']}


def _pay(state: State, person: str, amount: int) -> dict[str, Any]:
  _number(amount)
  _row(state, 'accounts', person)['balance'] += amount
  return {'status': 'paid'}


def _number(value: Any) -> int:
  if isinstance(value, bool) or not isinstance(value, int):
    raise ToolError('not a number')
  return value


TOOLS = {
  tool.name: tool
  for tool in (
    Tool(
      'find_order',
      {'customer': 'name'},
      ('find the order of {customer}', 'look up the order of {customer}'),
      lambda s, customer: _find(s, 'orders', 'customer', customer, 'order'),
      (('find the order', 'customer'), ('look up an order', 'customer')),
      'order',
    ),
    Tool(
      'cancel_order',
      {'order': 'order'},
      ('cancel order {order}', 'stop order {order}'),
      lambda s, order: _set(s, 'orders', order, 'cancelled'),
      (('cancel an order', 'order'), ('stop the order', 'order')),
    ),
    Tool(
      'ship_order',
      {'order': 'order', 'city': 'name'},
      ('ship order {order} to {city}', 'send order {order} off to {city}'),
      lambda s, order, city: _set(s, 'orders', order, 'shipped', city=city),
      (('ship order {order}', 'city'), ('ship the order to {city}', 'order')),
    ),
    Tool(
      'refund_order',
      {'order': 'order'},
      ('refund order {order}', 'give the money back for order {order}'),
      _refund,
      (('refund an order', 'order'), ('give the money back', 'order')),
      'amount',
    ),
    Tool(
      'find_flight',
      {'city': 'name'},
      ('find a flight to {city}', 'look for a flight to {city}'),
      lambda s, city: _find(s, 'flights', 'city', city, 'flight'),
      (('find a flight', 'city'), ('look for a flight', 'city')),
      'flight',
    ),
    Tool(
      'book_flight',
      {'flight': 'flight', 'person': 'name'},
      ('book flight {flight} for {person}', 'reserve flight {flight} for {person}'),
      lambda s, flight, person: _set(s, 'flights', flight, 'booked', person=person),
      (('book flight {flight}', 'person'), ('book a flight for {person}', 'flight')),
    ),
    Tool(
      'find_hotel',
      {'city': 'name'},
      ('find a hotel in {city}', 'look for a hotel in {city}'),
      lambda s, city: _find(s, 'hotels', 'city', city, 'hotel'),
      (('find a hotel', 'city'), ('look for a hotel', 'city')),
      'hotel',
    ),
    Tool(
      'book_hotel',
      {'hotel': 'hotel', 'nights': 'nights'},
      ('book hotel {hotel} for {nights} nights', 'reserve hotel {hotel} for {nights} nights'),
      lambda s, hotel, nights: _set(s, 'hotels', hotel, 'booked', nights=_number(nights)),
      (('book hotel {hotel}', 'nights'), ('book a hotel for {nights} nights', 'hotel')),
    ),
    Tool(
      'find_phone',
      {'person': 'name'},
      ('find the phone of {person}', 'look up the phone of {person}'),
      lambda s, person: _find(s, 'phones', 'person', person, 'phone'),
      (('find the phone', 'person'), ('look up the phone', 'person')),
      'phone',
    ),
    Tool(
      'call_phone',
      {'phone': 'phone'},
      ('call phone {phone}', 'ring phone {phone}'),
      lambda s, phone: _set(s, 'phones', phone, 'called'),
      (('call the phone', 'phone'), ('ring a phone', 'phone')),
    ),
    Tool(
      'text_phone',
      {'phone': 'phone', 'code': 'code'},
      ('text phone {phone} the code {code}', 'message phone {phone} the code {code}'),
      lambda s, phone, code: _set(s, 'phones', phone, 'texted', code=code),
      (('text phone {phone}', 'code'), ('text the code {code}', 'phone')),
    ),
    Tool(
      'find_file',
      {'person': 'name'},
      ('find the file of {person}', 'look up the file of {person}'),
      lambda s, person: _find(s, 'files', 'person', person, 'file'),
      (('find the file', 'person'), ('look up the file', 'person')),
      'file',
    ),
    Tool(
      'delete_file',
      {'file': 'file'},
      ('delete file {file}', 'remove file {file}'),
      lambda s, file: _set(s, 'files', file, 'deleted'),
      (('delete the file', 'file'), ('remove a file', 'file')),
    ),
    Tool(
      'share_file',
      {'file': 'file', 'person': 'name'},
      ('share file {file} with {person}', 'give file {file} to {person}'),
      lambda s, file, person: _set(s, 'files', file, 'shared', reader=person),
      (('share file {file}', 'person'), ('share a file with {person}', 'file')),
    ),
    Tool(
      'check_balance',
      {'person': 'name'},
      ('check the balance of {person}', 'get the balance of {person}'),
      lambda s, person: {'amount': _row(s, 'accounts', person)['balance']},
      (('check the balance', 'person'), ('get the balance', 'person')),
      'amount',
    ),
    Tool(
      'pay_amount',
      {'person': 'name', 'amount': 'amount'},
      ('pay {person} the amount {amount}', 'give {person} the amount {amount}'),
      _pay,
      (('pay {person}', 'amount'), ('pay the amount {amount}', 'person')),
    ),
    Tool(
      'add_numbers',
      {'first': 'amount', 'second': 'amount'},
      ('add {first} and {second}', 'sum up {first} and {second}'),
      lambda s, first, second: {'amount': _number(first) + _number(second)},
      (('add {first}', 'second'), ('sum up {second}', 'first')),
      'amount',
    ),
  )
}


def execute(state: State, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
  """Runs one call against `state` (changed in place) and returns its response; errors are responses too."""
  tool = TOOLS.get(name)
  if tool is None:
    return {'error': 'unknown tool'}
  if set(arguments) != set(tool.parameters):
    return {'error': 'wrong arguments'}
  if any(isinstance(value, (dict, list, tuple, set)) for value in arguments.values()):
    return {
      'error': 'wrong arguments'
    }  # every parameter is a scalar; a container could not even be looked up
  try:
    return tool.run(state, **arguments)
  except ToolError as error:
    return {'error': str(error)}
