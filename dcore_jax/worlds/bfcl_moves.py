"""What can be asked of BFCL's tickets, posts and files."""

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
  Repertoire,
  Writer,
)

_TROUBLES = (
  'scanner jams',
  'door stays open',
  'pump leaks',
  'screen flickers',
  'heating is off',
  'badge is refused',
  'backup fails',
  'lamp is broken',
  'queue is stuck',
  'label is missing',
)
_NOTES = (
  'replaced the part',
  'restarted it twice',
  'sent a technician',
  'cleared the cache',
  'asked the supplier',
  'reset the lock',
)
_STEMS = (
  'ledger',
  'roster',
  'recipe',
  'itinerary',
  'survey',
  'inventory',
  'minutes',
  'draft',
  'catalogue',
  'timesheet',
)
_ENDINGS = ('txt', 'csv', 'md', 'log')
_FOLDERS = ('attic', 'inbox', 'spring', 'sealed', 'shared', 'voyage', 'kiln', 'almanac')
# Tags begin with #, as the API's documentation asks.
_TAGS = ('#harvest', '#lanterns', '#tides', '#granite', '#sparrows', '#ferns')


# --- tickets ---


# Tickets of one user, who is logged in.
def _ticket_scenario(w: Writer) -> dict[str, Any]:
  user = w.choice(FIRST).title()
  first = w.number(300, 900)
  tickets = [
    {
      'id': first + i,
      'title': f'{w.choice(PLACES)} {w.choice(_TROUBLES)}',
      'description': w.choice(LINES),
      # The first ticket is closed, so that not every ticket fits every request.
      'status': 'Open' if i else 'Closed',
      'priority': w.number(1, 5),
      'created_by': user,
    }
    for i in range(w.number(4, 6))
  ]
  # The counter is the number of the next ticket.
  return {'ticket_queue': tickets, 'ticket_counter': first + len(tickets), 'current_user': user}


# Only open tickets are closed, resolved or edited.
def _open_tickets(w: Writer) -> list[int]:
  return [ticket['id'] for ticket in w.api.ticket_queue if ticket['status'] == 'Open']


def _create_ticket(w: Writer, chained: bool) -> Clause:
  title = f'{w.choice(PLACES)} {w.choice(_TROUBLES)}'
  priority = w.number(1, 5)
  arguments = {'title': title, 'priority': priority}
  text = f'open a ticket titled "{title}" with priority {priority}'
  # An optional argument, given in some requests and left out in others.
  if w.rng.random() < 0.4:
    arguments['description'] = w.choice(LINES)
    text += f' and the description "{arguments["description"]}"'
  # Known before the call: the API numbers tickets by this counter.
  number = w.api.ticket_counter
  return Clause(
    text=text,
    calls=[ToolCall('create_ticket', arguments)],
    report=f'Ticket {number}, "{title}", has been opened.',
    partial=(f'open a ticket with priority {priority}', 'What is the title of the ticket to be?'),
    makes=Mention('that ticket', number),
  )


# Any ticket can be shown, closed ones as well.
def _get_ticket(w: Writer, chained: bool) -> Clause | None:
  found = w.which(chained, [ticket['id'] for ticket in w.api.ticket_queue], 'ticket', 'ticket {}')
  if not found:
    return None
  return Clause(
    text=f'show me {found.words}',
    calls=[ToolCall('get_ticket', {'ticket_id': found.value})],
    report=f'Here is ticket {found.value}.',
    chained=chained,
    partial=('show me a ticket', 'What is the number of the ticket?'),
  )


def _close_ticket(w: Writer, chained: bool) -> Clause | None:
  found = w.which(chained, _open_tickets(w), 'ticket', 'ticket {}')
  if not found:
    return None
  return Clause(
    text=f'close {found.words}',
    calls=[ToolCall('close_ticket', {'ticket_id': found.value})],
    report=f'Ticket {found.value} has been closed.',
    chained=chained,
    partial=('close my ticket', 'Which ticket shall I close?'),
  )


def _resolve_ticket(w: Writer, chained: bool) -> Clause | None:
  found = w.which(chained, _open_tickets(w), 'ticket', 'ticket {}')
  # A resolution is a short text of our own.
  note = w.choice(_NOTES)
  if not found:
    return None
  return Clause(
    text=f'resolve {found.words} with the note "{note}"',
    calls=[ToolCall('resolve_ticket', {'ticket_id': found.value, 'resolution': note})],
    report=f'Ticket {found.value} has been resolved.',
    chained=chained,
    partial=(f'resolve {found.words}', 'What shall I note as its resolution?'),
  )


