"""What can be asked of BFCL's car and of its travel agency."""

from typing import Any

from dcore_jax.chat.messages import ToolCall
from dcore_jax.worlds.bfcl_writer import (
  FIRST,
  LAST,
  LINES,
  NOTHING,
  PLACES,
  Clause,
  Move,
  Output,
  Repertoire,
  Writer,
)

_DOORS = {
  'driver': 'driver door',
  'passenger': 'passenger door',
  'rear_left': 'rear left door',
  'rear_right': 'rear right door',
}
_STATUS = {
  'fuel': 'fuel level',
  'battery': 'battery',
  'doors': 'doors',
  'climate': 'climate control',
  'headlights': 'headlights',
  'parkingBrake': 'parking brake',
  'engine': 'engine',
}
_CITIES = (
  'Rivermist',
  'Stonebrook',
  'Maplecrest',
  'Silverpine',
  'Shadowridge',
  'Oakendale',
  'Willowbend',
  'Autumnville',
)
_TANK = 50  # gallons

# --- car ------------------------------------------------------------------------------------------------------------------


def _car_scenario(w: Writer) -> dict[str, Any]:
  locked = w.rng.random() < 0.5
  doors = {door: 'locked' if locked or w.rng.random() < 0.4 else 'unlocked' for door in _DOORS}
  pedal = {'brakePedalStatus': 'pressed', 'brakePedalForce': 500.0} if w.rng.random() < 0.4 else {}
  return {
    'fuelLevel': w.number(20, 160) / 4,
    'batteryVoltage': w.number(115, 135) / 10,
    'engineState': 'stopped',
    'doorStatus': doors,
    'acTemperature': w.number(16, 28),
    'fanSpeed': 50,
    'acMode': 'auto',
    'humidityLevel': w.number(30, 60),
    'headLightStatus': w.choice(('on', 'off')),
    'parkingBrakeStatus': w.choice(('released', 'engaged')),
    'frontLeftTirePressure': w.number(27, 35),
    'frontRightTirePressure': w.number(27, 35),
    'rearLeftTirePressure': w.number(27, 35),
    'rearRightTirePressure': w.number(27, 35),
    'random_seed': w.number(1, 10**6),
    **pedal,
  }


def _fill_tank(w: Writer, chained: bool) -> Clause | None:
  room = _TANK - w.api.fuelLevel
  if chained:
    name, amount = w.latest
    if name != 'that amount' or amount > room:
      return None
    return Clause(
      'put that amount of fuel into the tank',
      [ToolCall('fillFuelTank', {'fuelAmount': amount})],
      'The fuel is in the tank.',
      True,
    )
  if room < 2:
    return None
  amount = w.number(1, int(room))
  return Clause(
    f'put {amount} gallons of fuel into the tank',
    [ToolCall('fillFuelTank', {'fuelAmount': amount})],
    f'{amount} gallons are in the tank.',
    partial=('put some fuel into the tank', 'How many gallons shall it be?'),
  )


def _to_gallons(w: Writer, chained: bool) -> Clause:
  litres = w.number(3, 90)
  return Clause(
    f'convert {litres} liters to gallons',
    [ToolCall('liter_to_gallon', {'liter': litres})],
    f'{litres} liters have been converted.',
    partial=('convert my liters to gallons', 'How many liters are there?'),
    makes=('that amount', Output('gallon')),
  )


def _doors(unlock: bool) -> Move:
  """A move that locks some of the open doors, or opens some of the locked ones; never all four, as many tests do."""
  verb, before = ('unlock', 'locked') if unlock else ('lock', 'unlocked')

  def move(w: Writer, chained: bool) -> Clause | None:
    candidates = [door for door, status in w.api.doorStatus.items() if status == before]
    if not candidates:
      return None
    doors = w.several(candidates, w.number(1, 2))
    names = ' and the '.join(_DOORS[door] for door in doors)
    return Clause(
      f'{verb} the {names}',
      [ToolCall('lockDoors', {'unlock': unlock, 'door': doors})],
      f'The {names}: {verb}ed.',
      partial=(f'{verb} one of the doors', f'Which door shall I {verb}?'),
    )

  return move


