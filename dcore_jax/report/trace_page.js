'use strict';
// Shows many traces: a list that is drawn only where it is seen, and the trace that is chosen.
// What models wrote reaches the page as text nodes alone.

const ROW = 46;  // pixels; the height of .row
const MEASURES = {
  entropy: 'entropy', logprob: 'log-probability', psi: 'ψ', shared: 'rollouts that share it'};
// What the lazy measure counts, as whole words.
const HESITATION = /\b(wait|but|alternatively|however)\b/gi;
const CALLS = /(<tool_call>[\s\S]*?(?:<\/tool_call>|$)|^\s*\[[^\[\]\s]+\([\s\S]*\)\]\s*$)/g;

const byId = (id) => document.getElementById(id);
const list = byId('list');
let index = null;  // columns, one entry a trace
let shown = [];  // numbers of the traces that pass the filters
let chosen = -1;  // number of the open trace
let openBody = null;
let search = 0;  // counts searches, so that a newer one ends an older one
const chunks = new Map();  // number of a chunk -> promise of its traces

// Returns the value of a block: JSON, deflated, in base64.
async function decode(id) {
  const block = byId(id);
  const binary = atob(block.textContent);
  const bytes = new Uint8Array(binary.length);
  for (let place = 0; place < binary.length; place++) bytes[place] = binary.charCodeAt(place);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream('deflate'));
  return JSON.parse(await new Response(stream).text());
}

function chunkOf(number) {
  let low = 0;
  let high = index.starts.length - 1;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (index.starts[middle] <= number) low = middle;
    else high = middle - 1;
  }
  return low;
}

function readChunk(chunk) {
  if (!chunks.has(chunk)) chunks.set(chunk, decode(`chunk${chunk}`));
  return chunks.get(chunk);
}

async function read(number) {
  const chunk = chunkOf(number);
  return (await readChunk(chunk))[number - index.starts[chunk]];
}

function element(tag, name, text) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  if (text !== undefined) made.textContent = text;
  return made;
}

// --- filters ---

function passes(number) {
  const is = (id, value) => byId(id).value === '' || Number(byId(id).value) === value;
  const length = index.length[number];
  const least = byId('least').value;
  const most = byId('most').value;
  return is('source', index.source[number]) && is('kind', index.kind[number]) &&
    is('verdict', index.right[number]) && is('lazy', index.lazy[number]) &&
    (least === '' || length >= Number(least)) && (most === '' || length <= Number(most));
}

function holds(body, number, text) {
  if (index.id[number].toLowerCase().includes(text)) return true;
  if (body.query.toLowerCase().includes(text)) return true;
  return body.messages.some(
    (message) => message.content.toLowerCase().includes(text) ||
      (message.more || '').toLowerCase().includes(text));
}

async function filter() {
  const mine = ++search;
  const found = [];
  for (let number = 0; number < index.id.length; number++) if (passes(number)) found.push(number);
  const text = byId('search').value.toLowerCase();
  if (text === '') {
    show(found, '');
    return;
  }
  const matching = [];
  let last = -1;
  for (const number of found) {
    const body = await read(number);
    if (mine !== search) return;
    if (holds(body, number, text)) matching.push(number);
    const chunk = chunkOf(number);
    // A long search shows what it has found so far, and lets the page answer meanwhile.
    if (chunk !== last && chunk % 16 === 15) {
      show(matching, ' so far');
      await new Promise((resume) => setTimeout(resume));
      if (mine !== search) return;
    }
    last = chunk;
  }
  show(matching, '');
}

function show(numbers, note) {
  shown = numbers;
  const all = index.id.length.toLocaleString();
  byId('count').textContent = `${numbers.length.toLocaleString()} of ${all} traces${note}`;
  draw();
  if (note === '' && !shown.includes(chosen)) choose(shown.length ? shown[0] : -1);
  else if (openBody) render();
}

// --- list ---

function draw() {
  const first = Math.max(0, Math.floor(list.scrollTop / ROW) - 5);
  const last = Math.min(shown.length, Math.ceil((list.scrollTop + list.clientHeight) / ROW) + 5);
  const spacer = element('div');
  spacer.style.height = `${shown.length * ROW}px`;
  const rows = [spacer];
  for (let place = first; place < last; place++) rows.push(row(place));
  list.replaceChildren(...rows);
}

