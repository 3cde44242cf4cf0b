// How the swarm was in the last hour, as small lines. The gateway remembers; this file asks it and draws.
import { signal } from "@preact/signals";
import { useEffect } from "preact/hooks";
import { html } from "./html.js";
import { rounded, text } from "./words.js";

const ASK_EVERY_MS = 15_000;
const WIDTH = 240;
const HEIGHT = 56;

/** @typedef {{at: number[], peers: number[], sessions: number[], tokens_per_s: number[], kv_tokens_free: number[]}} Hour */

/** By artefact. */
const hours = signal(/** @type {Record<string, Hour>} */ ({}));

/** @param {{artefact: string}} props */
export function LastHour({ artefact }) {
  useEffect(() => {
    look();
    const timer = setInterval(look, ASK_EVERY_MS);
    return () => clearInterval(timer);
  }, []);
  const hour = hours.value[artefact];
  if (!hour || hour.at.length < 2) return html`<p class="nothing">${text.noHistory}</p>`;
  const charts = /** @type {(keyof typeof text.charts)[]} */ (Object.keys(text.charts));
  return html`<div class="charts">
    ${charts.map((name) => html`<${Line} key=${name} title=${text.charts[name]} at=${hour.at} values=${hour[name]} />`)}
  </div>`;
}

async function look() {
  try {
    const response = await fetch("/api/history");
    if (response.ok) hours.value = await response.json();
  } catch {
    // The gateway is away, which the page says elsewhere; the lines stay as they were.
  }
}

/** @param {{title: string, at: number[], values: number[]}} props */
function Line({ title, at, values }) {
  const most = Math.max(...values, 1);
  const now = /** @type {number} */ (values.at(-1));
  const minutes = Math.max(1, Math.round((/** @type {number} */ (at.at(-1)) - at[0]) / 60));
  const said = text.chartSaid(title, now, Math.min(...values), Math.max(...values), minutes);
  return html`<figure class="chart">
    <figcaption><span>${title}</span><b>${rounded(now)}</b></figcaption>
    <svg viewBox="0 0 ${WIDTH} ${HEIGHT}" preserveAspectRatio="none" role="img" aria-label=${said}>
      <path d=${path(at, values, most)} />
    </svg>
    <p class="span"><span>${text.minutesAgo(minutes)}</span><span>${text.mostWas(Math.max(...values))}</span></p>
  </figure>`;
}

/**
 * Steps, since each value holds until the next one was noted.
 * @param {number[]} at
 * @param {number[]} values
 * @param {number} most
 */
function path(at, values, most) {
  const begin = at[0];
  const length = /** @type {number} */ (at.at(-1)) - begin || 1;
  const x = (/** @type {number} */ index) => ((at[index] - begin) / length) * WIDTH;
  const y = (/** @type {number} */ value) => HEIGHT - 3 - (value / most) * (HEIGHT - 8);
  return values.map((value, index) => (index ? `H${x(index).toFixed(1)}V` : `M0 `) + y(value).toFixed(1)).join("");
}
