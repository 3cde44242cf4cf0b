// What happened to the tokens: the record of an answer's route, its numbers, and where to draw them.
// Everything below "deciding" is a plain function of values.
import { computed, signal } from "@preact/signals";
import { announce } from "./announcer.js";
import { duration, layers, text } from "./words.js";

/** @typedef {import("./completions.js").Hop} Hop */
/** @typedef {import("./completions.js").TokenTrace} TokenTrace */
/** @typedef {import("./completions.js").Reroute} Reroute */
/** @typedef {import("./swarm.js").Choice} Choice */

/** Ten pictures a second are as many as an eye follows; tokens may come faster. */
const SHOW_EVERY_MS = 100;
/** Means are over this many tokens, so that they follow a change of the route. */
const RECENT_TOKENS = 64;
const MOST_EVENTS = 20;
/** A swarm may have hundreds of peers; the drawing shows the route and its nearest replacements. */
const MOST_LANES = 12;

/**
 * @typedef {object} Numbers
 * @property {number} tokens
 * @property {number | null} first_token_ms
 * @property {number | null} tokens_per_s
 * @property {number} [context_tokens] the question, the answer and all before them
 * @property {{computed_ms: number, waited_ms: number, other_ms: number} | null} mean how one token's time was spent
 */

/** The newest token that has hops, as it happened. */
export const latestToken = signal(/** @type {TokenTrace | null} */ (null));
/** A token of an answer that someone points at. */
export const looked = signal(
  /** @type {{message: import("./conversations.js").Message, index: number, token: TokenTrace} | null} */ (null),
);
/** The token whose route is drawn. */
export const shownToken = computed(() => looked.value?.token ?? latestToken.value);
/** By peer, its share of a token's time lately, from 0 to 1. */
export const heat = signal(/** @type {Map<string, number>} */ (new Map()));
export const numbers = signal(/** @type {Numbers | null} */ (null));
/** Re-routes, newest first. */
export const reroutes = signal(/** @type {string[]} */ ([]));
/** Spans of peers that went away during this answer. */
export const lostHops = signal(/** @type {Hop[]} */ ([]));

/** The record of one answer; shows itself on the page at most ten times a second. */
export class RouteRecord {
  #asked = performance.now();
  #first = 0;
  #last = 0;
  #count = 0;
  #position = -1;
  /** @type {TokenTrace[]} */
  #recent = [];
  #timer = 0;

  constructor() {
    latestToken.value = null;
    numbers.value = null;
    reroutes.value = [];
    lostHops.value = [];
  }

  /** @param {TokenTrace[]} traces */
  tokens(traces) {
    if (!traces.length) return;
    this.#last = performance.now();
    this.#first ||= this.#last;
    this.#count += traces.length;
    this.#position = traces[traces.length - 1].position;
    this.#recent = [...this.#recent, ...traces].slice(-RECENT_TOKENS);
    this.#timer ||= setTimeout(() => this.#show(), SHOW_EVERY_MS);
  }

  /** @param {Reroute} event */
  rerouted(event) {
    this.#show();
    reroutes.value = [event.message, ...reroutes.value].slice(0, MOST_EVENTS);
    announce(event.message);
    // A peer that the new route uses again is not gone: only the connection to it broke.
    if (event.route.some((span) => span.peer === event.lost)) return;
    const hops = latestToken.peek()?.hops ?? [];
    lostHops.value = [...lostHops.value, ...hops.filter((hop) => hop.peer === event.lost)];
    this.#recent = [];
  }

  /** The answer is over. */
  end() {
    this.#show();
    return numbers.peek();
  }

