"""What can be asked of BFCL's messages, trading account and calculator."""

from typing import Any

from dcore_jax.chat.messages import ToolCall
from dcore_jax.worlds.bfcl_writer import (
  FIRST,
  LINES,
  NOTHING,
  PLACES,
  Clause,
  Mention,
  Move,
  Output,
  Repertoire,
  Writer,
)

_SYMBOLS = ('HRBR', 'ORCD', 'LGTH', 'QURY', 'MRKT', 'OBSV', 'GRNH', 'FNDY', 'FERY', 'ARCV')
_PENDING = ('Open', 'Pending')  # the states in which an order can be cancelled

# --- messages ---


# Users, their ids and the inbox. The first user is the one who asks.
def _message_scenario(w: Writer) -> dict[str, Any]:
  names = w.several(FIRST, 5)
  first = w.number(20, 900)
  # Ids follow each other, as those that the API gives out will continue.
  users = {name.title(): f'USR{first + i:03}' for i, name in enumerate(names)}
  me, *others = users.values()
  inbox = [{w.choice(others): f'{w.choice(PLACES)}: {w.choice(LINES)}'} for _ in range(4)]
  # Fields and types are those of BFCL's own scenarios, which `_load_scenario` reads.
  return {
    'random_seed': w.number(1, 10**6),
    'user_count': first + 4,
    'user_map': users,
    'inbox': inbox,
    'message_count': 4,
    'current_user': me,
  }


# Nobody writes to themselves.
def _others(w: Writer) -> list[str]:
  # From the live API: contacts may have been added since the scenario.
  return [user for user in w.api.user_map.values() if user != w.api.current_user]


# Chained, the receiver is the user that was looked up or added before.
def _send(w: Writer, chained: bool) -> Clause | None:
  found = w.which(chained, _others(w), 'user', 'user {}')
  words = w.choice(LINES)
  # None says that this draw does not fit the state; another one follows.
  if not found:
    return None
  return Clause(
    text=f'send "{words}" to {found.words}',
    calls=[ToolCall('send_message', {'receiver_id': found.value, 'message': words})],
    report=f'User {found.value} has your message.',
    chained=chained,
    partial=(f'send a message to {found.words}', 'What shall the message say?'),
  )


def _write_to(w: Writer, chained: bool) -> Clause:
  """One subtask of two calls: the user's id is looked up first."""
  # Names and ids together: the name is asked for, the id is what the reference sends to.
  name, user = w.choice([(n, u) for n, u in w.api.user_map.items() if u != w.api.current_user])
  words = w.choice(LINES)
  return Clause(
    text=f'look up {name} and send them "{words}"',
    calls=[
      ToolCall('get_user_id', {'user': name}),
      ToolCall('send_message', {'receiver_id': user, 'message': words}),
    ],
    report=f'{name} has your message.',
    partial=(f'look up {name} and send them a message', 'What shall the message say?'),
  )


# Its result is not in the request: a later clause can refer to "that user".
def _look_up(w: Writer, chained: bool) -> Clause:
  name = w.choice(w.api.user_map)
  return Clause(
    text=f'look up the user id of {name}',
    calls=[ToolCall('get_user_id', {'user': name})],
    # The report does not repeat the id, which only the output holds.
    report=f'The user id of {name} is found.',
    partial=('look up the user id of my colleague', 'What is the name of your colleague?'),
    makes=Mention('that user', Output('user_id')),
  )


def _add_contact(w: Writer, chained: bool) -> Clause | None:
  # A name that is there already would be refused.
  names = [name.title() for name in FIRST if name.title() not in w.api.user_map]
  if not names:
    return None
  name = w.choice(names)
  return Clause(
    text=f'add {name} to my contacts',
    calls=[ToolCall('add_contact', {'user_name': name})],
    report=f'{name} is among your contacts now.',
    partial=('add somebody to my contacts', 'What is the name of the new contact?'),
    makes=Mention('that contact', Output('user_id')),
  )


