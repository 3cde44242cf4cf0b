// Two dialogs over the page: the settings, and the list of shortcuts.
import { createRef } from "preact";
import { html } from "./html.js";
import { apiKey, keepKey } from "./key.js";
import { LIMITS, reset, set, setTheme, settings, theme } from "./settings.js";
import { text } from "./words.js";

/** @typedef {keyof typeof LIMITS} NumberName */

/** @type {import("preact").RefObject<HTMLDialogElement | null>} */
const settingsDialog = createRef();
/** @type {import("preact").RefObject<HTMLDialogElement | null>} */
const shortcutsDialog = createRef();

/** What each key does, in the order in which people need it. */
const SHORTCUTS = [
  ["Enter", text.keySend],
  ["Shift Enter", text.keyNewLine],
  ["Esc", text.keyStop],
  ["Ctrl Shift O", text.newChat],
  ["Ctrl K", text.searchChats],
  ["Ctrl B", text.conversations],
  ["Ctrl ,", text.settings],
  ["Ctrl /", text.keyShortcuts],
  ["?", text.keyShortcutsOutside],
];

export function showSettings() {
  if (!settingsDialog.current?.open) settingsDialog.current?.showModal();
}

export function showShortcuts() {
  if (!shortcutsDialog.current?.open) shortcutsDialog.current?.showModal();
}

export function SettingsButton() {
  return html`<button type="button" class="icon" aria-label=${text.settings} title=${text.settings} onClick=${showSettings}>
    <svg viewBox="0 0 20 20" aria-hidden="true">
      <path d="M3.5 6h7m4 0h2M3.5 14h2m4 0h7" /><circle cx="12.5" cy="6" r="2" /><circle cx="7.5" cy="14" r="2" />
    </svg>
  </button>`;
}

export function Settings() {
  return html`<dialog class="sheet" ref=${settingsDialog} aria-labelledby="settings-title" onClick=${closeOutside}>
    <form method="dialog" class="sheet-body">
      <header>
        <h2 id="settings-title">${text.settings}</h2>
        <button type="submit" class="icon" aria-label=${text.close}>
          <svg viewBox="0 0 20 20" aria-hidden="true"><path d="m5.5 5.5 9 9m0-9-9 9" /></svg>
        </button>
      </header>
      <label class="field">
        <span>${text.systemPrompt}</span>
        <textarea
          rows="3"
          placeholder=${text.systemPlaceholder}
          value=${settings.value.system}
          onInput=${(/** @type {any} */ event) => set({ system: event.target.value })}
        />
      </label>
      <div class="fields">
        <${NumberField} name="temperature" said=${text.temperature} about=${text.aboutTemperature} />
        <${NumberField} name="top_p" said=${text.topP} about=${text.aboutTopP} />
        <${NumberField} name="top_k" said=${text.topK} about=${text.aboutTopK} />
        <${NumberField} name="max_tokens" said=${text.maxTokens} about=${text.aboutMaxTokens} />
        <${NumberField} name="seed" said=${text.seed} about=${text.aboutSeed} />
        <${StopField} />
        ${apiKey.value && html`<${KeyField} />`}
      </div>
      <fieldset class="themes">
        <legend>${text.theme}</legend>
        ${/** @type {const} */ (["system", "light", "dark"]).map(
          (name) => html`<label>
            <input type="radio" name="theme" checked=${theme.value === name} onChange=${() => setTheme(name)} />
            <span>${text.themes[name]}</span>
          </label>`,
        )}
      </fieldset>
      <footer>
        <button type="button" class="quiet" onClick=${reset}>${text.reset}</button>
        <button type="button" class="quiet" onClick=${showShortcuts}>${text.shortcuts}</button>
      </footer>
    </form>
  </dialog>`;
}

/** @param {{name: NumberName, said: string, about: string}} props */
function NumberField({ name, said, about }) {
  const { min, max, step } = LIMITS[name];
  return html`<div class="field">
    <label for="set-${name}">${said}</label>
    <input
      id="set-${name}"
      type="number"
      inputmode="decimal"
      min=${min}
      max=${max}
      step=${step === 1 ? 1 : "any"}
      placeholder=${text.makersChoice}
      aria-describedby="about-${name}"
      value=${settings.value[name]}
      onInput=${(/** @type {any} */ event) => set({ [name]: event.target.value })}
    />
    <small id="about-${name}">${about}</small>
  </div>`;
}

function StopField() {
  return html`<div class="field">
    <label for="set-stop">${text.stopTexts}</label>
    <textarea
      id="set-stop"
      rows="1"
      aria-describedby="about-stop"
      value=${settings.value.stop}
      onInput=${(/** @type {any} */ event) => set({ stop: event.target.value })}
    />
    <small id="about-stop">${text.aboutStopTexts}</small>
  </div>`;
}

function KeyField() {
  return html`<div class="field">
    <span>${text.key}</span>
    <button type="button" class="soft" onClick=${() => keepKey("")}>${text.keyForget}</button>
    <small>${text.aboutKey}</small>
  </div>`;
}

export function Shortcuts() {
  return html`<dialog class="sheet" ref=${shortcutsDialog} aria-labelledby="shortcuts-title" onClick=${closeOutside}>
    <form method="dialog" class="sheet-body">
      <header>
        <h2 id="shortcuts-title">${text.shortcuts}</h2>
        <button type="submit" class="icon" aria-label=${text.close}>
          <svg viewBox="0 0 20 20" aria-hidden="true"><path d="m5.5 5.5 9 9m0-9-9 9" /></svg>
        </button>
      </header>
      <dl class="keys-list">
        ${SHORTCUTS.map(
          ([keys, does]) => html`<div>
            <dt>${keys.split(" ").map((key) => html`<kbd>${key}</kbd>`)}</dt>
            <dd>${does}</dd>
          </div>`,
        )}
      </dl>
    </form>
  </dialog>`;
}

/** @param {MouseEvent} event */
function closeOutside(event) {
  if (event.target instanceof HTMLDialogElement) event.target.close();
}
