// A button that copies text and says so.
import { useState } from "preact/hooks";
import { html } from "./html.js";
import { text as words } from "./words.js";

const SAID_MS = 1600;

/** @param {{text: () => string, label?: string, what: string}} props */
export function CopyButton({ text, label = words.copy, what }) {
  const [said, setSaid] = useState("");
  const copy = async () => {
    setSaid((await copyText(text())) ? words.copied : words.copyFailed);
    setTimeout(() => setSaid(""), SAID_MS);
  };
  return html`<button type="button" class="quiet copy" aria-label="${said || label} ${what}" onClick=${copy}>
    ${said || label}
  </button>`;
}

/**
 * True when it worked. Browsers offer the clipboard only on https and localhost; a gateway on a home
 * network has neither, so the old way stays as a second try.
 * @param {string} text
 */
export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return copySelected(text);
  }
}

/** @param {string} text */
function copySelected(text) {
  const before = document.activeElement;
  const area = document.createElement("textarea");
  area.value = text;
  area.className = "unseen";
  document.body.append(area);
  area.select();
  const worked = document.execCommand("copy");
  area.remove();
  if (before instanceof HTMLElement) before.focus();
  return worked;
}