# The API deletes the latest message to a user, so that only receivers can be named.
def _delete_message(w: Writer, chained: bool) -> Clause | None:
  users: set[str] = set()
  # The inbox is a list of {receiver: message}.
  for message in w.api.inbox:
    users |= message.keys()
  found = w.which(chained, sorted(users), 'user', 'user {}')
  if not found:
    return None
  return Clause(
    text=f'delete the latest message to {found.words}',
    calls=[ToolCall('delete_message', {'receiver_id': found.value})],
    report=f'The latest message to user {found.value} is deleted.',
    chained=chained,
    partial=('delete a message of mine', 'To whom was the message?'),
  )


def _sent(w: Writer, chained: bool) -> Clause:
  return Clause(
    text='show me the messages that I have sent',
    calls=[ToolCall('view_messages_sent', {})],
    report='Here are your messages.',
    # A list has nothing that "that ..." could refer to.
    makes=NOTHING,
  )


def _find_messages(w: Writer, chained: bool) -> Clause:
  word = w.choice(PLACES)
  return Clause(
    text=f'search my messages for "{word}"',
    calls=[ToolCall('search_messages', {'keyword': word})],
    report=f'These are the messages about "{word}".',
    partial=('search my messages', 'What shall I search for?'),
    makes=NOTHING,
  )


def _message_counts(w: Writer, chained: bool) -> Clause:
  return Clause(
    text='get the statistics of my messages',
    calls=[ToolCall('get_message_stats', {})],
    report='Here are the statistics.',
    makes=NOTHING,
  )


# --- trading ---


# Made-up figures of stocks, orders and an account, in dollars.
def _trading_scenario(w: Writer) -> dict[str, Any]:
  # Six of ten, so that states differ in the stocks they have.
  symbols = w.several(_SYMBOLS, 6)
  # Prices have cents.
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
  # Numbers below the counter, so that the next order is the next number.
  first = w.number(2000, 90_000)
  orders = {
    str(first + i): {
      'id': first + i,
      'order_type': w.choice(('Buy', 'Sell')),
      'symbol': w.choice(symbols),
      'price': w.number(800, 40_000) / 100,
      'amount': w.number(1, 60),
      # The first order is completed, and therefore cannot be cancelled.
      'status': 'Open' if i else 'Completed',
    }
    for i in range(4)
  }
  # Balances of 2,000 to 30,000 dollars.
  account = {
    'account_id': w.number(10_000, 99_999),
    'balance': float(w.number(20, 300) * 100),
    'binding_card': w.number(10**15, 2 * 10**15),
  }
  return {
    # Logged in, with an open market: otherwise transactions would fail.
    'orders': orders,
    'account_info': account,
    'authenticated': True,
    'market_status': 'Open',
    'order_counter': first + 4,
    'stocks': stocks,
    # Half of the stocks, so that some can be added and some removed.
    'watch_list': symbols[:3],
    'transaction_history': [],
    'random_seed': w.number(1, 10**6),
  }


def _quote(w: Writer, chained: bool) -> Clause | None:
  found = w.which(chained, w.api.stocks, 'stock')
  if not found:
    return None
  return Clause(
    text=f'show me the figures of {found.words}',
    calls=[ToolCall('get_stock_info', {'symbol': found.value})],
    report=f'These are the figures of {found.value}.',
    chained=chained,
    partial=('show me the figures of a stock', 'Of which stock?'),
  )


def _order(order_type: str) -> Move:
  """A move that places an order; its number is the next one."""
  # The words of the request and the report follow from the type.
  verb = order_type.lower()

  def move(w: Writer, chained: bool) -> Clause | None:
    # Stocks are named by symbol; `which` draws one, or takes the one spoken of.
    found = w.which(chained, w.api.stocks, 'stock')
    amount = w.number(2, 90)
    price = w.number(800, 40_000) / 100
    if not found:
      return None
    call = ToolCall(
      'place_order',
      {'order_type': order_type, 'symbol': found.value, 'price': price, 'amount': amount},
    )
    return Clause(
      text=f'{verb} {amount} shares of {found.words} at {price} dollars',
      calls=[call],
      report=f'The order to {verb} {found.value} is placed.',
      chained=chained,
      partial=(f'{verb} shares of {found.words}', 'How many shares, and at which price?'),
      # Known before the call: the API numbers orders by this counter.
      makes=Mention('that order', w.api.order_counter),
    )

  return move