def _climate(w: Writer, chained: bool) -> Clause:
  degrees, fan, mode = w.number(16, 28), w.number(1, 9) * 10, w.choice(('cool', 'heat', 'defrost'))
  return Clause(
    f'set the climate control to {degrees} degrees Celsius in {mode} mode with a fan speed of {fan}',
    [ToolCall('adjustClimateControl', {'temperature': degrees, 'fanSpeed': fan, 'mode': mode})],
    f'The climate control is set to {degrees} degrees.',
    partial=(f'set the climate control to {mode} mode', 'Which temperature shall it be?'),
  )


def _headlights(w: Writer, chained: bool) -> Clause:
  mode = 'off' if w.api.headLightStatus == 'on' else 'on'
  return Clause(
    f'turn the headlights {mode}',
    [ToolCall('setHeadlights', {'mode': mode})],
    f'The headlights are {mode}.',
  )


def _parking_brake(w: Writer, chained: bool) -> Clause:
  mode = 'release' if w.api.parkingBrakeStatus == 'engaged' else 'engage'
  return Clause(
    f'{mode} the parking brake',
    [ToolCall('activateParkingBrake', {'mode': mode})],
    f'The parking brake: {mode}d.',
  )


def _brake_pedal(w: Writer, chained: bool) -> Clause:
  if w.api.brakePedalStatus == 'pressed':
    return Clause(
      'release the brake pedal', [ToolCall('releaseBrakePedal', {})], 'The brake pedal is released.'
    )
  position = w.choice((0.25, 0.5, 0.75))
  return Clause(
    f'press the brake pedal to position {position}',
    [ToolCall('pressBrakePedal', {'pedalPosition': position})],
    'The brake pedal is pressed.',
    partial=('press the brake pedal', 'How far, from 0 to 1, shall I press it?'),
  )


def _start_engine(w: Writer, chained: bool) -> Clause | None:
  """One subtask of two calls, where all doors are locked."""
  if w.api.remainingUnlockedDoors or w.api.engine_state == 'running':
    return None
  return Clause(
    'press the brake pedal to position 1 and start the engine',
    [
      ToolCall('pressBrakePedal', {'pedalPosition': 1}),
      ToolCall('startEngine', {'ignitionMode': 'START'}),
    ],
    'The engine is running.',
  )


def _car_status(w: Writer, chained: bool) -> Clause:
  option = w.choice(_STATUS)
  return Clause(
    f'show me the state of the {_STATUS[option]}',
    [ToolCall('displayCarStatus', {'option': option})],
    f'This is the state of the {_STATUS[option]}.',
    partial=('show me the state of a part of the car', 'Of which part?'),
  )


def _tire_shop(w: Writer, chained: bool) -> Clause:
  """Without the tires being checked before it: that would be a test's run of calls."""
  return Clause(
    'find the nearest tire shop',
    [ToolCall('find_nearest_tire_shop', {})],
    'The nearest tire shop is found.',
    makes=('that shop', Output('shopLocation')),
  )


def _navigate(w: Writer, chained: bool) -> Clause | None:
  name, place = w.latest
  if chained and name != 'that shop':
    return None
  if not chained:
    name = place = f'{w.number(2, 180)} {w.choice(PLACES).title()} Street, {w.choice(_CITIES)}, CA'
  return Clause(
    f'set the navigation to {name}',
    [ToolCall('set_navigation', {'destination': place})],
    f'We are going to {place}.',
    chained,
    ('set the navigation', 'What is the destination?'),
  )


def _feasible(w: Writer, chained: bool) -> Clause:
  miles = w.number(40, 900)
  return Clause(
    f'tell me whether the fuel is enough for {miles} miles',
    [ToolCall('estimate_drive_feasibility_by_mileage', {'distance': miles})],
    f'The range has been compared with {miles} miles.',
    partial=('tell me whether the fuel is enough for the trip', 'How many miles is the trip?'),
  )


def _zip_code(w: Writer, chained: bool) -> Clause:
  city = w.choice(_CITIES)
  return Clause(
    f'look up the zip code of {city}',
    [ToolCall('get_zipcode_based_on_city', {'city': city})],
    f'This is the zip code of {city}.',
    partial=('look up the zip code', 'Of which city?'),
    makes=NOTHING,
  )


# --- travel agency --------------------------------------------------------------------------------------------------------

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
)  # those that the API knows in this direction
_CLASSES = ('economy', 'business', 'first')
_COVERS = ('baggage', 'cancellation', 'medical', 'delay')
_CURRENCIES = ('RMB', 'EUR', 'JPY', 'GBP', 'CAD', 'AUD', 'INR', 'BRL', 'MXN')


