// From a place in an answer on screen to the token that made it, and back. What is on screen lacks markdown's
// signs, so its characters are found again in the source, one after the other.
import { looked } from "./route.js";

/** @typedef {import("./conversations.js").Message} Message */
/** @typedef {{nodes: Text[], starts: number[], source: number[]}} Shown the text nodes, and each character's source */

/** A character that the source does not have so near is the page's own, and stands for nothing. */
const NEAR = 400;
const NAME = "looked-token";

/**
 * For each character shown, where it stands in the source.
 * @param {string} shown
 * @param {string} source
 */
export function align(shown, source) {
  let at = 0;
  return Array.from({ length: shown.length }, (_, index) => {
    const found = source.indexOf(shown[index], at);
    if (found >= 0 && found - at < NEAR) at = found + 1;
    return Math.max(0, at - 1);
  });
}

/** @param {HTMLElement} home @param {string} source @returns {Shown} */
function shownIn(home, source) {
  const walker = document.createTreeWalker(home, NodeFilter.SHOW_TEXT, (node) =>
    node.parentElement?.closest(".code-bar") ? NodeFilter.FILTER_REJECT : NodeFilter.FILTER_ACCEPT,
  );
  /** @type {Text[]} */
  const nodes = [];
  const starts = [];
  let shown = "";
  while (walker.nextNode()) {
    const node = /** @type {Text} */ (walker.currentNode);
    nodes.push(node);
    starts.push(shown.length);
    shown += node.data;
  }
  return { nodes, starts, source: align(shown, source) };
}

/**
 * The token under a point of the screen; -1 when there is none.
 * @param {Message} message @param {HTMLElement} home @param {number} x @param {number} y
 */
function tokenAt(message, home, x, y) {
  const caret = document.caretPositionFromPoint?.(x, y);
  const { nodes, starts, source } = shownIn(home, message.content.peek());
  const node = caret ? nodes.indexOf(/** @type {Text} */ (caret.offsetNode)) : -1;
  if (!caret || node < 0) return -1;
  const offset = source[Math.min(starts[node] + caret.offset, source.length - 1)];
  return message.tokens.findIndex(({ end }) => end > offset);
}

/** Show the route of a token and mark its text. @param {Message} message @param {HTMLElement | null} home @param {number} index */
export function lookAt(message, home, index) {
  const token = message.tokens[index];
  if (!token) return lookAway();
  looked.value = { message, index, token: token.trace };
  if (home) mark(message, home, index);
}

export function lookAway() {
  looked.value = null;
  globalThis.CSS?.highlights?.delete(NAME);
}

/** @param {Message} message @param {HTMLElement} home @param {number} index */
function mark(message, home, index) {
  if (!globalThis.CSS?.highlights) return;
  const [begin, end] = [message.tokens[index - 1]?.end ?? 0, message.tokens[index].end];
  const { nodes, starts, source } = shownIn(home, message.content.peek());
  const first = source.findIndex((at) => at >= begin);
  const last = source.findLastIndex((at) => at < end);
  if (first < 0 || last < first) return void CSS.highlights.delete(NAME);
  const place = (/** @type {number} */ at) => {
    const node = starts.findLastIndex((start) => start <= at);
    return /** @type {[Text, number]} */ ([nodes[node], at - starts[node]]);
  };
  const range = new Range();
  range.setStart(...place(first));
  const [lastNode, lastAt] = place(last);
  range.setEnd(lastNode, Math.min(lastAt + 1, lastNode.length));
  CSS.highlights.set(NAME, new Highlight(range));
}

/**
 * Follow the pointer over an answer's text. Returns what ends it.
 * @param {Message} message
 * @param {HTMLElement} home
 */
export function followPointer(message, home) {
  let planned = 0;
  const move = (/** @type {PointerEvent} */ event) => {
    cancelAnimationFrame(planned);
    planned = requestAnimationFrame(() => {
      // Looking at a growing answer would compare all of it with every frame.
      if (message.state.peek() !== "streaming") lookAt(message, home, tokenAt(message, home, event.clientX, event.clientY));
    });
  };
  const leave = () => {
    cancelAnimationFrame(planned);
    lookAway();
  };
  home.addEventListener("pointermove", move);
  home.addEventListener("pointerdown", move);
  home.addEventListener("pointerleave", leave);
  return () => {
    cancelAnimationFrame(planned);
    home.removeEventListener("pointermove", move);
    home.removeEventListener("pointerdown", move);
    home.removeEventListener("pointerleave", leave);
    lookAway();
  };
}
