"""What can be asked of BFCL's travel agency."""

from typing import Any

from dcore_jax.chat.messages import ToolCall
from dcore_jax.worlds.bfcl_writer import (
  FIRST,
  LAST,
  LINES,
  Clause,
  Mention,
  Output,
  Repertoire,
  Writer,
)

# Some of the cities that the API knows, and their airports.
_AIRPORTS = {
  'San Francisco': 'SFO',
  'Los Angeles': 'LAX',
  'New York': 'JFK',
  'Chicago': 'ORD',
  'Boston': 'BOS',
  'Rivermist': 'RMS',
  'Stonebrook': 'SBK',
  'Maplecrest': 'MPC',
  'Silverpine': 'SVP',
}
# Flights that the API knows in this direction; it has no price for others.
_ROUTES = (
  ('SFO', 'ORD'),
  ('SFO', 'SVP'),
  ('SFO', 'GFD'),
  ('LAX', 'SBK'),
  ('LAX', 'CRH'),
  ('JFK', 'BOS'),
  ('JFK', 'HND'),
  ('ORD', 'MPC'),
  ('ORD', 'PHV'),
  ('BOS', 'RMS'),
  ('BOS', 'OKD'),
  ('RMS', 'SVP'),
  ('SBK', 'SHD'),
  ('MPC', 'OKD'),
  ('SVP', 'SSV'),
)
# Cabin classes, kinds of insurance and currencies to draw from.
_CLASSES = ('economy', 'business', 'first')
_COVERS = ('baggage', 'cancellation', 'medical', 'delay')
_CURRENCIES = ('RMB', 'EUR', 'JPY', 'GBP', 'CAD', 'AUD', 'INR', 'BRL', 'MXN')


# A logged-in user with two cards and three bookings.
def _travel_scenario(w: Writer) -> dict[str, Any]:
  first = w.choice(FIRST).title()
  last = w.choice(LAST)
  token = str(w.number(10**5, 10**6 - 1))
  # Ids of twelve digits and numbers of sixteen, as the API makes them.
  cards = {
    str(w.number(10**11, 10**12 - 1)): {
      'card_number': str(w.number(4 * 10**15, 5 * 10**15)),
      'expiration_date': f'{w.number(1, 12):02}/20{w.number(28, 33)}',
      'cardholder_name': f'{first} {last}',
      'card_verification_number': w.number(100, 999),
      'balance': w.number(90, 600) * 100,
    }
    for _ in range(2)
  }
  # Past bookings, to be cancelled, insured or invoiced.
  bookings = {}
  for _ in range(3):
    start, end = w.choice(_ROUTES)
    # Seven digits, like the numbers that the API gives out.
    number = str(w.number(10**6, 10**7 - 1))
    bookings[number] = {
      'card_id': w.choice(cards),
      'travel_date': _date(w),
      'travel_from': start,
      'travel_to': end,
      'travel_class': w.choice(_CLASSES),
      'travel_cost': float(w.number(2, 40) * 50),
      'transaction_id': str(w.number(10**7, 10**8 - 1)),
    }
  # The token is part of nearly every call, and a model can know it from the prompt alone.
  w.briefing = f'The user is logged in to the travel system with the access token {token}.'
  return {
    'random_seed': w.number(1, 10**6),
    'credit_card_list': cards,
    'booking_record': bookings,
    'access_token': token,
    'token_type': 'Bearer',
    'token_expires_in': 1000,
    'token_scope': 'read_write',
    'user_first_name': first,
    'user_last_name': last,
  }


# Never beyond the 28th, which every month has.
def _date(w: Writer) -> str:
  return f'2027-{w.number(1, 12):02}-{w.number(1, 28):02}'


# Arguments of a call that needs the user's token.
def _token(w: Writer, **arguments: Any) -> dict[str, Any]:
  # The token of the live API, which the briefing has named.
  return {'access_token': w.api.access_token, **arguments}


def _cards(w: Writer, balance: float) -> list[str]:
  """The cards that the user can name and that hold at least `balance` dollars."""
  return [
    card
    for card, record in w.api.credit_card_list.items()
    # A card that was registered in this turn has an id that the user has not seen.
    if card not in w.fresh and record['balance'] >= balance
  ]


