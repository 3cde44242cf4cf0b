// The route, drawn: one lane per span, layers from left to right, and the newest token's way as a vine
// through them. It shows what happened, never what was planned.
import { signal } from "@preact/signals";
import { useEffect, useLayoutEffect, useRef, useState } from "preact/hooks";
import { answering } from "./answer.js";
import { conversation } from "./conversations.js";
import { CopyButton } from "./copy.js";
import { depth } from "./flower.js";
import { html } from "./html.js";
import { lookAt, lookAway } from "./pointing.js";
import { axisMarks, heat, lanesOf, latestToken, looked, lostHops, numbers, reroutes, routeSentence, shownToken, vine } from "./route.js";
import { chosenModel } from "./swarm.js";
import { counted, duration, layers, perSecond, text } from "./words.js";

/** @typedef {import("./route.js").Lane} Lane */

const AXIS_PX = 40;
const LANE_PX = 60;
/** From the top of a lane to the middle of its bar. */
const BAR_PX = 19;
/** Room beside the track where the vine leaves you and comes home. */
const GUTTER_PX = 15;
/** Narrower petals are not worth telling apart: the bar is then one piece. */
const LEAST_PETAL_PX = 5;
const LEAST_MARK_PX = 26;
const LEAST_COUNT_PX = 13;
/** A narrower bar has its time beside it: below, the vine would run through the words. */
const LEAST_TIMED_PX = 54;
const SHORTEST_PULSE_MS = 260;
const LONGEST_PULSE_MS = 1100;

/** On a narrow screen the panel is folded away until it is asked for. */
const open = signal(false);

export function RoutePanel() {
  return html`<aside class="route ${open.value ? "open" : ""}" aria-labelledby="route-title">
    <div class="route-head">
      <h2 id="route-title">${text.route}</h2>
      <p class="glance" aria-hidden="true">${glance()}</p>
      <button
        type="button"
        class="quiet unfold"
        aria-expanded=${open.value}
        aria-controls="route-body"
        aria-label=${open.value ? text.hideRoute : text.showRoute}
        onClick=${() => (open.value = !open.value)}
      >
        <svg viewBox="0 0 20 20" aria-hidden="true"><path d="m5 12.5 5-5 5 5" /></svg>
      </button>
    </div>
    <div id="route-body" class="route-body" tabindex="0" role="region" aria-labelledby="route-title">
      <${Numbers} />
      <${Drawing} />
      <${Reroutes} />
      <${Sentence} />
      <${Stepper} />
    </div>
  </aside>`;
}

/** The panel in one line, for when it is folded. */
function glance() {
  const hops = latestToken.value?.hops ?? [];
  if (!hops.length) return chosenModel.value ? counted(chosenModel.value.peers.length, "peer", "peers") : "";
  const rate = numbers.value?.tokens_per_s;
  return hops.map((hop) => hop.name).join(" → ") + (rate ? ` · ${perSecond(rate)} tokens/s` : "");
}

// ---------------------------------------------------------------- numbers

function Numbers() {
  const now = numbers.value;
  const shown = [
    ["tokens/s", now?.tokens_per_s ? perSecond(now.tokens_per_s) : "–"],
    ["first token", now && now.first_token_ms !== null ? duration(now.first_token_ms) : "–"],
    ["tokens", now?.tokens ? String(now.tokens) : "–"],
  ];
  return html`<dl class="numbers">
    ${shown.map(([name, value]) => html`<div class=${value === "–" ? "none" : ""}><dt>${name}</dt><dd>${value}</dd></div>`)}
  </dl>`;
}

// ---------------------------------------------------------------- drawing

