"""What can be asked of BFCL's messages, of its trading account, and of its calculator."""

from typing import Any

from dcore_jax.chat.messages import ToolCall
from dcore_jax.worlds.bfcl_writer import (
  FIRST,
  LINES,
  NOTHING,
  PLACES,
  Clause,
  Move,
  Output,
  Repertoire,
  Writer,
)

_SYMBOLS = ('HRBR', 'ORCD', 'LGTH', 'QURY', 'MRKT', 'OBSV', 'GRNH', 'FNDY', 'FERY', 'ARCV')
_PENDING = ('Open', 'Pending')

# --- messages -------------------------------------------------------------------------------------------------------------


def _message_scenario(w: Writer) -> dict[str, Any]:
  names, first = w.several(FIRST, 5), w.number(20, 900)
  users = {name.title(): f'USR{first + i:03}' for i, name in enumerate(names)}
  me, *others = users.values()
  inbox = [{w.choice(others): f'{w.choice(PLACES)}: {w.choice(LINES)}'} for _ in range(4)]
  return {
    'random_seed': w.number(1, 10**6),
    'user_count': first + 4,
    'user_map': users,
    'inbox': inbox,
    'message_count': 4,
    'current_user': me,
  }


def _others(w: Writer) -> list[str]:
  return [user for user in w.api.user_map.values() if user != w.api.current_user]


def _send(w: Writer, chained: bool) -> Clause | None:
  found, words = w.which(chained, _others(w), 'user', 'user {}'), w.choice(LINES)
  call = found and ToolCall('send_message', {'receiver_id': found[1], 'message': words})
  return found and Clause(
    f'send "{words}" to {found[0]}',
    [call],
    f'User {found[1]} has your message.',
    chained,
    (f'send a message to {found[0]}', 'What shall the message say?'),
  )


def _write_to(w: Writer, chained: bool) -> Clause:
  """One subtask of two calls: who is named is looked up first."""
  (name, user), words = (
    w.choice([(n, u) for n, u in w.api.user_map.items() if u != w.api.current_user]),
    w.choice(LINES),
  )
  return Clause(
    f'look up {name} and send them "{words}"',
    [
      ToolCall('get_user_id', {'user': name}),
      ToolCall('send_message', {'receiver_id': user, 'message': words}),
    ],
    f'{name} has your message.',
    partial=(f'look up {name} and send them a message', 'What shall the message say?'),
  )


def _look_up(w: Writer, chained: bool) -> Clause:
  name = w.choice(w.api.user_map)
  return Clause(
    f'look up the user id of {name}',
    [ToolCall('get_user_id', {'user': name})],
    f'The user id of {name} is found.',
    partial=('look up the user id of my colleague', 'What is the name of your colleague?'),
    makes=('that user', Output('user_id')),
  )


def _add_contact(w: Writer, chained: bool) -> Clause | None:
  names = [name.title() for name in FIRST if name.title() not in w.api.user_map]
  if not names:
    return None
  name = w.choice(names)
  return Clause(
    f'add {name} to my contacts',
    [ToolCall('add_contact', {'user_name': name})],
    f'{name} is among your contacts now.',
    partial=('add somebody to my contacts', 'What is the name of the new contact?'),
    makes=('that contact', Output('user_id')),
  )


def _delete_message(w: Writer, chained: bool) -> Clause | None:
  found = w.which(
    chained, sorted({user for message in w.api.inbox for user in message}), 'user', 'user {}'
  )
  return found and Clause(
    f'delete the latest message to {found[0]}',
    [ToolCall('delete_message', {'receiver_id': found[1]})],
    f'The latest message to user {found[1]} is deleted.',
    chained,
    ('delete a message of mine', 'To whom was the message?'),
  )


def _sent(w: Writer, chained: bool) -> Clause:
  return Clause(
    'show me the messages that I have sent',
    [ToolCall('view_messages_sent', {})],
    'Here are your messages.',
    makes=NOTHING,
  )