def _flight_cost(w: Writer, chained: bool) -> Clause | None:
  # Chained, the start is the airport that was found before.
  found = w.which(chained, sorted({start for start, _ in _ROUTES}), 'airport')
  if not found:
    return None
  # Only routes with a price, since the API refuses others.
  end = w.choice([end for start, end in _ROUTES if start == found.value])
  date = _date(w)
  cabin = w.choice(_CLASSES)
  call = ToolCall(
    'get_flight_cost',
    {'travel_from': found.value, 'travel_to': end, 'travel_date': date, 'travel_class': cabin},
  )
  return Clause(
    text=f'get the price of a flight in {cabin} class from {found.words} to {end} on {date}',
    calls=[call],
    report=f'This is the price of the flight to {end}.',
    chained=chained,
    partial=(
      f'get the price of a flight from {found.words} to {end} on {date}',
      'In which class do you want to fly?',
    ),
  )


def _book_flight(w: Writer, chained: bool) -> Clause | None:
  start, end = w.choice(_ROUTES)
  date = _date(w)
  cabin = w.choice(_CLASSES)
  # The price is asked of the live API, whose tables decide it.
  (cost,) = w.api.get_flight_cost(start, end, date, cabin)['travel_cost_list']
  # The API compares the card's balance with the budget limit as well as with the price.
  cards = _cards(w, max(cost, w.api.budget_limit or 0))
  if not cards:
    return None
  card = w.choice(cards)
  call = ToolCall(
    'book_flight',
    # Every detail is in the request: nothing has to be guessed.
    _token(w, card_id=card, travel_date=date, travel_from=start, travel_to=end, travel_class=cabin),
  )
  return Clause(
    text=f'book a flight in {cabin} class from {start} to {end} on {date} with card {card}',
    calls=[call],
    report=f'The flight to {end} is booked.',
    partial=(
      f'book a flight from {start} to {end} with card {card}',
      'When and in which class do you want to fly?',
    ),
    # The API makes the booking's number up: it is known when the call has run.
    makes=Mention('that booking', Output('booking_id')),
  )


def _cancel_booking(w: Writer, chained: bool) -> Clause | None:
  found = w.which(chained, w.api.booking_record, 'booking', 'booking {}')
  if not found:
    return None
  return Clause(
    text=f'cancel {found.words}',
    calls=[ToolCall('cancel_booking', _token(w, booking_id=found.value))],
    report=f'Booking {found.value} is cancelled.',
    chained=chained,
    partial=('cancel my booking', 'Which booking do you mean?'),
  )


def _invoice(w: Writer, chained: bool) -> Clause | None:
  found = w.which(chained, w.api.booking_record, 'booking', 'booking {}')
  if not found:
    return None
  return Clause(
    text=f'get the invoice of {found.words}',
    calls=[ToolCall('retrieve_invoice', _token(w, booking_id=found.value))],
    report=f'This is the invoice of booking {found.value}.',
    chained=chained,
    partial=('get me an invoice', 'Of which booking do you want the invoice?'),
  )


def _insure(w: Writer, chained: bool) -> Clause | None:
  found = w.which(chained, w.api.booking_record, 'booking', 'booking {}')
  cover = w.choice(_COVERS)
  # Multiples of 5 dollars, from 20 to 150.
  cost = w.number(4, 30) * 5
  cards = _cards(w, cost)
  # Above the budget limit the API refuses; cards that could not pay are left out.
  if not found or not cards or (w.api.budget_limit is not None and w.api.budget_limit < cost):
    return None
  card = w.choice(cards)
  call = ToolCall(
    'purchase_insurance',
    _token(w, insurance_type=cover, booking_id=found.value, insurance_cost=cost, card_id=card),
  )
  return Clause(
    text=f'buy {cover} insurance for {found.words} for {cost} dollars with card {card}',
    calls=[call],
    report=f'Booking {found.value} is insured.',
    chained=chained,
    partial=(
      f'buy {cover} insurance for {found.words}',
      'What may it cost, and which card pays for it?',
    ),
  )


# The one request about a booking that needs no token.
def _ask_support(w: Writer, chained: bool) -> Clause | None:
  found = w.which(chained, w.api.booking_record, 'booking', 'booking {}')
  words = w.choice(LINES)
  if not found:
    return None
  return Clause(
    text=f'write "{words}" to customer support about {found.words}',
    calls=[ToolCall('contact_customer_support', {'booking_id': found.value, 'message': words})],
    report=f'Customer support has your message about booking {found.value}.',
    chained=chained,
    partial=(f'write to customer support about {found.words}', 'What shall I write?'),
  )