function Drawing() {
  const model = chosenModel.value;
  const [track, width] = useWidth();
  const hops = shownToken.value?.hops ?? [];
  if (!model) return html`<p class="nothing">${text.noRoute}</p>`;
  const { lanes, left_out } = lanesOf(model, hops, lostHops.value);
  const sizes = { "--lane": `${LANE_PX}px`, "--axis": `${AXIS_PX}px`, "--bar": `${BAR_PX}px`, "--gutter": `${GUTTER_PX}px` };
  return html`<figure class="drawing ${hops.length ? "used" : ""}" style=${sizes} aria-label="Lanes of ${model.label}: one for each span of layers">
      <${Axis} model=${model} lanes=${lanes} width=${width} track=${track} />
      <ul class="lanes">
        ${lanes.map((lane) => html`<${LaneRow} key=${lane.key} lane=${lane} model=${model} width=${width} />`)}
      </ul>
      <${Coverage} model=${model} width=${width} home=${hops.length > 0} />
      <${Vine} lanes=${lanes} hops=${hops} count=${model.layer_count} width=${width} />
    </figure>
    ${left_out > 0 && html`<p class="nothing">and ${counted(left_out, "more peer", "more peers")}</p>`}
    ${hops.length === 0 && html`<p class="nothing">${answering.value ? `${text.reading}…` : text.noRoute}</p>`}
    ${hops.length > 0 && html`<${Legend} /><${Reached} lanes=${lanes} />`}`;
}

/** @returns {[import("preact").RefObject<HTMLElement | null>, number]} */
function useWidth() {
  const element = useRef(/** @type {HTMLElement | null} */ (null));
  const [width, setWidth] = useState(0);
  useEffect(() => {
    const found = element.current;
    if (!found) return;
    const observer = new ResizeObserver(([entry]) => setWidth(Math.round(entry.contentRect.width)));
    observer.observe(found);
    return () => observer.disconnect();
  }, [chosenModel.value === null]);
  return [element, width];
}

/** @param {{model: import("./swarm.js").Choice, lanes: Lane[], width: number, track: any}} props */
function Axis({ model, lanes, width, track }) {
  const marks = axisMarks(lanes, model.layer_count, Math.max(2, width / LEAST_MARK_PX));
  return html`<div class="axis row">
    <span class="end">${text.you}<small>gateway</small></span>
    <span class="track" ref=${track} aria-hidden="true">
      <span class="axis-name">layer</span>
      ${marks.map(
        (mark) => html`<span class="mark" style=${{ left: percent(mark, model.layer_count) }}>${mark}</span>`,
      )}
    </span>
  </div>`;
}

/** @param {{lane: Lane, model: import("./swarm.js").Choice, width: number}} props */
function LaneRow({ lane, model, width }) {
  const count = model.layer_count;
  const place = { left: percent(lane.start, count), width: percent(lane.end - lane.start, count) };
  const inPetals = width / count >= LEAST_PETAL_PX;
  const all = Array.from({ length: lane.end - lane.start }, (_, index) => lane.start + index);
  const share = (lane.hop && heat.value.get(lane.hop.peer)) ?? 0;
  return html`<li class="lane row ${lane.kind} ${lane.hop ? "lit" : ""}" data-peer=${lane.name} style=${{ "--heat": share }}>
    <span class="who" title=${lane.peer?.path_words ?? undefined}>
      <span class="name"><bdi>${lane.name}</bdi>${share > 0 && html` <small class="share" title=${text.shareOfTime}>${Math.round(100 * share)}%</small>`}</span>
      ${aboutLane(lane).map((line) => html`<small>${line}</small>`)}
    </span>
    <span class="track">
      <span class="bar ${inPetals ? "petals" : "whole"}" style=${place}>
        ${inPetals && lane.kind !== "gap"
          ? all.map((layer) => html`<i style=${{ "--depth": depth(layer, count) }} />`)
          : html`<i style=${{ "--depth": depth((lane.start + lane.end - 1) / 2, count) }} />`}
      </span>
      <${Time} lane=${lane} count=${count} width=${width} />
    </span>
  </li>`;
}