def _travel_scenario(w: Writer) -> dict[str, Any]:
  first, last, token = w.choice(FIRST).title(), w.choice(LAST), str(w.number(10**5, 10**6 - 1))
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
  bookings = {}
  for _ in range(3):
    (start, end), number = w.choice(_ROUTES), str(w.number(10**6, 10**7 - 1))
    bookings[number] = {
      'card_id': w.choice(cards),
      'travel_date': _date(w),
      'travel_from': start,
      'travel_to': end,
      'travel_class': w.choice(_CLASSES),
      'travel_cost': float(w.number(2, 40) * 50),
      'transaction_id': str(w.number(10**7, 10**8 - 1)),
    }
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


def _date(w: Writer) -> str:
  return f'2027-{w.number(1, 12):02}-{w.number(1, 28):02}'


def _token(w: Writer, **arguments: Any) -> dict[str, Any]:
  return {'access_token': w.api.access_token, **arguments}


def _cards(w: Writer, balance: float) -> list[str]:
  """Cards that the user can name and that hold so much."""
  return [
    card
    for card, record in w.api.credit_card_list.items()
    if card not in w.fresh and record['balance'] >= balance
  ]


def _flight_cost(w: Writer, chained: bool) -> Clause | None:
  found = w.which(chained, sorted({start for start, _ in _ROUTES}), 'airport')
  if not found:
    return None
  end, date, cabin = (
    w.choice([end for start, end in _ROUTES if start == found[1]]),
    _date(w),
    w.choice(_CLASSES),
  )
  call = ToolCall(
    'get_flight_cost',
    {'travel_from': found[1], 'travel_to': end, 'travel_date': date, 'travel_class': cabin},
  )
  return Clause(
    f'get the price of a flight in {cabin} class from {found[0]} to {end} on {date}',
    [call],
    f'This is the price of the flight to {end}.',
    chained,
    (
      f'get the price of a flight from {found[0]} to {end} on {date}',
      'In which class do you want to fly?',
    ),
  )


def _book_flight(w: Writer, chained: bool) -> Clause | None:
  (start, end), date, cabin = w.choice(_ROUTES), _date(w), w.choice(_CLASSES)
  (cost,) = w.api.get_flight_cost(start, end, date, cabin)['travel_cost_list']
  cards = _cards(w, max(cost, w.api.budget_limit or 0))
  if not cards:
    return None
  card = w.choice(cards)
  call = ToolCall(
    'book_flight',
    _token(w, card_id=card, travel_date=date, travel_from=start, travel_to=end, travel_class=cabin),
  )
  return Clause(
    f'book a flight in {cabin} class from {start} to {end} on {date} with card {card}',
    [call],
    f'The flight to {end} is booked.',
    partial=(
      f'book a flight from {start} to {end} with card {card}',
      'When and in which class do you want to fly?',
    ),
    makes=('that booking', Output('booking_id')),
  )


def _cancel_booking(w: Writer, chained: bool) -> Clause | None:
  found = w.which(chained, w.api.booking_record, 'booking', 'booking {}')
  return found and Clause(
    f'cancel {found[0]}',
    [ToolCall('cancel_booking', _token(w, booking_id=found[1]))],
    f'Booking {found[1]} is cancelled.',
    chained,
    ('cancel my booking', 'Which booking do you mean?'),
  )


def _invoice(w: Writer, chained: bool) -> Clause | None:
  found = w.which(chained, w.api.booking_record, 'booking', 'booking {}')
  return found and Clause(
    f'get the invoice of {found[0]}',
    [ToolCall('retrieve_invoice', _token(w, booking_id=found[1]))],
    f'This is the invoice of booking {found[1]}.',
    chained,
    ('get me an invoice', 'Of which booking do you want the invoice?'),
  )


def _insure(w: Writer, chained: bool) -> Clause | None:
  found, cover, cost = (
    w.which(chained, w.api.booking_record, 'booking', 'booking {}'),
    w.choice(_COVERS),
    w.number(4, 30) * 5,
  )
  cards = _cards(w, cost)
  if not found or not cards or (w.api.budget_limit is not None and w.api.budget_limit < cost):
    return None
  card = w.choice(cards)
  call = ToolCall(
    'purchase_insurance',
    _token(w, insurance_type=cover, booking_id=found[1], insurance_cost=cost, card_id=card),
  )
  return Clause(
    f'buy {cover} insurance for {found[0]} for {cost} dollars with card {card}',
    [call],
    f'Booking {found[1]} is insured.',
    chained,
    (f'buy {cover} insurance for {found[0]}', 'What may it cost, and which card pays for it?'),
  )