def _balance(w: Writer, chained: bool) -> Clause | None:
  # Chained, the card is the one that was registered before.
  found = w.which(chained, w.api.credit_card_list, 'card', 'card {}')
  if not found:
    return None
  return Clause(
    text=f'get the balance of {found.words}',
    calls=[ToolCall('get_credit_card_balance', _token(w, card_id=found.value))],
    report=f'This is the balance of card {found.value}.',
    chained=chained,
    partial=('get the balance of my card', 'Of which card?'),
  )


def _register_card(w: Writer, chained: bool) -> Clause:
  # 16 digits that begin with 4, as numbers of credit cards do.
  number = str(w.number(4 * 10**15, 5 * 10**15))
  code = w.number(100, 999)
  expires = f'{w.number(1, 12):02}/20{w.number(28, 33)}'
  holder = f'{w.choice(FIRST).title()} {w.choice(LAST)}'
  call = ToolCall(
    'register_credit_card',
    _token(
      w,
      card_number=number,
      expiration_date=expires,
      cardholder_name=holder,
      card_verification_number=code,
    ),
  )
  return Clause(
    text=(
      f'register the credit card {number} of {holder}, which expires {expires} '
      f'and has the code {code}'
    ),
    calls=[call],
    report=f'The card of {holder} is registered.',
    partial=(
      f'register a credit card of {holder}',
      'What are its number, its date of expiry and its code?',
    ),
    # The API answers with an id of its own, by which later calls name the card.
    makes=Mention('that card', Output('card_id')),
  )


# It changes which later purchases are possible.
def _budget(w: Writer, chained: bool) -> Clause:
  limit = w.number(5, 40) * 50
  return Clause(
    text=f'set my budget limit to {limit} dollars',
    calls=[ToolCall('set_budget_limit', _token(w, budget_limit=limit))],
    report=f'Your budget limit is {limit} dollars.',
    partial=('set a budget limit', 'How much shall the limit be?'),
  )


def _exchange(w: Writer, chained: bool) -> Clause:
  amount = w.number(2, 90) * 10
  currency = w.choice(_CURRENCIES)
  call = ToolCall(
    # Always from dollars: the API has no rates from other currencies.
    'compute_exchange_rate',
    {'base_currency': 'USD', 'target_currency': currency, 'value': amount},
  )
  return Clause(
    text=f'convert {amount} USD to {currency}',
    calls=[call],
    report=f'{amount} USD have been converted to {currency}.',
    partial=(f'convert my dollars to {currency}', 'How many dollars are there?'),
  )


def _airport(w: Writer, chained: bool) -> Clause:
  # Cities by name: the call looks the code up.
  city = w.choice(_AIRPORTS)
  return Clause(
    text=f'find the airport nearest to {city}',
    calls=[ToolCall('get_nearest_airport_by_city', {'location': city})],
    report=f'The airport nearest to {city} is found.',
    partial=('find the nearest airport', 'Nearest to which city?'),
    # The code is in the output alone: a later clause can only say "that airport".
    makes=Mention('that airport', Output('nearest_airport')),
  )


def _verify_traveller(w: Writer, chained: bool) -> Clause:
  first = w.api.user_first_name
  last = w.api.user_last_name
  # Born before 1996: the API verifies nobody below 18.
  born = f'{w.number(1950, 1995)}-{w.number(1, 12):02}-{w.number(1, 28):02}'
  # The API takes passports of the United States alone.
  passport = f'US{w.number(10**6, 10**7 - 1)}'
  call = ToolCall(
    'verify_traveler_information',
    # The name must be that of the user, which the API checks.
    {'first_name': first, 'last_name': last, 'date_of_birth': born, 'passport_number': passport},
  )
  return Clause(
    text=f'verify that {first} {last}, born on {born} with passport {passport}, may travel',
    calls=[call],
    report=f'The details of {first} {last} have been verified.',
    partial=(
      f'verify that {first} {last} may travel',
      'What are the date of birth and the passport number?',
    ),
  )


REPERTOIRES = {
  'TravelAPI': Repertoire(
    scenario=_travel_scenario,
    moves=(
      _flight_cost,
      _book_flight,
      _cancel_booking,
      _invoice,
      _insure,
      _ask_support,
      _balance,
      _register_card,
      _budget,
      _exchange,
      _airport,
      _verify_traveller,
    ),
    # All but the balance, which `get_all_credit_cards` shows as well.
    sole=frozenset(
      {
        'get_flight_cost',
        'book_flight',
        'cancel_booking',
        'retrieve_invoice',
        'purchase_insurance',
        'contact_customer_support',
        'register_credit_card',
        'set_budget_limit',
        'compute_exchange_rate',
        'get_nearest_airport_by_city',
        'verify_traveler_information',
      }
    ),
  ),
}