def _edit_ticket(w: Writer, chained: bool) -> Clause | None:
  found = w.which(chained, _open_tickets(w), 'ticket', 'ticket {}')
  priority = w.number(1, 5)
  if not found:
    return None
  return Clause(
    text=f'set the priority of {found.words} to {priority}',
    # The API takes the changes as a dict.
    calls=[ToolCall('edit_ticket', {'ticket_id': found.value, 'updates': {'priority': priority}})],
    report=f'Ticket {found.value} now has priority {priority}.',
    chained=chained,
    partial=(
      f'change the priority of {found.words}',
      'Which priority, from 1 to 5, shall the ticket have?',
    ),
  )


def _list_tickets(w: Writer, chained: bool) -> Clause:
  return Clause(
    text='list my open tickets',
    calls=[ToolCall('get_user_tickets', {'status': 'Open'})],
    report='Here are your open tickets.',
    # A list has nothing that "that ..." could refer to.
    makes=NOTHING,
  )


# --- posts ---


# Four tweets of three users; the first user is logged in and follows two others.
def _post_scenario(w: Writer) -> dict[str, Any]:
  names = [str(name) for name in w.rng.permutation(FIRST)]
  # Without repetition: two users of a name would be one.
  # Made up of two of our words.
  users = [f'{name}_{w.choice(PLACES)}' for name in names[:5]]
  first = w.number(20, 400)
  tweets = {
    str(first + i): {
      'id': first + i,
      # Three of five users have posted.
      'username': users[i % 3],
      'content': f'{w.choice(PLACES)}: {w.choice(LINES)}',
      'tags': [w.choice(_TAGS)],
      'mentions': [],
    }
    for i in range(4)
  }
  return {
    'username': users[0],
    'password': f'{w.choice(_FOLDERS)}{w.number(10, 99)}',
    'authenticated': True,
    'tweets': tweets,
    'comments': {},
    'retweets': {},
    'following_list': users[1:3],
    'tweet_counter': first + 4,
  }


def _post_tweet(w: Writer, chained: bool) -> Clause:
  content = f'{w.choice(PLACES)}: {w.choice(LINES)}'
  # Drawn in any case, whether or not the request uses it.
  tag = w.choice(_TAGS)
  # Known before the call: the API numbers tweets by this counter.
  number = w.api.tweet_counter
  arguments = {'content': content}
  text = f'post a tweet saying "{content}"'
  # An optional argument, given in half of the requests.
  if w.rng.random() < 0.5:
    arguments['tags'] = [tag]
    text += f' with the tag {tag}'
  return Clause(
    text=text,
    calls=[ToolCall('post_tweet', arguments)],
    report=f'Your tweet is out, number {number}.',
    partial=('post a tweet for me', 'What shall the tweet say?'),
    makes=Mention('that tweet', number),
  )


def _comment(w: Writer, chained: bool) -> Clause | None:
  found = w.which(chained, w.api.tweets, 'tweet', 'tweet {}')
  words = w.choice(LINES)
  if not found:
    return None
  return Clause(
    text=f'comment "{words}" on {found.words}',
    calls=[ToolCall('comment', {'tweet_id': found.value, 'comment_content': words})],
    report=f'The comment on tweet {found.value} is posted.',
    chained=chained,
    partial=(f'comment on {found.words}', 'What shall the comment say?'),
  )


def _retweet(w: Writer, chained: bool) -> Clause | None:
  found = w.which(chained, w.api.tweets, 'tweet', 'tweet {}')
  # A second retweet of a tweet would change nothing.
  if not found or found.value in w.api.retweets.get(w.api.username, []):
    return None
  return Clause(
    text=f'retweet {found.words}',
    calls=[ToolCall('retweet', {'tweet_id': found.value})],
    report=f'Tweet {found.value} is retweeted.',
    chained=chained,
    partial=('retweet it for me', 'Which tweet do you mean?'),
  )


def _mention(w: Writer, chained: bool) -> Clause | None:
  found = w.which(chained, w.api.tweets, 'tweet', 'tweet {}')
  # A made-up name: the API does not check that the user exists.
  user = f'@{w.choice(FIRST)}_{w.choice(PLACES)}'
  if not found:
    return None
  return Clause(
    text=f'mention {user} in {found.words}',
    calls=[ToolCall('mention', {'tweet_id': found.value, 'mentioned_usernames': [user]})],
    report=f'{user} is mentioned in tweet {found.value}.',
    chained=chained,
    partial=(f'mention someone in {found.words}', 'Whom shall I mention?'),
  )


