"""What can be asked of BFCL's tickets, posts and files."""

from collections.abc import Callable
from typing import Any

from dcore_jax.chat.messages import ToolCall
from dcore_jax.worlds.bfcl_writer import FIRST, LINES, NOTHING, PLACES, Clause, Repertoire, Writer

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
_TAGS = ('#harvest', '#lanterns', '#tides', '#granite', '#sparrows', '#ferns')


# --- tickets --------------------------------------------------------------------------------------------------------------


def _ticket_scenario(w: Writer) -> dict[str, Any]:
  user, first = w.choice(FIRST).title(), w.number(300, 900)
  tickets = [
    {
      'id': first + i,
      'title': f'{w.choice(PLACES)} {w.choice(_TROUBLES)}',
      'description': w.choice(LINES),
      'status': 'Open' if i else 'Closed',
      'priority': w.number(1, 5),
      'created_by': user,
    }
    for i in range(w.number(4, 6))
  ]
  return {'ticket_queue': tickets, 'ticket_counter': first + len(tickets), 'current_user': user}


def _open_tickets(w: Writer) -> list[int]:
  return [ticket['id'] for ticket in w.api.ticket_queue if ticket['status'] == 'Open']


def _create_ticket(w: Writer, chained: bool) -> Clause:
  title, priority = f'{w.choice(PLACES)} {w.choice(_TROUBLES)}', w.number(1, 5)
  arguments = {'title': title, 'priority': priority}
  text = f'open a ticket titled "{title}" with priority {priority}'
  if w.rng.random() < 0.4:
    arguments['description'] = w.choice(LINES)
    text += f' and the description "{arguments["description"]}"'
  number = w.api.ticket_counter
  return Clause(
    text,
    [ToolCall('create_ticket', arguments)],
    f'Ticket {number}, "{title}", has been opened.',
    partial=(f'open a ticket with priority {priority}', 'What is the title of the ticket to be?'),
    makes=('that ticket', number),
  )


def _get_ticket(w: Writer, chained: bool) -> Clause | None:
  found = w.which(chained, [ticket['id'] for ticket in w.api.ticket_queue], 'ticket', 'ticket {}')
  return found and Clause(
    f'show me {found[0]}',
    [ToolCall('get_ticket', {'ticket_id': found[1]})],
    f'Here is ticket {found[1]}.',
    chained,
    ('show me a ticket', 'What is the number of the ticket?'),
  )


def _close_ticket(w: Writer, chained: bool) -> Clause | None:
  found = w.which(chained, _open_tickets(w), 'ticket', 'ticket {}')
  return found and Clause(
    f'close {found[0]}',
    [ToolCall('close_ticket', {'ticket_id': found[1]})],
    f'Ticket {found[1]} has been closed.',
    chained,
    ('close my ticket', 'Which ticket shall I close?'),
  )


def _resolve_ticket(w: Writer, chained: bool) -> Clause | None:
  found, note = w.which(chained, _open_tickets(w), 'ticket', 'ticket {}'), w.choice(_NOTES)
  return found and Clause(
    f'resolve {found[0]} with the note "{note}"',
    [ToolCall('resolve_ticket', {'ticket_id': found[1], 'resolution': note})],
    f'Ticket {found[1]} has been resolved.',
    chained,
    (f'resolve {found[0]}', 'What shall I note as its resolution?'),
  )


def _edit_ticket(w: Writer, chained: bool) -> Clause | None:
  found, priority = w.which(chained, _open_tickets(w), 'ticket', 'ticket {}'), w.number(1, 5)
  return found and Clause(
    f'set the priority of {found[0]} to {priority}',
    [ToolCall('edit_ticket', {'ticket_id': found[1], 'updates': {'priority': priority}})],
    f'Ticket {found[1]} now has priority {priority}.',
    chained,
    (f'change the priority of {found[0]}', 'Which priority, from 1 to 5, shall the ticket have?'),
  )


def _list_tickets(w: Writer, chained: bool) -> Clause:
  return Clause(
    'list my open tickets',
    [ToolCall('get_user_tickets', {'status': 'Open'})],
    'Here are your open tickets.',
    makes=NOTHING,
  )


# --- posts ----------------------------------------------------------------------------------------------------------------