  #show() {
    clearTimeout(this.#timer);
    this.#timer = 0;
    latestToken.value = this.#recent.findLast((token) => token.hops.length > 0) ?? latestToken.peek();
    numbers.value = {
      tokens: this.#count,
      first_token_ms: this.#count ? this.#first - this.#asked : null,
      tokens_per_s: rate(this.#count - 1, this.#last - this.#first),
      context_tokens: this.#position + 1,
      mean: meanToken(this.#recent),
    };
    heat.value = hopShares(this.#recent);
  }
}

/** Forget the route on screen. */
export function clearRoute() {
  latestToken.value = null;
  looked.value = null;
  heat.value = new Map();
  numbers.value = null;
  reroutes.value = [];
  lostHops.value = [];
}

// ---------------------------------------------------------------- deciding

/**
 * Tokens a second, once that means something: a few tokens that came together have no speed.
 * @param {number} tokens
 * @param {number} ms
 */
function rate(tokens, ms) {
  return ms >= SHOW_EVERY_MS ? (tokens / ms) * 1000 : null;
}

/**
 * How the time of one token was spent, on average.
 * @param {TokenTrace[]} tokens
 */
export function meanToken(tokens) {
  // The first token's time is that of the whole prompt.
  const counted = tokens.filter((token) => token.hops.length > 0).slice(tokens.length > 1 ? 1 : 0);
  if (!counted.length) return null;
  const computed_ms = mean(counted, (token) => total(token.hops, (hop) => hop.computed_ms));
  const waited_ms = mean(counted, (token) => total(token.hops, (hop) => hop.waited_ms));
  const all_ms = mean(counted, (token) => token.ms);
  return { computed_ms, waited_ms, other_ms: Math.max(0, all_ms - computed_ms - waited_ms) };
}

/**
 * Which part of the hops' time each peer took: waiting, computing and the link to it.
 * @param {TokenTrace[]} tokens
 */
export function hopShares(tokens) {
  /** @type {Map<string, number>} */
  const spent = new Map();
  for (const { hops } of tokens.slice(tokens.length > 1 ? 1 : 0)) {
    for (const hop of hops) spent.set(hop.peer, (spent.get(hop.peer) ?? 0) + hopTime(hop));
  }
  const all = total([...spent.values()], (ms) => ms);
  return new Map([...spent].map(([peer, ms]) => [peer, all ? ms / all : 0]));
}

/** @param {Hop} hop */
function hopTime(hop) {
  return hop.waited_ms + hop.computed_ms + (hop.link_ms ?? 0);
}

/**
 * The route as one line of text, to read aloud and to copy.
 * @param {Hop[]} hops
 */
export function routeSentence(hops) {
  const stops = hops.map(
    (hop) => `${hop.name} (${layers(hop.start, hop.end)}, ${duration(hop.computed_ms)}, ${hop.path})`,
  );
  return [text.you, ...stops, text.you].join(" → ");
}

/**
 * @typedef {object} Lane
 * @property {string} key
 * @property {"peer" | "gap" | "lost"} kind
 * @property {string} name
 * @property {number} start
 * @property {number} end
 * @property {import("./swarm.js").Peer | null} peer
 * @property {Hop | null} hop the newest token's visit
 */

/**
 * One lane per span, ordered by layer, so that a route always runs downwards.
 * @param {Choice} model
 * @param {Hop[]} hops
 * @param {Hop[]} lost
 * @returns {{lanes: Lane[], left_out: number}}
 */
export function lanesOf(model, hops, lost) {
  const key = (/** @type {{peer: string}} */ span) => span.peer; // a peer serves one span of an artefact
  /** @type {Map<string, Lane>} */
  const lanes = new Map();
  for (const peer of model.peers) {
    lanes.set(key(peer), { ...span(peer), key: key(peer), kind: "peer", name: peer.name, peer, hop: null });
  }
  for (const hop of lost) {
    if (hops.some((other) => other.peer === hop.peer)) continue;
    lanes.set(key(hop), { ...span(hop), key: key(hop), kind: "lost", name: hop.name, peer: null, hop: null });
  }
  for (const hop of hops) {
    const known = lanes.get(key(hop));
    // A route may use a part of a peer's span; the lane then shows that part.
    lanes.set(key(hop), {
      ...span(hop),
      key: key(hop),
      kind: "peer",
      name: hop.name,
      peer: known?.peer ?? null,
      hop,
    });
  }
  const all = [...lanes.values()];
  const important = (/** @type {Lane} */ lane) => lane.hop !== null || lane.kind === "lost";
  const shown = [...all.filter(important), ...all.filter((lane) => !important(lane))].slice(0, MOST_LANES);
  const gaps = model.gaps.map(([start, end]) => gapLane(start, end));
  return { lanes: [...shown, ...gaps].sort(byLayer), left_out: all.length - shown.length };
}

/** @param {number} start @param {number} end @returns {Lane} */
function gapLane(start, end) {
  return { key: `gap ${start}`, kind: "gap", name: text.nobodyHere, start, end, peer: null, hop: null };
}

/** @param {Lane} a @param {Lane} b */
function byLayer(a, b) {
  return a.start - b.start || a.end - b.end || a.name.localeCompare(b.name) || a.key.localeCompare(b.key);
}

/** @param {{start: number, end: number}} value */
function span({ start, end }) {
  return { start, end };
}

/**
 * The layers where a span begins or ends: the numbers worth writing on the axis.
 * @param {Lane[]} lanes
 * @param {number} layerCount
 * @param {number} most
 */
export function axisMarks(lanes, layerCount, most) {
  const edges = new Set([0, layerCount, ...lanes.flatMap((lane) => [lane.start, lane.end])]);
  const apart = layerCount / most;
  /** @type {number[]} */
  const marks = [];
  for (const edge of [...edges].sort((a, b) => a - b)) {
    if (marks.length === 0 || edge - marks[marks.length - 1] >= apart) marks.push(edge);
  }
  if (marks[marks.length - 1] !== layerCount) marks[marks.length - 1] = layerCount;
  return marks;
}

/** @typedef {{d: string, path: Hop["path"] | null, middle: [number, number]}} Segment */

/**
 * The way of a token as curves: from you, through the lanes' bars, back to you.
 * @param {{x: number, y: number}} from
 * @param {{x1: number, x2: number, y: number, path: Hop["path"]}[]} bars in the order of the hops
 * @param {{x: number, y: number}} to
 * @returns {{segments: Segment[], whole: string}}
 */
export function vine(from, bars, to) {
  /** @type {Segment[]} */
  const segments = [];
  let whole = `M${from.x} ${from.y}`;
  let [x, y] = [from.x, from.y];
  bars.forEach((bar, index) => {
    const bend = Math.min(36, Math.max(16, Math.abs(bar.y - y) * 0.4));
    // The first stem leaves you downwards; all others leave a bar to the right.
    const out = index === 0 ? [x, y + bend * 1.4] : [x + bend, y];
    const curve = [out, [bar.x1 - bend, bar.y], [bar.x1, bar.y]];
    segments.push(segment([x, y], curve, bar.path));
    whole += ` C${curve.flat().join(" ")} L${bar.x2} ${bar.y}`;
    [x, y] = [bar.x2, bar.y];
  });
  const home = [
    [to.x, y],
    [to.x, y + 12],
    [to.x, to.y],
  ];
  segments.push(segment([x, y], home, null));
  return { segments, whole: `${whole} C${home.flat().join(" ")}` };
}

/** @param {number[]} start @param {number[][]} curve @param {Hop["path"] | null} path @returns {Segment} */
function segment(start, curve, path) {
  const at = (/** @type {number} */ axis) =>
    (start[axis] + 3 * curve[0][axis] + 3 * curve[1][axis] + curve[2][axis]) / 8;
  return { d: `M${start.join(" ")} C${curve.flat().join(" ")}`, path, middle: [at(0), at(1)] };
}

/** @template T @param {T[]} values @param {(value: T) => number} of */
function total(values, of) {
  return values.reduce((sum, value) => sum + of(value), 0);
}

/** @template T @param {T[]} values @param {(value: T) => number} of */
function mean(values, of) {
  return total(values, of) / values.length;
}
