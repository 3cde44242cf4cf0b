// Where a question is written, and files are added to it. Enter sends it, Shift+Enter begins a new line.
import { createRef } from "preact";
import { signal } from "@preact/signals";
import { answering, ask, stop } from "./answer.js";
import { attach, attached, detach, leftOut, withAttached } from "./attachments.js";
import { html } from "./html.js";
import { chosenModel, isCovered } from "./swarm.js";
import { text } from "./words.js";

const draft = signal("");
/** @type {import("preact").RefObject<HTMLTextAreaElement | null>} */
const field = createRef();
/** @type {import("preact").RefObject<HTMLInputElement | null>} */
const picker = createRef();

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
  return html`<form class="composer" onSubmit=${submit} onDragOver=${dragOver} onDrop=${drop}>
    <${Attached} />
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
        onPaste=${paste}
      />
      <button type="button" class="quiet attach" aria-label=${text.attach} title=${text.attach} onClick=${() => picker.current?.click()}>
        <svg viewBox="0 0 20 20" aria-hidden="true"><path d="M10 4.2v11.6M4.2 10h11.6" /></svg>
      </button>
      <input type="file" hidden multiple ref=${picker} onChange=${pick} />
      ${answering.value ? html`<${StopButton} />` : html`<${SendButton} />`}
    </div>
    <p id="hint" class="hint"><span class=${news ? "" : "keys"}>${news || text.hint}</span><span>${text.readableShort}</span></p>
  </form>`;
}

function Attached() {
  return html`
    ${attached.value.length > 0 &&
    html`<ul class="attached" aria-label=${text.attached}>
      ${attached.value.map(
        (file) => html`<li>
          <bdi>${file.name}</bdi>
          <button type="button" class="quiet" aria-label=${text.detach(file.name)} onClick=${() => takeOut(file)}>×</button>
        </li>`,
      )}
    </ul>`}
    <p class="left-out">${leftOut.value}</p>
  `;
}

function SendButton() {
  const able = canSend() && hasSomething();
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

function hasSomething() {
  return draft.value.trim() !== "" || attached.value.length > 0;
}

function canSend() {
  return !answering.value && chosenModel.value !== null && isCovered(chosenModel.value);
}

/** @param {Event} event */
function submit(event) {
  event.preventDefault();
  if (!canSend() || !hasSomething()) return;
  ask(withAttached(draft.value));
  draft.value = "";
}

/** @param {import("./attachments.js").Attachment} file */
function takeOut(file) {
  detach(file);
  focusComposer();
}

/** @param {any} event */
async function pick(event) {
  const files = [...event.target.files];
  event.target.value = ""; // or the same file could not be chosen again
  focusComposer();
  await attach(files);
}

/** @param {DragEvent} event */
function dragOver(event) {
  if (event.dataTransfer?.types.includes("Files")) event.preventDefault();
}

/** @param {DragEvent} event */
function drop(event) {
  takeFiles(event, event.dataTransfer);
}

/** @param {ClipboardEvent} event */
function paste(event) {
  takeFiles(event, event.clipboardData);
}

/** Files become attachments; text goes where the browser puts it. @param {Event} event @param {DataTransfer | null} data */
function takeFiles(event, data) {
  if (!data?.files.length) return;
  event.preventDefault();
  attach(data.files);
}

/** @param {KeyboardEvent} event */
function keyDown(event) {
  // While an input method composes a character, Enter belongs to it. (Safari says so by code 229 only.)
  if (event.isComposing || event.keyCode === 229) return;
  if (event.key === "Enter" && !event.shiftKey) submit(event);
}