function row(place) {
  const number = shown[place];
  const made = element('div', 'row');
  made.style.top = `${place * ROW}px`;
  made.setAttribute('role', 'option');
  made.setAttribute('aria-selected', number === chosen);
  made.dataset.number = number;
  made.append(element('div', '', index.title[number] || index.id[number]));
  const facts = element('div', 'facts');
  facts.append(verdict(number), ` ${index.kinds[index.kind[number]]} · ${index.length[number]} · ${index.id[number]}`);
  made.append(facts);
  return made;
}

function verdict(number) {
  const right = index.right[number];
  const made = element('span');
  if (right >= 0) made.append(element('b', right ? 'right' : 'wrong', right ? '✓' : '✗'));
  if (index.lazy[number] === 1) made.append(element('span', 'lazy', ' lazy'));
  return made;
}

async function choose(number) {
  chosen = number;
  draw();
  if (number < 0) {
    openBody = null;
    byId('head').replaceChildren();
    byId('trace').replaceChildren();
    return;
  }
  const body = await read(number);
  if (chosen !== number) return;  // another was chosen meanwhile
  openBody = body;
  history.replaceState(null, '', `#${number}`);
  byId('trace').scrollTop = 0;
  render();
}

function step(by) {
  if (!shown.length) return;
  const place = shown.indexOf(chosen) + by;
  const next = Math.min(shown.length - 1, Math.max(0, place));
  if (next * ROW < list.scrollTop) list.scrollTop = next * ROW;
  const below = (next + 1) * ROW - list.clientHeight;
  if (below > list.scrollTop) list.scrollTop = below;
  choose(shown[next]);
}

// --- trace ---

function render() {
  const measures = Object.keys(MEASURES).filter(
    (name) => openBody.messages.some((message) => message.tokens && message.tokens[name]));
  header(measures);
  const wanted = measures.includes(byId('measure')?.value) ? byId('measure').value : '';
  const made = [];
  const messages = openBody.messages;
  if (openBody.query && !messages.some((message) => message.content === openBody.query)) {
    made.push(element('div', 'role', 'request'), says(element('div', 'message'), openBody.query));
  }
  for (const message of messages) {
    // Qwen3's template writes what tools return into messages of the user.
    const tool = message.role === 'tool' || message.content.startsWith('<tool_response>');
    made.push(element('div', 'role', tool ? 'tool' : message.role));
    const said = element('div', tool ? 'message tool' : 'message');
    if (wanted && message.tokens && message.tokens[wanted]) tokens(said, message.tokens, wanted);
    else if (message.role === 'assistant') spoken(said, message.content);
    else says(said, message.content);
    made.push(said);
    if (message.more) made.push(says(element('div', 'message call'), message.more));
  }
  byId('trace').replaceChildren(...made);
}

let measure = '';  // chosen colour of tokens; kept from trace to trace

function header(measures) {
  const head = byId('head');
  const parts = [verdict(chosen), element('b', '', index.kinds[index.kind[chosen]]),
    element('code', '', index.id[chosen])];
  if (index.sources.length > 1) parts.push(element('span', '', index.sources[index.source[chosen]]));
  parts.push(element('span', '', `${index.length[chosen].toLocaleString()} ${index.unit}`));
  if (openBody.reason) parts.push(element('span', 'wrong', openBody.reason));
  if (measures.length) {
    const select = element('select');
    select.id = 'measure';
    select.setAttribute('aria-label', 'colour of tokens');
    select.append(new Option('no colours', ''));
    for (const name of measures) select.append(new Option(MEASURES[name], name));
    select.value = measures.includes(measure) ? measure : '';
    select.onchange = () => {
      measure = select.value;
      render();
    };
    parts.push(select);
    if (select.value) parts.push(legend(select.value));
  }
  head.replaceChildren(...parts);
}

function legend(name) {
  const made = element('span');
  made.id = 'scale';
  const [low, high] = index.scales[name];
  made.append(String(low), element('i'), String(high));
  return made;
}

// Adds an assistant's text: thoughts, calls and what is said.
function spoken(parent, text) {
  let place = 0;
  for (const found of text.matchAll(/<think>([\s\S]*?)(<\/think>|$)/g)) {
    answer(parent, text.slice(place, found.index));
    const thoughts = element('span', 'think');
    says(thoughts, found[1].replace(/^\n+|\n+$/g, ''), HESITATION);
    parent.append(thoughts);
    place = found.index + found[0].length;
  }
  answer(parent, text.slice(place));
}