def _post_scenario(w: Writer) -> dict[str, Any]:
  names = [str(name) for name in w.rng.permutation(FIRST)]
  users = [f'{name}_{w.choice(PLACES)}' for name in names[:5]]
  first = w.number(20, 400)
  tweets = {
    str(first + i): {
      'id': first + i,
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
  content, tag, number = (
    f'{w.choice(PLACES)}: {w.choice(LINES)}',
    w.choice(_TAGS),
    w.api.tweet_counter,
  )
  arguments, text = {'content': content}, f'post a tweet saying "{content}"'
  if w.rng.random() < 0.5:
    arguments['tags'], text = [tag], text + f' with the tag {tag}'
  return Clause(
    text,
    [ToolCall('post_tweet', arguments)],
    f'Your tweet is out, number {number}.',
    partial=('post a tweet for me', 'What shall the tweet say?'),
    makes=('that tweet', number),
  )


def _comment(w: Writer, chained: bool) -> Clause | None:
  found, words = w.which(chained, w.api.tweets, 'tweet', 'tweet {}'), w.choice(LINES)
  return found and Clause(
    f'comment "{words}" on {found[0]}',
    [ToolCall('comment', {'tweet_id': found[1], 'comment_content': words})],
    f'The comment on tweet {found[1]} is posted.',
    chained,
    (f'comment on {found[0]}', 'What shall the comment say?'),
  )


def _retweet(w: Writer, chained: bool) -> Clause | None:
  found = w.which(chained, w.api.tweets, 'tweet', 'tweet {}')
  if not found or found[1] in w.api.retweets.get(w.api.username, []):
    return None
  return Clause(
    f'retweet {found[0]}',
    [ToolCall('retweet', {'tweet_id': found[1]})],
    f'Tweet {found[1]} is retweeted.',
    chained,
    ('retweet it for me', 'Which tweet do you mean?'),
  )


def _mention(w: Writer, chained: bool) -> Clause | None:
  found, user = (
    w.which(chained, w.api.tweets, 'tweet', 'tweet {}'),
    f'@{w.choice(FIRST)}_{w.choice(PLACES)}',
  )
  return found and Clause(
    f'mention {user} in {found[0]}',
    [ToolCall('mention', {'tweet_id': found[1], 'mentioned_usernames': [user]})],
    f'{user} is mentioned in tweet {found[1]}.',
    chained,
    (f'mention someone in {found[0]}', 'Whom shall I mention?'),
  )


def _follow(w: Writer, chained: bool) -> Clause | None:
  user = f'{w.choice(FIRST)}_{w.choice(PLACES)}'
  if user in w.api.following_list:
    return None
  return Clause(
    f'follow {user}',
    [ToolCall('follow_user', {'username_to_follow': user})],
    f'You now follow {user}.',
    partial=('follow somebody new', 'Whom shall I follow?'),
  )


def _unfollow(w: Writer, chained: bool) -> Clause | None:
  if not w.api.following_list:
    return None
  user = w.choice(w.api.following_list)
  return Clause(
    f'stop following {user}',
    [ToolCall('unfollow_user', {'username_to_unfollow': user})],
    f'You no longer follow {user}.',
    partial=('stop following one of them', 'Whom shall I stop following?'),
  )


def _stats(w: Writer, chained: bool) -> Clause:
  user = w.choice(sorted({tweet['username'] for tweet in w.api.tweets.values()}))
  return Clause(
    f'get the statistics of {user}',
    [ToolCall('get_user_stats', {'username': user})],
    f'Here are the statistics of {user}.',
    partial=('get the statistics of that user', 'Which user do you mean?'),
  )


def _search(w: Writer, chained: bool) -> Clause:
  word = w.choice(PLACES)
  return Clause(
    f'search the tweets for "{word}"',
    [ToolCall('search_tweets', {'keyword': word})],
    f'These are the tweets about "{word}".',
    partial=('search the tweets', 'What shall I search for?'),
    makes=NOTHING,
  )


# --- files ----------------------------------------------------------------------------------------------------------------


def _file_scenario(w: Writer) -> dict[str, Any]:
  def files(count):
    names = [
      f'{stem}_{w.number(1, 60)}.{w.choice(_ENDINGS)}' for stem in w.rng.permutation(_STEMS)[:count]
    ]
    return {
      name: {'type': 'file', 'content': '\n'.join(w.choice(LINES) for _ in range(w.number(2, 4)))}
      for name in names
    }

  folders = {
    str(name): {'type': 'directory', 'contents': files(2)}
    for name in w.rng.permutation(_FOLDERS)[:2]
  }
  return {'root': {w.choice(FIRST): {'type': 'directory', 'contents': files(4) | folders}}}


def _here(w: Writer, folders: bool = False) -> list[str]:
  """Files, or folders, of the current folder."""
  contents = w.api._current_dir.contents  # pylint: disable=protected-access
  return [name for name, item in contents.items() if hasattr(item, 'contents') == folders]


def _read_file(
  name: str, tool: str, words: str, report: str, more: dict[str, Any]
) -> Callable[[Writer, bool], Clause | None]:
  """A move that looks at a file: `words` and `report` with {file}."""

  def move(w: Writer, chained: bool) -> Clause | None:
    found = w.which(chained, _here(w), 'file')
    return found and Clause(
      words.format(file=found[0]),
      [ToolCall(tool, {'file_name': found[1], **more})],
      report.format(file=found[1]),
      chained,
      (words.format(file='the file'), 'Which file do you mean?'),
    )

  move.__name__ = f'_{name}'
  return move


def _grep(w: Writer, chained: bool) -> Clause | None:
  found = w.which(chained, _here(w), 'file')
  if not found:
    return None
  text = w.api._current_dir.contents[found[1]].content  # pylint: disable=protected-access
  word = w.choice(text.split() or ['x'])
  call = ToolCall('grep', {'file_name': found[1], 'pattern': word})
  return Clause(
    f'find the lines of {found[0]} that contain "{word}"',
    [call],
    f'These are the lines of {found[1]} with "{word}".',
    chained,
    (f'find some lines in {found[0]}', 'What shall the lines contain?'),
  )


def _write_file(w: Writer, chained: bool) -> Clause:
  name, words = f'{w.choice(_STEMS)}_{w.number(61, 99)}.{w.choice(_ENDINGS)}', w.choice(LINES)
  return Clause(
    f'write "{words}" into a file called {name}',
    [ToolCall('echo', {'content': words, 'file_name': name})],
    f'{name} has been written.',
    partial=(f'write something into {name}', f'What shall I write into {name}?'),
    makes=('that file', name),
  )


def _copy_file(w: Writer, chained: bool) -> Clause | None:
  found = w.which(chained, _here(w), 'file')
  name = f'{w.choice(_STEMS)}_{w.number(100, 140)}.{w.choice(_ENDINGS)}'
  if not found or name in _here(w):
    return None
  return Clause(
    f'copy {found[0]} to {name}',
    [ToolCall('cp', {'source': found[1], 'destination': name})],
    f'{found[1]} has been copied to {name}.',
    chained,
    (f'make a copy of {found[0]}', 'What shall the copy be called?'),
    ('the copy', name),
  )


def _file_away(w: Writer, chained: bool) -> Clause | None:
  """One subtask of two calls: a folder is made, and a file moved into it."""
  found, folder = w.which(chained, _here(w), 'file'), w.choice(_FOLDERS) + f'_{w.number(1, 30)}'
  if not found or folder in _here(w, folders=True):
    return None
  return Clause(
    f'make a folder {folder} and move {found[0]} into it',
    [
      ToolCall('mkdir', {'dir_name': folder}),
      ToolCall('mv', {'source': found[1], 'destination': folder}),
    ],
    f'{found[1]} is now in the new folder {folder}.',
    chained,
    (f'move {found[0]} into a new folder', 'What shall the folder be called?'),
  )


def _move_file(w: Writer, chained: bool) -> Clause | None:
  found, folders = w.which(chained, _here(w), 'file'), _here(w, folders=True)
  if not found or not folders:
    return None
  folder = w.choice(folders)
  return Clause(
    f'move {found[0]} into {folder}',
    [ToolCall('mv', {'source': found[1], 'destination': folder})],
    f'{found[1]} is now in {folder}.',
    chained,
    (f'move {found[0]}', f'Where shall I move {found[1]}?'),
  )


def _remove_file(w: Writer, chained: bool) -> Clause | None:
  found = w.which(chained, _here(w), 'file')
  if not found:
    return None
  return Clause(
    f'delete {found[0]}',
    [ToolCall('rm', {'file_name': found[1]})],
    f'{found[1]} has been deleted.',
    chained,
    ('delete one of my files', 'Which file shall I delete?'),
  )


# A ticket can be closed by editing it, a file be moved by a copy: their functions are not the only way.
REPERTOIRES = {
  'TicketAPI': Repertoire(
    _ticket_scenario,
    (_create_ticket, _get_ticket, _close_ticket, _resolve_ticket, _edit_ticket, _list_tickets),
    frozenset({'create_ticket', 'edit_ticket'}),
  ),
  'TwitterAPI': Repertoire(
    _post_scenario,
    (_post_tweet, _comment, _retweet, _mention, _follow, _unfollow, _stats, _search),
    frozenset(
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
    _file_scenario,
    (
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
    frozenset({'rm'}),
  ),
}