def _find_messages(w: Writer, chained: bool) -> Clause:
  word = w.choice(PLACES)
  return Clause(
    f'search my messages for "{word}"',
    [ToolCall('search_messages', {'keyword': word})],
    f'These are the messages about "{word}".',
    partial=('search my messages', 'What shall I search for?'),
    makes=NOTHING,
  )


def _message_counts(w: Writer, chained: bool) -> Clause:
  return Clause(
    'get the statistics of my messages',
    [ToolCall('get_message_stats', {})],
    'Here are the statistics.',
    makes=NOTHING,
  )


# --- trading --------------------------------------------------------------------------------------------------------------


def _trading_scenario(w: Writer) -> dict[str, Any]:
  symbols = w.several(_SYMBOLS, 6)
  stocks = {
    symbol: {
      'price': w.number(800, 40_000) / 100,
      'percent_change': w.number(-500, 500) / 100,
      'volume': w.number(500, 5000) / 1000,
      'MA(5)': w.number(800, 40_000) / 100,
      'MA(20)': w.number(800, 40_000) / 100,
    }
    for symbol in symbols
  }
  first = w.number(2000, 90_000)
  orders = {
    str(first + i): {
      'id': first + i,
      'order_type': w.choice(('Buy', 'Sell')),
      'symbol': w.choice(symbols),
      'price': w.number(800, 40_000) / 100,
      'amount': w.number(1, 60),
      'status': 'Open' if i else 'Completed',
    }
    for i in range(4)
  }
  account = {
    'account_id': w.number(10_000, 99_999),
    'balance': float(w.number(20, 300) * 100),
    'binding_card': w.number(10**15, 2 * 10**15),
  }
  return {
    'orders': orders,
    'account_info': account,
    'authenticated': True,
    'market_status': 'Open',
    'order_counter': first + 4,
    'stocks': stocks,
    'watch_list': symbols[:3],
    'transaction_history': [],
    'random_seed': w.number(1, 10**6),
  }


def _quote(w: Writer, chained: bool) -> Clause | None:
  found = w.which(chained, w.api.stocks, 'stock')
  return found and Clause(
    f'show me the figures of {found[0]}',
    [ToolCall('get_stock_info', {'symbol': found[1]})],
    f'These are the figures of {found[1]}.',
    chained,
    ('show me the figures of a stock', 'Of which stock?'),
  )


def _order(order_type: str) -> Move:
  """A move that places an order; its number is the next one."""
  verb = order_type.lower()

  def move(w: Writer, chained: bool) -> Clause | None:
    found, amount, price = (
      w.which(chained, w.api.stocks, 'stock'),
      w.number(2, 90),
      w.number(800, 40_000) / 100,
    )
    call = found and ToolCall(
      'place_order',
      {'order_type': order_type, 'symbol': found[1], 'price': price, 'amount': amount},
    )
    return found and Clause(
      f'{verb} {amount} shares of {found[0]} at {price} dollars',
      [call],
      f'The order to {verb} {found[1]} is placed.',
      chained,
      (f'{verb} shares of {found[0]}', 'How many shares, and at which price?'),
      ('that order', w.api.order_counter),
    )

  return move


def _show_order(w: Writer, chained: bool) -> Clause | None:
  found = w.which(chained, w.api.orders, 'order', 'order {}')
  return found and Clause(
    f'show me {found[0]}',
    [ToolCall('get_order_details', {'order_id': found[1]})],
    f'This is order {found[1]}.',
    chained,
    ('show me an order', 'What is the number of the order?'),
  )


def _cancel_order(w: Writer, chained: bool) -> Clause | None:
  pending = [number for number, order in w.api.orders.items() if order['status'] in _PENDING]
  found = w.which(chained, pending, 'order', 'order {}')
  return found and Clause(
    f'cancel {found[0]}',
    [ToolCall('cancel_order', {'order_id': found[1]})],
    f'Order {found[1]} is cancelled.',
    chained,
    ('cancel my order', 'Which order shall I cancel?'),
  )


