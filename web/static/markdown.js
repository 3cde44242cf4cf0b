// Markdown of an answer as DOM, while it streams. The text comes from strangers' machines: raw HTML is shown
// as text, images become links, DOMPurify checks what is left, and the page's policy stands behind that.
import DOMPurify from "dompurify";
import { Marked } from "marked";
import { highlight } from "./highlight.js";
import { copyText } from "./copy.js";
import { text as words } from "./words.js";

const DRAW_EVERY_MS = 45;

const ALLOWED = {
  ALLOWED_TAGS: (
    "a blockquote br code del em h1 h2 h3 h4 h5 h6 hr li ol p pre strong table tbody td th thead tr ul span"
  ).split(" "),
  ALLOWED_ATTR: ["href", "title", "class", "start", "align"],
  ALLOWED_URI_REGEXP: /^(?:https?:|mailto:)/i,
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};

const marked = new Marked({
  gfm: true,
  breaks: false,
  renderer: {
    html: ({ text }) => escape(text),
    image: ({ href, text }) => `<a href="${escape(href)}">${escape(text || href)}</a>`,
    checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
    code: ({ text, lang }) =>
      `<pre><code class="language-${escape((lang ?? "").match(/^[\w+#-]+/)?.[0] ?? "")}">${escape(text)}</code></pre>`,
  },
});

/** @param {string} text */
function escape(text) {
  return text.replace(/[&<>"']/g, (character) => `&#${character.charCodeAt(0)};`);
}

/**
 * Markdown as a checked fragment.
 * @param {string} source
 */
export function renderMarkdown(source) {
  const markup = /** @type {string} */ (marked.parse(source));
  const fragment = /** @type {DocumentFragment} */ (
    /** @type {unknown} */ (DOMPurify.sanitize(markup, ALLOWED))
  );
  for (const link of fragment.querySelectorAll("a")) {
    link.target = "_blank";
    link.rel = "noopener noreferrer nofollow";
  }
  // A wide table scrolls by itself instead of widening the page.
  for (const table of fragment.querySelectorAll("table")) wrap(table, "wide");
  return fragment;
}

/** Renders a growing text into an element: finished blocks once, only the last block again and again. */
export class GrowingMarkdown {
  #source = "";
  #finished = 0;
  #frame = 0;
  #earliest = 0;
  #tail = document.createElement("div");

  /** @param {HTMLElement} home */
  constructor(home) {
    this.home = home;
    this.#tail.className = "tail";
    home.append(this.#tail);
  }

  /**
   * The whole text so far. Drawn with the next frame, however many words come before it.
   * @param {string} source
   * @param {boolean} complete
   */
  show(source, complete) {
    this.#source = source;
    if (complete) {
      cancelAnimationFrame(this.#frame);
      this.#frame = 0;
      this.#complete();
    } else {
      this.#frame ||= requestAnimationFrame((now) => this.#draw(now));
    }
  }

  /** Stop drawing. */
  close() {
    cancelAnimationFrame(this.#frame);
  }

  /** @param {number} now */
  #draw(now) {
    this.#frame = 0;
    if (now < this.#earliest) {
      this.#frame = requestAnimationFrame((later) => this.#draw(later));
      return;
    }
    const began = performance.now();
    this.#finish(marked.lexer(this.#source.slice(this.#finished)));
    this.#tail.replaceChildren(renderMarkdown(this.#source.slice(this.#finished)));
    const cost = performance.now() - began;
    // Layout follows each drawing, and nobody reads faster. A very long last block, such as a table, may take a
    // fifth of the time and no more.
    this.#earliest = now + Math.max(DRAW_EVERY_MS, 4 * cost);
  }

  /** Everything before the last block cannot change any more. @param {{type: string, raw: string}[]} blocks */
  #finish(blocks) {
    const last = blocks.findLastIndex((block) => block.type !== "space");
    const length = blocks.slice(0, Math.max(0, last)).reduce((sum, block) => sum + block.raw.length, 0);
    // The lexer may have rewritten the text, such as tabs; then lengths say nothing and all stays in the tail.
    if (blocks.reduce((sum, block) => sum + block.raw.length, 0) !== this.#source.length - this.#finished) return;
    if (length) this.#keep(this.#source.slice(this.#finished, this.#finished + length));
  }

  #complete() {
    // A link may be defined at the end and used at the start: only the whole text knows.
    if (/^ {0,3}\[[^\]]+\]:/m.test(this.#source)) {
      this.home.replaceChildren(this.#tail);
      this.#finished = 0;
    }
    this.#keep(this.#source.slice(this.#finished));
    this.#tail.remove();
  }

  /** @param {string} source */
  #keep(source) {
    const fragment = renderMarkdown(source);
    for (const code of fragment.querySelectorAll("pre > code")) finishCode(/** @type {HTMLElement} */ (code));
    this.home.insertBefore(fragment, this.#tail.parentNode === this.home ? this.#tail : null);
    this.#finished += source.length;
  }
}

/**
 * Give a block of code its language, its colours and a button.
 * @param {HTMLElement} code
 */
function finishCode(code) {
  const language = code.className.replace("language-", "");
  const pre = /** @type {HTMLElement} */ (code.parentElement);
  pre.tabIndex = 0; // so that the keyboard can scroll it
  const figure = wrap(pre, "code");
  const bar = document.createElement("div");
  bar.className = "code-bar";
  const name = document.createElement("span");
  name.textContent = language || "text";
  bar.append(name, copyButton(() => code.textContent ?? ""));
  figure.prepend(bar);
  highlight(code, language);
}

/** @param {() => string} text */
function copyButton(text) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "quiet copy";
  button.textContent = words.copy;
  button.setAttribute("aria-label", `${words.copy} the code`);
  button.addEventListener("click", async () => {
    button.textContent = (await copyText(text())) ? words.copied : words.copyFailed;
    setTimeout(() => (button.textContent = words.copy), 1600);
  });
  return button;
}

/** @param {HTMLElement} element @param {string} name */
function wrap(element, name) {
  const frame = document.createElement("div");
  frame.className = name;
  element.replaceWith(frame);
  frame.append(element);
  return frame;
}