/** How long the computation took, under the bar or beside it. @param {{lane: Lane, count: number, width: number}} props */
function Time({ lane, count, width }) {
  const said = lane.hop ? duration(lane.hop.computed_ms) : lane.kind === "lost" ? text.gone : "";
  if (!said) return null;
  const middle = (lane.start + lane.end) / 2;
  if (((lane.end - lane.start) / count) * width >= LEAST_TIMED_PX) {
    return html`<span class="time below" style=${{ left: percent(middle, count) }}>${said}</span>`;
  }
  const side = middle < count / 2 ? { left: percent(lane.end, count) } : { right: percent(count - lane.start, count) };
  return html`<span class="time beside" style=${side}>${said}</span>`;
}

/** Under a peer's name: how the token came here, or else what the peer is. @param {Lane} lane */
function aboutLane({ kind, start, end, hop, peer }) {
  if (kind !== "peer") return [layers(start, end)];
  if (!hop) return [layers(start, end), peer && peer.state !== "serving" ? peer.state : (peer?.device ?? "")];
  const link = hop.link_ms === undefined ? hop.path : `${hop.path}, ${duration(hop.link_ms)}`;
  return [link, `waited ${duration(hop.waited_ms)}`];
}

/** @param {{model: import("./swarm.js").Choice, width: number, home: boolean}} props */
function Coverage({ model, width, home }) {
  const { coverage, layer_count } = model;
  const numbered = width / layer_count >= LEAST_COUNT_PX;
  const weakest = Math.min(...coverage);
  return html`<div class="coverage row">
    <span class="who"><small>${text.peersPerLayer}</small></span>
    <span class="track" role="img" aria-label="Fewest peers on one layer: ${weakest}">
      ${coverage.map(
        (peers) =>
          html`<i class=${peers === 0 ? "none" : ""} style=${{ "--peers": Math.min(peers, 4) }}>${numbered ? peers : ""}</i>`,
      )}
    </span>
    ${home && html`<span class="end home">${text.you}</span>`}
  </div>`;
}

/** @param {{lanes: Lane[], hops: import("./route.js").Hop[], count: number, width: number}} props */
function Vine({ lanes, hops, count, width }) {
  const pulse = useRef(/** @type {SVGPathElement | null} */ (null));
  usePulse(pulse, latestToken.value);
  if (!hops.length || !width) return null;
  const bars = hops.map((hop) => ({
    x1: (hop.start / count) * width,
    x2: (hop.end / count) * width,
    y: AXIS_PX + LANE_PX * lanes.findIndex((lane) => lane.hop === hop) + BAR_PX,
    path: hop.path,
  }));
  const bottom = AXIS_PX + LANE_PX * lanes.length;
  const way = vine({ x: -GUTTER_PX, y: 17 }, bars, { x: width + GUTTER_PX, y: bottom + 20 });
  return html`<svg class="vine" aria-hidden="true">
    ${way.segments.map(({ d }) => html`<path class="halo" d=${d} />`)}
    ${way.segments.map(({ d, path }) => html`<path class="stem ${path ?? "home"}" d=${d} />`)}
    ${way.segments.map(({ path, middle: [x, y] }) => path === "relayed" && html`<path class="relay" d=${diamond(x, y)} />`)}
    <path class="pulse" ref=${pulse} d=${way.whole} pathLength="100" />
    <circle class="you" cx=${-GUTTER_PX} cy="17" r="4.5" />
    <circle class="you" cx=${width + GUTTER_PX} cy=${bottom + 20} r="4.5" />
  </svg>`;
}

/**
 * One pulse along the vine for a new token, as long as the token took; while one runs, others pass unseen.
 * @param {import("preact").RefObject<SVGPathElement | null>} path
 * @param {import("./completions.js").TokenTrace | null} token
 */
function usePulse(path, token) {
  const running = useRef(/** @type {Animation | null} */ (null));
  useLayoutEffect(() => {
    if (!token || !path.current || !answering.peek() || running.current?.playState === "running") return;
    if (matchMedia("(prefers-reduced-motion: reduce)").matches) return;
    running.current = path.current.animate(
      [
        { strokeDashoffset: 9, opacity: 1 },
        { strokeDashoffset: -100, opacity: 1 },
      ],
      { duration: Math.min(LONGEST_PULSE_MS, Math.max(SHORTEST_PULSE_MS, token.ms)), easing: "ease-in-out" },
    );
  }, [token]);
}

