// Where a question is written. Enter sends it, Shift+Enter begins a new line.
import { createRef } from "preact";
import { signal } from "@preact/signals";
import { answering, ask, stop } from "./answer.js";
import { html } from "./html.js";
import { chosenModel, isCovered } from "./swarm.js";
import { text } from "./words.js";

const draft = signal("");
/** @type {import("preact").RefObject<HTMLTextAreaElement | null>} */
const field = createRef();

/** Put the cursor where the next question goes. */
export function focusComposer() {
  field.current?.focus();
}

/** Ask a question that was not typed here. @param {string} question */
export function send(question) {
  if (!canSend()) return;
  ask(question);
  focusComposer();
}

export function Composer() {
  const waits = chosenModel.value !== null && !isCovered(chosenModel.value);
  const news = waits ? text.notYet : answering.value ? text.hintAnswering : "";
  return html`<form class="composer" onSubmit=${submit}>
    <div class="writing">
      <label class="unseen" for="question">${text.composer}</label>
      <textarea
        id="question"
        ref=${field}
        rows="1"
        autofocus
        placeholder=${text.placeholder}
        aria-describedby="hint"
        value=${draft.value}
        onInput=${(/** @type {any} */ event) => (draft.value = event.target.value)}
        onKeyDown=${keyDown}
      />
      ${answering.value ? html`<${StopButton} />` : html`<${SendButton} />`}
    </div>
    <p id="hint" class="hint"><span class=${news ? "" : "keys"}>${news || text.hint}</span><span>${text.readableShort}</span></p>
  </form>`;
}

function SendButton() {
  const able = canSend() && draft.value.trim() !== "";
  // Not `disabled`: a button that loses the focus while someone tabs through is worse than one that waits.
  return html`<button type="submit" class="round" aria-label=${text.send} aria-disabled=${!able}>
    <svg viewBox="0 0 20 20" aria-hidden="true"><path d="M10 16V4.5M4.8 9.6 10 4.4l5.2 5.2" /></svg>
  </button>`;
}

function StopButton() {
  return html`<button type="button" class="round stop" aria-label=${text.stop} onClick=${stopAndStay}>
    <svg viewBox="0 0 20 20" aria-hidden="true"><rect x="5.5" y="5.5" width="9" height="9" rx="2" /></svg>
  </button>`;
}

function stopAndStay() {
  stop();
  focusComposer();
}

function canSend() {
  return !answering.value && chosenModel.value !== null && isCovered(chosenModel.value);
}

/** @param {Event} event */
function submit(event) {
  event.preventDefault();
  if (!canSend() || !draft.value.trim()) return;
  ask(draft.value);
  draft.value = "";
}

/** @param {KeyboardEvent} event */
function keyDown(event) {
  // While an input method composes a character, Enter belongs to it. (Safari says so by code 229 only.)
  if (event.isComposing || event.keyCode === 229) return;
  if (event.key === "Enter" && !event.shiftKey) submit(event);
}