def _show_order(w: Writer, chained: bool) -> Clause | None:
  found = w.which(chained, w.api.orders, 'order', 'order {}')
  if not found:
    return None
  return Clause(
    text=f'show me {found.words}',
    calls=[ToolCall('get_order_details', {'order_id': found.value})],
    report=f'This is order {found.value}.',
    chained=chained,
    partial=('show me an order', 'What is the number of the order?'),
  )


def _cancel_order(w: Writer, chained: bool) -> Clause | None:
  # A completed order would make the call fail.
  pending = [number for number, order in w.api.orders.items() if order['status'] in _PENDING]
  found = w.which(chained, pending, 'order', 'order {}')
  if not found:
    return None
  return Clause(
    text=f'cancel {found.words}',
    calls=[ToolCall('cancel_order', {'order_id': found.value})],
    report=f'Order {found.value} is cancelled.',
    chained=chained,
    partial=('cancel my order', 'Which order shall I cancel?'),
  )


# Only stocks that are not on the list yet.
def _watch(w: Writer, chained: bool) -> Clause | None:
  found = w.which(
    chained, [symbol for symbol in w.api.stocks if symbol not in w.api.watch_list], 'stock'
  )
  if not found:
    return None
  return Clause(
    text=f'put {found.words} on my watchlist',
    calls=[ToolCall('add_to_watchlist', {'stock': found.value})],
    report=f'{found.value} is on your watchlist.',
    chained=chained,
    partial=('put a stock on my watchlist', 'Which stock shall I add?'),
  )


# Only stocks that are on the list.
def _unwatch(w: Writer, chained: bool) -> Clause | None:
  found = w.which(chained, w.api.watch_list, 'stock')
  if not found:
    return None
  return Clause(
    text=f'take {found.words} off my watchlist',
    calls=[ToolCall('remove_stock_from_watchlist', {'symbol': found.value})],
    report=f'{found.value} is off your watchlist.',
    chained=chained,
    partial=('take a stock off my watchlist', 'Which stock shall I take off?'),
  )


def _moved(w: Writer, chained: bool) -> Clause:
  # Two, since the function takes a list.
  stocks = w.several(w.api.stocks, 2)
  # Whole percents: scenarios move by up to 5.
  percent = w.number(1, 4)
  call = ToolCall('notify_price_change', {'stocks': stocks, 'threshold': percent})
  return Clause(
    text=f'tell me whether {" or ".join(stocks)} moved by {percent} percent or more',
    calls=[call],
    report=f'{" and ".join(stocks)} have been checked.',
    partial=(
      f'tell me whether {" or ".join(stocks)} moved much',
      'From how many percent is it much?',
    ),
  )


def _fund(w: Writer, chained: bool) -> Clause:
  # Multiples of 50 dollars.
  amount = w.number(2, 90) * 50
  return Clause(
    text=f'add {amount} dollars to my account',
    calls=[ToolCall('fund_account', {'amount': amount})],
    report=f'{amount} dollars have been added.',
    partial=('add money to my account', 'How much shall I add?'),
  )


def _withdraw(w: Writer, chained: bool) -> Clause | None:
  account = w.api.account_info
  # At most 450 dollars are withdrawn, and the call must succeed.
  if account['balance'] < 500:
    return None
  amount = w.number(1, 9) * 50
  call = ToolCall(
    'make_transaction',
    {'account_id': account['account_id'], 'xact_type': 'withdrawal', 'amount': amount},
  )
  return Clause(
    text=f'make a withdrawal of {amount} dollars from account {account["account_id"]}',
    calls=[call],
    report=f'{amount} dollars have been withdrawn.',
    partial=(
      f'make a withdrawal from account {account["account_id"]}',
      'How much shall I withdraw?',
    ),
  )


def _look(tool: str, words: str, report: str) -> Move:
  """A move that lists something of the account."""

  def move(w: Writer, chained: bool) -> Clause:
    # No arguments and no value to leave out, so that `partial` is None.
    return Clause(text=words, calls=[ToolCall(tool, {})], report=report, makes=NOTHING)

  return move


# --- calculator ---