def _follow(w: Writer, chained: bool) -> Clause | None:
  user = f'{w.choice(FIRST)}_{w.choice(PLACES)}'
  # Following somebody twice would change nothing.
  if user in w.api.following_list:
    return None
  return Clause(
    text=f'follow {user}',
    calls=[ToolCall('follow_user', {'username_to_follow': user})],
    report=f'You now follow {user}.',
    partial=('follow somebody new', 'Whom shall I follow?'),
  )


def _unfollow(w: Writer, chained: bool) -> Clause | None:
  # After other requests nobody may be left to unfollow.
  if not w.api.following_list:
    return None
  user = w.choice(w.api.following_list)
  return Clause(
    text=f'stop following {user}',
    calls=[ToolCall('unfollow_user', {'username_to_unfollow': user})],
    report=f'You no longer follow {user}.',
    partial=('stop following one of them', 'Whom shall I stop following?'),
  )


def _stats(w: Writer, chained: bool) -> Clause:
  # Sorted, since the order of a set is not the same in every process.
  user = w.choice(sorted({tweet['username'] for tweet in w.api.tweets.values()}))
  return Clause(
    text=f'get the statistics of {user}',
    calls=[ToolCall('get_user_stats', {'username': user})],
    report=f'Here are the statistics of {user}.',
    partial=('get the statistics of that user', 'Which user do you mean?'),
  )


def _search(w: Writer, chained: bool) -> Clause:
  word = w.choice(PLACES)
  return Clause(
    text=f'search the tweets for "{word}"',
    calls=[ToolCall('search_tweets', {'keyword': word})],
    report=f'These are the tweets about "{word}".',
    partial=('search the tweets', 'What shall I search for?'),
    makes=NOTHING,
  )


# --- files ---


# One folder with four files, and two folders of two files in it.
def _file_scenario(w: Writer) -> dict[str, Any]:
  def files(count: int) -> dict[str, Any]:
    # Stems without repetition, so that no two names of a folder are equal.
    # Names are stem, number and ending, such as ledger_12.csv.
    stems = w.rng.permutation(_STEMS)[:count]
    names = [f'{stem}_{w.number(1, 60)}.{w.choice(_ENDINGS)}' for stem in stems]
    contents = {}
    for name in names:
      # Several lines, so that sorting and searching them does something.
      lines = [w.choice(LINES) for _ in range(w.number(2, 4))]
      contents[name] = {'type': 'file', 'content': '\n'.join(lines)}
    return contents

  folders = {
    str(name): {'type': 'directory', 'contents': files(2)}
    for name in w.rng.permutation(_FOLDERS)[:2]
  }
  return {'root': {w.choice(FIRST): {'type': 'directory', 'contents': files(4) | folders}}}


def _here(w: Writer, folders: bool = False) -> list[str]:
  """The names of the files, or of the folders, in the current folder."""
  # BFCL offers no public way to look without printing.
  # The live folder: files may have been written, moved or deleted since the scenario.
  contents = w.api._current_dir.contents  # pylint: disable=protected-access
  # Only folders have contents.
  return [name for name, item in contents.items() if hasattr(item, 'contents') == folders]


def _read_file(name: str, tool: str, words: str, report: str, more: dict[str, Any]) -> Move:
  """A move that looks at a file.

  Args:
    name: the move's name, for tracebacks.
    tool: the function.
    words: the request, with {file} for the file.
    report: what has been done, with {file} again.
    more: arguments of the call beside the file's name.
  """

  def move(w: Writer, chained: bool) -> Clause | None:
    found = w.which(chained, _here(w), 'file')
    if not found:
      return None
    return Clause(
      text=words.format(file=found.words),
      calls=[ToolCall(tool, {'file_name': found.value, **more})],
      report=report.format(file=found.value),
      chained=chained,
      partial=(words.format(file='the file'), 'Which file do you mean?'),
    )

  # Named, since all moves of this kind are the same inner function.
  move.__name__ = f'_{name}'
  return move


def _grep(w: Writer, chained: bool) -> Clause | None:
  found = w.which(chained, _here(w), 'file')
  if not found:
    return None
  text = w.api._current_dir.contents[found.value].content  # pylint: disable=protected-access
  # A word that occurs, so that the search finds at least one line.
  word = w.choice(text.split() or ['x'])
  call = ToolCall('grep', {'file_name': found.value, 'pattern': word})
  return Clause(
    text=f'find the lines of {found.words} that contain "{word}"',
    calls=[call],
    report=f'These are the lines of {found.value} with "{word}".',
    chained=chained,
    partial=(f'find some lines in {found.words}', 'What shall the lines contain?'),
  )