def _ask_support(w: Writer, chained: bool) -> Clause | None:
  found, words = w.which(chained, w.api.booking_record, 'booking', 'booking {}'), w.choice(LINES)
  return found and Clause(
    f'write "{words}" to customer support about {found[0]}',
    [ToolCall('contact_customer_support', {'booking_id': found[1], 'message': words})],
    f'Customer support has your message about booking {found[1]}.',
    chained,
    (f'write to customer support about {found[0]}', 'What shall I write?'),
  )


def _balance(w: Writer, chained: bool) -> Clause | None:
  found = w.which(chained, w.api.credit_card_list, 'card', 'card {}')
  return found and Clause(
    f'get the balance of {found[0]}',
    [ToolCall('get_credit_card_balance', _token(w, card_id=found[1]))],
    f'This is the balance of card {found[1]}.',
    chained,
    ('get the balance of my card', 'Of which card?'),
  )


def _register_card(w: Writer, chained: bool) -> Clause:
  number, code = str(w.number(4 * 10**15, 5 * 10**15)), w.number(100, 999)
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
    f'register the credit card {number} of {holder}, which expires {expires} and has the code {code}',
    [call],
    f'The card of {holder} is registered.',
    partial=(
      f'register a credit card of {holder}',
      'What are its number, its date of expiry and its code?',
    ),
    makes=('that card', Output('card_id')),
  )


def _budget(w: Writer, chained: bool) -> Clause:
  limit = w.number(5, 40) * 50
  return Clause(
    f'set my budget limit to {limit} dollars',
    [ToolCall('set_budget_limit', _token(w, budget_limit=limit))],
    f'Your budget limit is {limit} dollars.',
    partial=('set a budget limit', 'How much shall the limit be?'),
  )


def _exchange(w: Writer, chained: bool) -> Clause:
  amount, currency = w.number(2, 90) * 10, w.choice(_CURRENCIES)
  call = ToolCall(
    'compute_exchange_rate', {'base_currency': 'USD', 'target_currency': currency, 'value': amount}
  )
  return Clause(
    f'convert {amount} USD to {currency}',
    [call],
    f'{amount} USD have been converted to {currency}.',
    partial=(f'convert my dollars to {currency}', 'How many dollars are there?'),
  )


def _airport(w: Writer, chained: bool) -> Clause:
  city = w.choice(_AIRPORTS)
  return Clause(
    f'find the airport nearest to {city}',
    [ToolCall('get_nearest_airport_by_city', {'location': city})],
    f'The airport nearest to {city} is found.',
    partial=('find the nearest airport', 'Nearest to which city?'),
    makes=('that airport', Output('nearest_airport')),
  )


def _verify_traveller(w: Writer, chained: bool) -> Clause:
  first, last = w.api.user_first_name, w.api.user_last_name
  born, passport = (
    f'{w.number(1950, 1995)}-{w.number(1, 12):02}-{w.number(1, 28):02}',
    f'US{w.number(10**6, 10**7 - 1)}',
  )
  call = ToolCall(
    'verify_traveler_information',
    {'first_name': first, 'last_name': last, 'date_of_birth': born, 'passport_number': passport},
  )
  return Clause(
    f'verify that {first} {last}, born on {born} with passport {passport}, may travel',
    [call],
    f'The details of {first} {last} have been verified.',
    partial=(
      f'verify that {first} {last} may travel',
      'What are the date of birth and the passport number?',
    ),
  )


REPERTOIRES = {
  'VehicleControlAPI': Repertoire(
    _car_scenario,
    (
      _fill_tank,
      _to_gallons,
      _doors(unlock=True),
      _doors(unlock=False),
      _climate,
      _headlights,
      _parking_brake,
      _brake_pedal,
      _start_engine,
      _car_status,
      _tire_shop,
      _navigate,
      _feasible,
      _zip_code,
    ),
    frozenset(
      {
        'fillFuelTank',
        'lockDoors',
        'adjustClimateControl',
        'setHeadlights',
        'activateParkingBrake',
        'set_navigation',
        'find_nearest_tire_shop',
        'get_zipcode_based_on_city',
      }
    ),
  ),
  'TravelAPI': Repertoire(
    _travel_scenario,
    (
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
    frozenset(
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