_LENGTHS = ('km', 'm', 'cm', 'mm')
# The API refuses pairs of units that are not in its table; these are.
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
  """An empty scenario: the calculator has no state, so a wrong call shows in its output alone."""
  del w
  return {}


def _over_list(tool: str, words: str) -> Move:
  """A move that works out one number from a list: `words` is what the number is called."""

  def move(w: Writer, chained: bool) -> Clause:
    # Small integers, so that results are short enough to be repeated in a later call.
    numbers = [w.number(2, 95) for _ in range(w.number(4, 6))]
    # As a person lists numbers: "4, 7 and 9".
    listed = f'{", ".join(map(str, numbers[:-1]))} and {numbers[-1]}'
    return Clause(
      text=f'work out the {words} of {listed}',
      calls=[ToolCall(tool, {'numbers': numbers})],
      report=f'The {words} has been worked out.',
      partial=(f'work out the {words} of my numbers', 'Which numbers are they?'),
      makes=Mention('that result', Output('result')),
    )

  return move


def _over_two(tool: str, words: str, high: int) -> Move:
  """A move on two numbers; the first of them may be an earlier result.

  Args:
    tool: the function.
    words: the request, with {0} and {1} for the numbers.
    high: the largest second number.
  """
  # The API names its two numbers differently in these two functions.
  first, second = {'power': ('base', 'exponent'), 'percentage': ('part', 'whole')}.get(
    tool, ('a', 'b')
  )

  def move(w: Writer, chained: bool) -> Clause | None:
    # A result of an earlier clause has the words "that result" in the request.
    name, value = w.latest if chained else ('', w.number(3, 95))
    # What was spoken of last may be no number of the calculator's.
    if chained and name != 'that result':
      return None
    other = w.number(2, high)
    return Clause(
      # The value itself, unless it is spoken of.
      text=words.format(name or value, other),
      calls=[ToolCall(tool, {first: value, second: other})],
      report='That has been worked out.',
      chained=chained,
      partial=(words.format(name or value, 'another number'), 'Which other number do you mean?'),
      makes=Mention('that result', Output('result')),
    )

  return move


def _convert(w: Writer, chained: bool) -> Clause:
  value = w.number(3, 700)
  # Half of the requests convert within the metric system.
  metric = w.rng.random() < 0.5
  unit_in, unit_out = w.rng.permutation(_LENGTHS)[:2].tolist() if metric else w.choice(_IMPERIAL)
  call = ToolCall(
    'si_unit_conversion' if metric else 'imperial_si_conversion',
    {'value': value, 'unit_in': unit_in, 'unit_out': unit_out},
  )
  return Clause(
    text=f'convert {value} {unit_in} to {unit_out}',
    calls=[call],
    report=f'{value} {unit_in} have been converted to {unit_out}.',
    partial=(f'convert {value} {unit_in}', 'To which unit shall I convert it?'),
    makes=Mention('that result', Output('result')),
  )


def _round(w: Writer, chained: bool) -> Clause:
  # Five decimals, so that one or two places change the number.
  number = w.number(10**6, 10**7) / 10**5
  # One or two places of five.
  places = w.number(1, 2)
  call = ToolCall('round_number', {'number': number, 'decimal_places': places})
  return Clause(
    text=f'round {number} to {places} decimal places',
    calls=[call],
    report=f'{number} has been rounded.',
    partial=(f'round {number}', 'To how many decimal places?'),
    makes=Mention('that result', Output('result')),
  )


REPERTOIRES = {
  'MessageAPI': Repertoire(
    scenario=_message_scenario,
    moves=(
      _send,
      _write_to,
      _look_up,
      _add_contact,
      _delete_message,
      _sent,
      _find_messages,
      _message_counts,
    ),
    # What the others show can be had in another way.
    sole=frozenset({'send_message', 'add_contact', 'delete_message'}),
  ),
  'TradingBot': Repertoire(
    scenario=_trading_scenario,
    moves=(
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
    sole=frozenset(
      # The functions whose effect no other function of this API has.
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
    scenario=_numbers_scenario,
    moves=(
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
    # A sum, a mean or a quotient can be had from other functions.
    sole=frozenset({'round_number'}),
  ),
}
