"""The tools of ToolWorld: their names, how people ask for them, and what they do to the state."""

import dataclasses
from collections.abc import Callable
from typing import Any

from dcore_jax.chat.messages import ToolSpec

# Plain data, so that a state is copied, compared and written to JSON as it is.
Tables = dict[str, dict[str, Any]]  # the state: table -> key -> row
# Every state has all of them, so that tools need not ask.
TABLES = ('orders', 'flights', 'hotels', 'phones', 'files', 'accounts')


class ToolError(Exception):
  """A call that a tool cannot carry out; its text becomes the tool's response."""


@dataclasses.dataclass(frozen=True)
class ToolDefinition:
  """One tool.

  Attributes:
    name: what a call names.
    parameters: parameter -> the kind of entity that it takes.
    phrasings: requests in words. They name an id as '<kind> {<parameter>}', so that a chained
      request can say 'that <kind>' instead.
    run: executes a call on the state, with the parameters as keyword arguments.
    partials: (a request that lacks the value of one parameter, the name of that parameter).
    produces: the key of the entity in the output that a later request can speak of.
  """

  name: str
  parameters: dict[str, str]
  phrasings: tuple[str, ...]
  run: Callable[..., dict[str, Any]]
  partials: tuple[tuple[str, str], ...]
  produces: str | None = None

  @property
  def spec(self) -> ToolSpec:
    """The tool as JSON schema, for prompts that list tools in that way."""
    properties = {}
    for parameter, kind in self.parameters.items():
      # ToolWorld has no other types: whatever is not counted is a word.
      properties[parameter] = {'type': 'integer' if kind in ('amount', 'nights') else 'string'}
    schema = {'type': 'object', 'properties': properties, 'required': list(self.parameters)}
    return ToolSpec(self.name, self.name.replace('_', ' '), schema)


# What tools do. Errors are short texts, because the organism reads them token by token.


def _row(state: Tables, table: str, key: Any) -> dict[str, Any]:
  # The table's name less its plural: 'no such order'.
  if key not in state[table]:
    raise ToolError(f'no such {table[:-1]}')
  return state[table][key]


def _find(state: Tables, table: str, field: str, value: Any, key: str) -> dict[str, Any]:
  # The first row that fits; tables keep the order in which rows were added.
  for identifier, row in state[table].items():
    if row.get(field) == value:
      return {key: identifier}
  raise ToolError(f'no {key} found')


def _set(state: Tables, table: str, key: Any, status: str, **fields) -> dict[str, Any]:
  # One status a row: what was done last to an order or a flight decides what it is.
  _row(state, table, key).update(status=status, **fields)
  return {'status': status}


def _refund(state: Tables, order: str) -> dict[str, Any]:
  row = _row(state, 'orders', order)
  # The price is returned, so that a later request can speak of "that amount".
  # The row itself changes, so that the state shows the refund.
  row['status'] = 'refunded'
  return {'amount': row['price']}


def _pay(state: Tables, person: str, amount: int) -> dict[str, Any]:
  _number(amount)
  # Added, not set: several payments to one person add up.
  _row(state, 'accounts', person)['balance'] += amount
  return {'status': 'paid'}


def _number(value: Any) -> int:
  # A bool is an int to Python, and a model may well write one.
  if isinstance(value, bool) or not isinstance(value, int):
    raise ToolError('not a number')
  return value