function answer(parent, text) {
  let place = 0;
  for (const found of text.matchAll(CALLS)) {
    says(parent, text.slice(place, found.index));
    parent.append(says(element('span', 'call'), found[0]));
    place = found.index + found[0].length;
  }
  says(parent, text.slice(place));
}

// Adds text to an element; words of `pattern` and what is searched for are marked.
function says(parent, text, pattern) {
  const wanted = byId('search').value.toLowerCase();
  const lower = text.toLowerCase();
  // Where lower case has another length, places would not fit.
  if (wanted && lower.length === text.length) {
    let place = 0;
    for (let at = lower.indexOf(wanted); at >= 0; at = lower.indexOf(wanted, place)) {
      marked(parent, text.slice(place, at), pattern);
      parent.append(element('mark', 'hit', text.slice(at, at + wanted.length)));
      place = at + wanted.length;
    }
    marked(parent, text.slice(place), pattern);
  } else {
    marked(parent, text, pattern);
  }
  return parent;
}

function marked(parent, text, pattern) {
  let place = 0;
  for (const found of pattern ? text.matchAll(pattern) : []) {
    parent.append(text.slice(place, found.index), element('mark', '', found[0]));
    place = found.index + found[0].length;
  }
  parent.append(text.slice(place));
}

function tokens(parent, values, name) {
  const [low, high] = index.scales[name];
  values.text.forEach((text, place) => {
    const value = values[name][place];
    const made = element('span', '', text);
    if (value !== null) {
      const share = Math.min(1, Math.max(0, (value - low) / ((high - low) || 1)));
      made.style.backgroundColor = `color-mix(in srgb, var(--hot) ${Math.round(100 * share)}%, transparent)`;
    }
    const facts = [];
    for (const [other, label] of Object.entries(MEASURES)) {
      if (values[other] && values[other][place] !== null) facts.push(`${label} ${values[other][place]}`);
    }
    made.dataset.facts = facts.join(' · ');
    parent.append(made);
  });
}

// --- page ---

function listen() {
  for (const id of ['source', 'kind', 'verdict', 'lazy', 'least', 'most']) byId(id).onchange = filter;
  let waiting = 0;
  byId('search').oninput = () => {
    clearTimeout(waiting);
    waiting = setTimeout(filter, 150);  // milliseconds: a word is typed in one go
  };
  list.onscroll = () => requestAnimationFrame(draw);
  window.onresize = draw;
  list.onclick = (event) => {
    const row = event.target.closest('.row');
    if (row) choose(Number(row.dataset.number));
  };
  const tip = byId('tip');
  byId('trace').onmousemove = (event) => {
    const facts = event.target.dataset.facts;
    tip.hidden = !facts;
    tip.textContent = facts || '';
    tip.style.left = `${Math.min(event.clientX + 12, innerWidth - 260)}px`;
    tip.style.top = `${event.clientY + 16}px`;
  };
  document.onkeydown = (event) => {
    const typing = /^(INPUT|SELECT)$/.test(event.target.tagName);
    if (event.key === 'Escape') event.target.blur();
    if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
    const by = {j: 1, ArrowDown: 1, n: 1, k: -1, ArrowUp: -1, p: -1}[event.key];
    // In a long trace the arrows scroll.
    if (by && !(event.key.startsWith('Arrow') && event.target === byId('trace'))) step(by);
    else if (event.key === '/') byId('search').focus();
    else return;
    event.preventDefault();
  };
}

function options(id, all, names) {
  byId(id).append(new Option(all, ''), ...names.map((name, place) => new Option(name, place)));
  byId(id).hidden = names.length < 2;
}

async function start() {
  index = await decode('index');
  options('source', 'all models', index.sources);
  options('kind', 'all kinds', index.kinds);
  byId('least').placeholder = `from ${index.unit}`;
  byId('most').placeholder = `to ${index.unit}`;
  listen();
  const wanted = Number(location.hash.slice(1));
  if (location.hash && index.id[wanted] !== undefined) chosen = wanted;
  show(index.id.map((_, number) => number), '');
  if (chosen >= 0) {
    list.scrollTop = chosen * ROW;
    choose(chosen);
  }
  // Read by tests: milliseconds from the request to the list.
  document.documentElement.dataset.shown = Math.round(performance.now());
}

start();