/** @param {number} x @param {number} y */
function diamond(x, y) {
  return `M${x} ${y - 6}L${x + 6} ${y}L${x} ${y + 6}L${x - 6} ${y}Z`;
}

function Legend() {
  const local = shownToken.value?.hops.some((hop) => hop.path === "local");
  return html`<ul class="legend" aria-label="How a token travels">
    <li><svg viewBox="0 0 30 12" aria-hidden="true"><path class="stem direct" d="M1 6H29" /></svg>direct</li>
    <li>
      <svg viewBox="0 0 30 12" aria-hidden="true"
        ><path class="stem relayed" d="M1 6H29" /><path class="relay" d=${diamond(15, 6)}
      /></svg>
      relayed
    </li>
    ${local && html`<li><svg viewBox="0 0 30 12" aria-hidden="true"><path class="stem local" d="M1 6H29" /></svg>same machine (local)</li>`}
    <li class="spent">${spent()}</li>
  </ul>`;
}

/** How the gateway reaches each peer of the route, and why not better. @param {{lanes: Lane[]}} props */
function Reached({ lanes }) {
  const told = lanes.filter((lane) => lane.hop && lane.peer?.path_words);
  if (!told.length) return null;
  return html`<ul class="reached" aria-label=${text.reached}>
    ${told.map(({ name, peer }) => html`<li><bdi>${name}</bdi>: ${peer?.path_words}</li>`)}
  </ul>`;
}

/** Where the time of a token goes, in words. */
function spent() {
  const mean = numbers.value?.mean;
  if (!mean) return "";
  const all = mean.computed_ms + mean.waited_ms + mean.other_ms;
  return `${duration(all)} a token: ${duration(mean.computed_ms)} computing, ${duration(mean.waited_ms)} waiting, ${duration(mean.other_ms)} on the way`;
}

/** Through the tokens of the newest answer, one by one: for keyboards, touch and those who do not see the lanes. */
function Stepper() {
  const message = conversation.value.path.value.at(-1);
  if (!message || answering.value || !message.tokens.length) return null;
  const at = looked.value?.message === message ? looked.value.index : message.tokens.length - 1;
  const begin = message.tokens[at - 1]?.end ?? 0;
  const words = message.content.peek().slice(begin, message.tokens[at].end).trim();
  const said = `token ${at + 1} of ${message.tokens.length}${words ? ` “${words}”` : ""}, ${duration(message.tokens[at].trace.ms)}`;
  const step = (/** @type {any} */ event) =>
    lookAt(message, document.querySelector(`[data-message="${message.id}"]`), Number(event.target.value) - 1);
  return html`<label class="stepper">
    <span>${said}</span>
    <input
      type="range"
      min="1"
      max=${message.tokens.length}
      value=${at + 1}
      aria-label=${text.stepper}
      aria-valuetext=${said}
      onInput=${step}
      onBlur=${lookAway}
    />
  </label>`;
}

// ---------------------------------------------------------------- words

function Reroutes() {
  if (!reroutes.value.length) return null;
  return html`<ul class="reroutes" aria-label="Changes of the route">
    ${reroutes.value.map((message) => html`<li>${message}</li>`)}
  </ul>`;
}

function Sentence() {
  const hops = shownToken.value?.hops ?? [];
  if (!hops.length) return null;
  const sentence = routeSentence(hops);
  return html`<div class="sentence">
    <p data-testid="route-sentence">${sentence}</p>
    <${CopyButton} text=${() => routeSentence(shownToken.peek()?.hops ?? [])} what="the route" />
  </div>`;
}

/** @param {number} part @param {number} whole */
function percent(part, whole) {
  return `${(100 * part) / whole}%`;
}