def _watch(w: Writer, chained: bool) -> Clause | None:
  found = w.which(
    chained, [symbol for symbol in w.api.stocks if symbol not in w.api.watch_list], 'stock'
  )
  return found and Clause(
    f'put {found[0]} on my watchlist',
    [ToolCall('add_to_watchlist', {'stock': found[1]})],
    f'{found[1]} is on your watchlist.',
    chained,
    ('put a stock on my watchlist', 'Which stock shall I add?'),
  )


def _unwatch(w: Writer, chained: bool) -> Clause | None:
  found = w.which(chained, w.api.watch_list, 'stock')
  return found and Clause(
    f'take {found[0]} off my watchlist',
    [ToolCall('remove_stock_from_watchlist', {'symbol': found[1]})],
    f'{found[1]} is off your watchlist.',
    chained,
    ('take a stock off my watchlist', 'Which stock shall I take off?'),
  )


def _moved(w: Writer, chained: bool) -> Clause:
  stocks, percent = w.several(w.api.stocks, 2), w.number(1, 4)
  call = ToolCall('notify_price_change', {'stocks': stocks, 'threshold': percent})
  return Clause(
    f'tell me whether {" or ".join(stocks)} moved by {percent} percent or more',
    [call],
    f'{" and ".join(stocks)} have been checked.',
    partial=(
      f'tell me whether {" or ".join(stocks)} moved much',
      'From how many percent is it much?',
    ),
  )


def _fund(w: Writer, chained: bool) -> Clause:
  amount = w.number(2, 90) * 50
  return Clause(
    f'add {amount} dollars to my account',
    [ToolCall('fund_account', {'amount': amount})],
    f'{amount} dollars have been added.',
    partial=('add money to my account', 'How much shall I add?'),
  )


def _withdraw(w: Writer, chained: bool) -> Clause | None:
  account = w.api.account_info
  if account['balance'] < 500:
    return None
  amount = w.number(1, 9) * 50
  call = ToolCall(
    'make_transaction',
    {'account_id': account['account_id'], 'xact_type': 'withdrawal', 'amount': amount},
  )
  return Clause(
    f'make a withdrawal of {amount} dollars from account {account["account_id"]}',
    [call],
    f'{amount} dollars have been withdrawn.',
    partial=(
      f'make a withdrawal from account {account["account_id"]}',
      'How much shall I withdraw?',
    ),
  )


def _look(tool: str, words: str, report: str) -> Move:
  """A move that lists something of the account."""

  def move(w: Writer, chained: bool) -> Clause:
    return Clause(words, [ToolCall(tool, {})], report, makes=NOTHING)

  return move


# --- calculator -----------------------------------------------------------------------------------------------------------

_LENGTHS = ('km', 'm', 'cm', 'mm')
_IMPERIAL = (
  ('cm', 'in'),
  ('in', 'cm'),
  ('m', 'ft'),
  ('ft', 'm'),
  ('km', 'miles'),
  ('miles', 'km'),
  ('kg', 'lb'),
  ('lb', 'kg'),
)


def _numbers_scenario(w: Writer) -> dict[str, Any]:
  """The calculator remembers nothing: what a wrong call gives is seen in its output alone."""
  del w
  return {}


def _over_list(tool: str, words: str) -> Move:
  def move(w: Writer, chained: bool) -> Clause:
    numbers = [w.number(2, 95) for _ in range(w.number(4, 6))]
    listed = f'{", ".join(map(str, numbers[:-1]))} and {numbers[-1]}'
    return Clause(
      f'work out the {words} of {listed}',
      [ToolCall(tool, {'numbers': numbers})],
      f'The {words} has been worked out.',
      partial=(f'work out the {words} of my numbers', 'Which numbers are they?'),
      makes=('that result', Output('result')),
    )

  return move