def _write_file(w: Writer, chained: bool) -> Clause:
  # Numbers above those of the scenario, so that none of its files is overwritten.
  name = f'{w.choice(_STEMS)}_{w.number(61, 99)}.{w.choice(_ENDINGS)}'
  words = w.choice(LINES)
  return Clause(
    text=f'write "{words}" into a file called {name}',
    calls=[ToolCall('echo', {'content': words, 'file_name': name})],
    report=f'{name} has been written.',
    partial=(f'write something into {name}', f'What shall I write into {name}?'),
    makes=Mention('that file', name),
  )


def _copy_file(w: Writer, chained: bool) -> Clause | None:
  found = w.which(chained, _here(w), 'file')
  # A third range of numbers, apart from the scenario's and from new files'.
  name = f'{w.choice(_STEMS)}_{w.number(100, 140)}.{w.choice(_ENDINGS)}'
  # A copy needs a name that is free.
  if not found or name in _here(w):
    return None
  return Clause(
    text=f'copy {found.words} to {name}',
    calls=[ToolCall('cp', {'source': found.value, 'destination': name})],
    report=f'{found.value} has been copied to {name}.',
    chained=chained,
    partial=(f'make a copy of {found.words}', 'What shall the copy be called?'),
    makes=Mention('the copy', name),
  )


def _file_away(w: Writer, chained: bool) -> Clause | None:
  """One subtask of two calls: a folder is made, and a file moved into it."""
  found = w.which(chained, _here(w), 'file')
  folder = w.choice(_FOLDERS) + f'_{w.number(1, 30)}'
  # The API refuses to make a folder that exists.
  if not found or folder in _here(w, folders=True):
    return None
  return Clause(
    text=f'make a folder {folder} and move {found.words} into it',
    calls=[
      # The folder must exist before the file moves: the order of these calls matters.
      ToolCall('mkdir', {'dir_name': folder}),
      ToolCall('mv', {'source': found.value, 'destination': folder}),
    ],
    report=f'{found.value} is now in the new folder {folder}.',
    chained=chained,
    partial=(f'move {found.words} into a new folder', 'What shall the folder be called?'),
  )


def _move_file(w: Writer, chained: bool) -> Clause | None:
  found = w.which(chained, _here(w), 'file')
  folders = _here(w, folders=True)
  # Without a folder there is nowhere to move the file.
  if not found or not folders:
    return None
  folder = w.choice(folders)
  return Clause(
    text=f'move {found.words} into {folder}',
    calls=[ToolCall('mv', {'source': found.value, 'destination': folder})],
    report=f'{found.value} is now in {folder}.',
    chained=chained,
    partial=(f'move {found.words}', f'Where shall I move {found.value}?'),
  )


def _remove_file(w: Writer, chained: bool) -> Clause | None:
  found = w.which(chained, _here(w), 'file')
  if not found:
    return None
  return Clause(
    text=f'delete {found.words}',
    calls=[ToolCall('rm', {'file_name': found.value})],
    report=f'{found.value} has been deleted.',
    chained=chained,
    partial=('delete one of my files', 'Which file shall I delete?'),
  )


# `sole` leaves out what can be done in another way: editing closes a ticket, too, and a copy can
# take the place of a move.
REPERTOIRES = {
  'TicketAPI': Repertoire(
    scenario=_ticket_scenario,
    moves=(
      _create_ticket,
      _get_ticket,
      _close_ticket,
      _resolve_ticket,
      _edit_ticket,
      _list_tickets,
    ),
    sole=frozenset({'create_ticket', 'edit_ticket'}),
  ),
  'TwitterAPI': Repertoire(
    scenario=_post_scenario,
    moves=(_post_tweet, _comment, _retweet, _mention, _follow, _unfollow, _stats, _search),
    sole=frozenset(
      {
        'post_tweet',
        'comment',
        'retweet',
        'mention',
        'follow_user',
        'unfollow_user',
        'search_tweets',
      }
    ),
  ),
  'GorillaFileSystem': Repertoire(
    scenario=_file_scenario,
    moves=(
      _read_file('cat', 'cat', 'show me what is in {file}', 'This is what {file} says.', {}),
      _read_file(
        'words',
        'wc',
        'count the words of {file}',
        'The words of {file} have been counted.',
        {'mode': 'w'},
      ),
      _read_file(
        'sort', 'sort', 'sort the lines of {file}', 'These are the lines of {file} in order.', {}
      ),
      _read_file(
        'tail',
        'tail',
        'show the last line of {file}',
        'This is the last line of {file}.',
        {'lines': 1},
      ),
      _grep,
      _write_file,
      _copy_file,
      _file_away,
      _move_file,
      _remove_file,
    ),
    sole=frozenset({'rm'}),
  ),
}