TOOLS = {
  # Keyed by name, in an order that tasks depend on: choices are drawn by place.
  tool.name: tool
  for tool in (
    ToolDefinition(
      name='find_order',
      parameters={'customer': 'name'},
      phrasings=('find the order of {customer}', 'look up the order of {customer}'),
      run=lambda s, customer: _find(s, 'orders', 'customer', customer, 'order'),
      # Each partial lacks the value of one parameter, and says which.
      partials=(('find the order', 'customer'), ('look up an order', 'customer')),
      produces='order',
    ),
    ToolDefinition(
      name='cancel_order',
      parameters={'order': 'order'},
      phrasings=('cancel order {order}', 'stop order {order}'),
      run=lambda s, order: _set(s, 'orders', order, 'cancelled'),
      partials=(('cancel an order', 'order'), ('stop the order', 'order')),
    ),
    ToolDefinition(
      name='ship_order',
      parameters={'order': 'order', 'city': 'name'},
      phrasings=('ship order {order} to {city}', 'send order {order} off to {city}'),
      # The city is not checked: any name is a place.
      run=lambda s, order, city: _set(s, 'orders', order, 'shipped', city=city),
      partials=(('ship order {order}', 'city'), ('ship the order to {city}', 'order')),
    ),
    ToolDefinition(
      name='refund_order',
      parameters={'order': 'order'},
      phrasings=('refund order {order}', 'give the money back for order {order}'),
      run=_refund,
      partials=(('refund an order', 'order'), ('give the money back', 'order')),
      produces='amount',
    ),
    ToolDefinition(
      name='find_flight',
      parameters={'city': 'name'},
      phrasings=('find a flight to {city}', 'look for a flight to {city}'),
      run=lambda s, city: _find(s, 'flights', 'city', city, 'flight'),
      partials=(('find a flight', 'city'), ('look for a flight', 'city')),
      produces='flight',
    ),
    ToolDefinition(
      name='book_flight',
      parameters={'flight': 'flight', 'person': 'name'},
      phrasings=('book flight {flight} for {person}', 'reserve flight {flight} for {person}'),
      run=lambda s, flight, person: _set(s, 'flights', flight, 'booked', person=person),
      partials=(('book flight {flight}', 'person'), ('book a flight for {person}', 'flight')),
    ),
    ToolDefinition(
      name='find_hotel',
      parameters={'city': 'name'},
      phrasings=('find a hotel in {city}', 'look for a hotel in {city}'),
      run=lambda s, city: _find(s, 'hotels', 'city', city, 'hotel'),
      partials=(('find a hotel', 'city'), ('look for a hotel', 'city')),
      produces='hotel',
    ),
    ToolDefinition(
      name='book_hotel',
      parameters={'hotel': 'hotel', 'nights': 'nights'},
      phrasings=(
        'book hotel {hotel} for {nights} nights',
        'reserve hotel {hotel} for {nights} nights',
      ),
      # The number of nights is checked first, before anything changes.
      run=lambda s, hotel, nights: _set(s, 'hotels', hotel, 'booked', nights=_number(nights)),
      partials=(('book hotel {hotel}', 'nights'), ('book a hotel for {nights} nights', 'hotel')),
    ),
    ToolDefinition(
      name='find_phone',
      parameters={'person': 'name'},
      phrasings=('find the phone of {person}', 'look up the phone of {person}'),
      run=lambda s, person: _find(s, 'phones', 'person', person, 'phone'),
      partials=(('find the phone', 'person'), ('look up the phone', 'person')),
      produces='phone',
    ),
    ToolDefinition(
      name='call_phone',
      parameters={'phone': 'phone'},
      phrasings=('call phone {phone}', 'ring phone {phone}'),
      run=lambda s, phone: _set(s, 'phones', phone, 'called'),
      partials=(('call the phone', 'phone'), ('ring a phone', 'phone')),
    ),
    ToolDefinition(
      name='text_phone',
      parameters={'phone': 'phone', 'code': 'code'},
      phrasings=('text phone {phone} the code {code}', 'message phone {phone} the code {code}'),
      run=lambda s, phone, code: _set(s, 'phones', phone, 'texted', code=code),
      partials=(('text phone {phone}', 'code'), ('text the code {code}', 'phone')),
    ),
    ToolDefinition(
      name='find_file',
      parameters={'person': 'name'},
      phrasings=('find the file of {person}', 'look up the file of {person}'),
      run=lambda s, person: _find(s, 'files', 'person', person, 'file'),
      partials=(('find the file', 'person'), ('look up the file', 'person')),
      produces='file',
    ),
    ToolDefinition(
      name='delete_file',
      parameters={'file': 'file'},
      phrasings=('delete file {file}', 'remove file {file}'),
      run=lambda s, file: _set(s, 'files', file, 'deleted'),
      partials=(('delete the file', 'file'), ('remove a file', 'file')),
    ),
    ToolDefinition(
      name='share_file',
      parameters={'file': 'file', 'person': 'name'},
      phrasings=('share file {file} with {person}', 'give file {file} to {person}'),
      run=lambda s, file, person: _set(s, 'files', file, 'shared', reader=person),
      partials=(('share file {file}', 'person'), ('share a file with {person}', 'file')),
    ),
    ToolDefinition(
      name='check_balance',
      parameters={'person': 'name'},
      phrasings=('check the balance of {person}', 'get the balance of {person}'),
      # Reading changes nothing; a wrong name is an error.
      run=lambda s, person: {'amount': _row(s, 'accounts', person)['balance']},
      partials=(('check the balance', 'person'), ('get the balance', 'person')),
      produces='amount',
    ),
    ToolDefinition(
      name='pay_amount',
      parameters={'person': 'name', 'amount': 'amount'},
      phrasings=('pay {person} the amount {amount}', 'give {person} the amount {amount}'),
      run=_pay,
      partials=(('pay {person}', 'amount'), ('pay the amount {amount}', 'person')),
    ),
    ToolDefinition(
      name='add_numbers',
      parameters={'first': 'amount', 'second': 'amount'},
      phrasings=('add {first} and {second}', 'sum up {first} and {second}'),
      # The only tool that needs no state.
      run=lambda s, first, second: {'amount': _number(first) + _number(second)},
      partials=(('add {first}', 'second'), ('sum up {second}', 'first')),
      produces='amount',
    ),
  )
}


def execute(state: Tables, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
  """Runs one call against `state`, which it changes in place, and returns the response.

  What is wrong with a call is a response too: {'error': why}.
  """
  tool = TOOLS.get(name)
  # In this order, so that every error names the first thing that is wrong.
  if tool is None:
    return {'error': 'unknown tool'}
  # Exactly the parameters: a model must neither leave one out nor make one up.
  if set(arguments) != set(tool.parameters):
    return {'error': 'wrong arguments'}
  # Every parameter is a scalar. A container cannot be hashed, so looking it up would raise.
  if any(isinstance(value, (dict, list, tuple, set)) for value in arguments.values()):
    return {'error': 'wrong arguments'}
  try:
    return tool.run(state, **arguments)
  # Errors are outputs: a model reads them and may correct itself.
  except ToolError as error:
    return {'error': str(error)}