def _over_two(tool: str, words: str, high: int) -> Move:
  """A move on two numbers, of which the first may be an earlier result: `words` with {0} and {1}, the second up to `high`."""
  first, second = {'power': ('base', 'exponent'), 'percentage': ('part', 'whole')}.get(
    tool, ('a', 'b')
  )

  def move(w: Writer, chained: bool) -> Clause | None:
    name, value = w.latest if chained else ('', w.number(3, 95))
    if chained and name != 'that result':
      return None
    other = w.number(2, high)
    return Clause(
      words.format(name or value, other),
      [ToolCall(tool, {first: value, second: other})],
      'That has been worked out.',
      chained,
      (words.format(name or value, 'another number'), 'Which other number do you mean?'),
      ('that result', Output('result')),
    )

  return move


def _convert(w: Writer, chained: bool) -> Clause:
  value, metric = w.number(3, 700), w.rng.random() < 0.5
  unit_in, unit_out = w.rng.permutation(_LENGTHS)[:2].tolist() if metric else w.choice(_IMPERIAL)
  call = ToolCall(
    'si_unit_conversion' if metric else 'imperial_si_conversion',
    {'value': value, 'unit_in': unit_in, 'unit_out': unit_out},
  )
  return Clause(
    f'convert {value} {unit_in} to {unit_out}',
    [call],
    f'{value} {unit_in} have been converted to {unit_out}.',
    partial=(f'convert {value} {unit_in}', 'To which unit shall I convert it?'),
    makes=('that result', Output('result')),
  )


def _round(w: Writer, chained: bool) -> Clause:
  number, places = w.number(10**6, 10**7) / 10**5, w.number(1, 2)
  call = ToolCall('round_number', {'number': number, 'decimal_places': places})
  return Clause(
    f'round {number} to {places} decimal places',
    [call],
    f'{number} has been rounded.',
    partial=(f'round {number}', 'To how many decimal places?'),
    makes=('that result', Output('result')),
  )


REPERTOIRES = {
  'MessageAPI': Repertoire(
    _message_scenario,
    (
      _send,
      _write_to,
      _look_up,
      _add_contact,
      _delete_message,
      _sent,
      _find_messages,
      _message_counts,
    ),
    frozenset({'send_message', 'add_contact', 'delete_message'}),
  ),
  'TradingBot': Repertoire(
    _trading_scenario,
    (
      _quote,
      _order('Buy'),
      _order('Sell'),
      _show_order,
      _cancel_order,
      _watch,
      _unwatch,
      _moved,
      _fund,
      _withdraw,
      _look('get_watchlist', 'show me my watchlist', 'This is your watchlist.'),
      _look('get_account_info', 'show me my account', 'This is your account.'),
      _look(
        'get_order_history',
        'list the numbers of my orders',
        'These are the numbers of your orders.',
      ),
    ),
    frozenset(
      {
        'get_stock_info',
        'place_order',
        'get_order_details',
        'cancel_order',
        'add_to_watchlist',
        'remove_stock_from_watchlist',
        'get_watchlist',
        'get_account_info',
        'get_order_history',
      }
    ),
  ),
  'MathAPI': Repertoire(
    _numbers_scenario,
    (
      _over_list('mean', 'mean'),
      _over_list('standard_deviation', 'standard deviation'),
      _over_list('sum_values', 'sum'),
      _over_list('max_value', 'largest'),
      _over_list('min_value', 'smallest'),
      _over_two('add', 'add {1} to {0}', 95),
      _over_two('subtract', 'subtract {1} from {0}', 95),
      _over_two('multiply', 'multiply {0} by {1}', 30),
      _over_two('divide', 'divide {0} by {1}', 10),
      _over_two('power', 'raise {0} to the power of {1}', 4),
      _over_two('percentage', 'work out what percentage {0} is of {1}', 200),
      _convert,
      _round,
    ),
    frozenset({'round_number'}),
  ),
}
