"""What can be asked of BFCL's car."""

from typing import Any

from dcore_jax.chat.messages import ToolCall
from dcore_jax.worlds.bfcl_writer import (
  NOTHING,
  PLACES,
  Clause,
  Mention,
  Move,
  Output,
  Repertoire,
  Writer,
)

# The API's names of doors, and the words for them in a request.
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
# Cities whose zip codes the API has in its table.
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


def _car_scenario(w: Writer) -> dict[str, Any]:
  # All doors locked in half of the cars: only then the engine can be started.
  locked = w.rng.random() < 0.5
  doors = {door: 'locked' if locked or w.rng.random() < 0.4 else 'unlocked' for door in _DOORS}
  # The pedal is pressed in some cars, for requests that release it.
  pedal = {'brakePedalStatus': 'pressed', 'brakePedalForce': 500.0} if w.rng.random() < 0.4 else {}
  return {
    # Quarters of a gallon, which print exactly.
    'fuelLevel': w.number(20, 160) / 4,
    'batteryVoltage': w.number(115, 135) / 10,
    # Stopped, so that there is an engine to start.
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
  # From the live API: an earlier clause may have filled the tank.
  room = _TANK - w.api.fuelLevel
  # The amount is the one that a clause before has converted.
  if chained:
    name, amount = w.latest
    # More than the tank has room for would be refused.
    if name != 'that amount' or amount > room:
      return None
    return Clause(
      text='put that amount of fuel into the tank',
      calls=[ToolCall('fillFuelTank', {'fuelAmount': amount})],
      report='The fuel is in the tank.',
      chained=True,
    )
  if room < 2:  # the call refuses more than the tank holds
    return None
  # Whole gallons.
  amount = w.number(1, int(room))
  return Clause(
    text=f'put {amount} gallons of fuel into the tank',
    calls=[ToolCall('fillFuelTank', {'fuelAmount': amount})],
    report=f'{amount} gallons are in the tank.',
    partial=('put some fuel into the tank', 'How many gallons shall it be?'),
  )


def _to_gallons(w: Writer, chained: bool) -> Clause:
  litres = w.number(3, 90)
  return Clause(
    text=f'convert {litres} liters to gallons',
    calls=[ToolCall('liter_to_gallon', {'liter': litres})],
    report=f'{litres} liters have been converted.',
    partial=('convert my liters to gallons', 'How many liters are there?'),
    # The converted amount is in the output alone.
    makes=Mention('that amount', Output('gallon')),
  )


def _doors(unlock: bool) -> Move:
  """A move that locks one or two of the open doors, or unlocks some of the locked ones.

  It never takes all four, as many of BFCL's tests do: their calls must not be repeated here.
  """
  verb, before = ('unlock', 'locked') if unlock else ('lock', 'unlocked')

  def move(w: Writer, chained: bool) -> Clause | None:
    candidates = [door for door, status in w.api.doorStatus.items() if status == before]
    if not candidates:
      return None
    # One or two doors; see above.
    doors = w.several(candidates, w.number(1, 2))
    names = ' and the '.join(_DOORS[door] for door in doors)
    return Clause(
      text=f'{verb} the {names}',
      # `unlock` is an argument of the one function that locks, too.
      calls=[ToolCall('lockDoors', {'unlock': unlock, 'door': doors})],
      report=f'The {names}: {verb}ed.',
      partial=(f'{verb} one of the doors', f'Which door shall I {verb}?'),
    )

  return move


def _climate(w: Writer, chained: bool) -> Clause:
  degrees = w.number(16, 28)
  fan = w.number(1, 9) * 10
  # The mode 'auto' is left out: scenarios begin with it.
  mode = w.choice(('cool', 'heat', 'defrost'))
  return Clause(
    text=(
      f'set the climate control to {degrees} degrees Celsius in {mode} mode '
      f'with a fan speed of {fan}'
    ),
    calls=[
      ToolCall('adjustClimateControl', {'temperature': degrees, 'fanSpeed': fan, 'mode': mode})
    ],
    report=f'The climate control is set to {degrees} degrees.',
    partial=(f'set the climate control to {mode} mode', 'Which temperature shall it be?'),
  )


def _headlights(w: Writer, chained: bool) -> Clause:
  # The other state: setting what is set already would change nothing.
  mode = 'off' if w.api.headLightStatus == 'on' else 'on'
  return Clause(
    text=f'turn the headlights {mode}',
    calls=[ToolCall('setHeadlights', {'mode': mode})],
    report=f'The headlights are {mode}.',
  )


def _parking_brake(w: Writer, chained: bool) -> Clause:
  mode = 'release' if w.api.parkingBrakeStatus == 'engaged' else 'engage'
  return Clause(
    text=f'{mode} the parking brake',
    calls=[ToolCall('activateParkingBrake', {'mode': mode})],
    report=f'The parking brake: {mode}d.',
  )


def _brake_pedal(w: Writer, chained: bool) -> Clause:
  # Pressed and released are two functions of the API.
  if w.api.brakePedalStatus == 'pressed':
    return Clause(
      text='release the brake pedal',
      calls=[ToolCall('releaseBrakePedal', {})],
      report='The brake pedal is released.',
    )
  # Not 1: that is how the pedal stands when the engine is started.
  position = w.choice((0.25, 0.5, 0.75))
  return Clause(
    text=f'press the brake pedal to position {position}',
    calls=[ToolCall('pressBrakePedal', {'pedalPosition': position})],
    report='The brake pedal is pressed.',
    partial=('press the brake pedal', 'How far, from 0 to 1, shall I press it?'),
  )


def _start_engine(w: Writer, chained: bool) -> Clause | None:
  """One subtask of two calls; the engine starts only if all doors are locked."""
  # The API refuses to start with a door unlocked.
  if w.api.remainingUnlockedDoors or w.api.engine_state == 'running':
    return None
  return Clause(
    text='press the brake pedal to position 1 and start the engine',
    calls=[
      # The pedal first: the API checks it when the engine starts.
      ToolCall('pressBrakePedal', {'pedalPosition': 1}),
      ToolCall('startEngine', {'ignitionMode': 'START'}),
    ],
    report='The engine is running.',
  )


def _car_status(w: Writer, chained: bool) -> Clause:
  # The API's word for the part; the request has ours.
  option = w.choice(_STATUS)
  return Clause(
    text=f'show me the state of the {_STATUS[option]}',
    calls=[ToolCall('displayCarStatus', {'option': option})],
    report=f'This is the state of the {_STATUS[option]}.',
    partial=('show me the state of a part of the car', 'Of which part?'),
  )


def _tire_shop(w: Writer, chained: bool) -> Clause:
  """Does not check the tires first, because those calls together are one of BFCL's tests."""
  return Clause(
    text='find the nearest tire shop',
    calls=[ToolCall('find_nearest_tire_shop', {})],
    report='The nearest tire shop is found.',
    # The address is in the output alone.
    makes=Mention('that shop', Output('shopLocation')),
  )


def _navigate(w: Writer, chained: bool) -> Clause | None:
  name, place = w.latest
  # What was spoken of last need not be a shop.
  if chained and name != 'that shop':
    return None
  if not chained:
    # A made-up address: the API takes any text.
    name = place = f'{w.number(2, 180)} {w.choice(PLACES).title()} Street, {w.choice(_CITIES)}, CA'
  return Clause(
    text=f'set the navigation to {name}',
    calls=[ToolCall('set_navigation', {'destination': place})],
    report=f'We are going to {place}.',
    chained=chained,
    partial=('set the navigation', 'What is the destination?'),
  )


def _feasible(w: Writer, chained: bool) -> Clause:
  # Some trips within the range, some beyond.
  miles = w.number(40, 900)
  return Clause(
    text=f'tell me whether the fuel is enough for {miles} miles',
    calls=[ToolCall('estimate_drive_feasibility_by_mileage', {'distance': miles})],
    report=f'The range has been compared with {miles} miles.',
    partial=('tell me whether the fuel is enough for the trip', 'How many miles is the trip?'),
  )


def _zip_code(w: Writer, chained: bool) -> Clause:
  city = w.choice(_CITIES)
  return Clause(
    text=f'look up the zip code of {city}',
    calls=[ToolCall('get_zipcode_based_on_city', {'city': city})],
    report=f'This is the zip code of {city}.',
    partial=('look up the zip code', 'Of which city?'),
    makes=NOTHING,
  )


REPERTOIRES = {
  'VehicleControlAPI': Repertoire(
    scenario=_car_scenario,
    moves=(
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
    # Functions whose effect no other function of this API has.
    sole=frozenset(
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
}
