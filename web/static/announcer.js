// Says things to screen readers, politely: at most one message a second, whole sentences only.
import { signal } from "@preact/signals";

const PAUSE_MS = 1000;

/** What the live region holds. */
export const announced = signal("");

/** @type {string[]} */
let waiting = [];
let timer = 0;

/** @param {string} sentence */
export function announce(sentence) {
  waiting.push(sentence);
  timer ||= setTimeout(speak, 0);
}

function speak() {
  if (!waiting.length) {
    timer = 0;
    return;
  }
  const words = waiting.join(" ");
  // The same words again would be no change of the region, and nobody would hear them.
  announced.value = words === announced.peek() ? `${words}\u00a0` : words;
  waiting = [];
  timer = setTimeout(speak, PAUSE_MS);
}

/**
 * Where the last finished sentence ends, counted from `from`; `from` when none does.
 * @param {string} text
 * @param {number} from
 */
export function sentenceEnd(text, from) {
  const ends = [...text.slice(from).matchAll(/[.!?…:](?=\s)|\n/g)];
  const last = ends.at(-1);
  return last ? from + last.index + 1 : from;
}
