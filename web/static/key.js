// The key that some gateways ask for: asked once, kept in this browser, told to nobody but the gateway.
import { createRef } from "preact";
import { signal } from "@preact/signals";
import { html } from "./html.js";
import { text } from "./words.js";

const KEPT = "corolla-key";

/** Empty while none was needed. */
export const apiKey = signal(localStorage.getItem(KEPT) ?? "");

const refused = signal(false);
/** @type {import("preact").RefObject<HTMLDialogElement | null>} */
const dialog = createRef();
/** @type {((key: string) => void) | null} */
let answered = null;

/** @param {string} key */
export function keepKey(key) {
  apiKey.value = key.trim();
  if (apiKey.value) localStorage.setItem(KEPT, apiKey.value);
  else localStorage.removeItem(KEPT);
}

/**
 * Ask the reader for a key; gives an empty text when there is none. `wrong` says that the one at hand was refused.
 * @param {boolean} wrong
 * @returns {Promise<string>}
 */
export function askForKey(wrong) {
  refused.value = wrong;
  dialog.current?.showModal();
  return new Promise((resolve) => (answered = resolve));
}

export function KeyDialog() {
  return html`<dialog class="sheet" ref=${dialog} aria-labelledby="key-title" onClose=${closed}>
    <form method="dialog" class="sheet-body" onSubmit=${take}>
      <header><h2 id="key-title">${text.keyTitle}</h2></header>
      ${refused.value && html`<p class="failure" role="alert">${text.keyWrong}</p>`}
      <div class="field">
        <label for="key">${text.key}</label>
        <input id="key" type="password" autocomplete="current-password" required aria-describedby="about-key" />
        <small id="about-key">${text.aboutKey}</small>
      </div>
      <footer>
        <button type="button" class="quiet" onClick=${() => dialog.current?.close()}>${text.cancel}</button>
        <button type="submit" class="soft">${text.keyUse}</button>
      </footer>
    </form>
  </dialog>`;
}

/** @param {Event} event */
function take(event) {
  const field = /** @type {HTMLInputElement} */ (/** @type {HTMLFormElement} */ (event.target).querySelector("#key"));
  keepKey(field.value);
  field.value = "";
  finish(apiKey.peek());
}

function closed() {
  finish("");
}

/** @param {string} key */
function finish(key) {
  answered?.(key);
  answered = null;
}
