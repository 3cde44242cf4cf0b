// Markup in plain JavaScript: html`<p>…</p>` makes Preact elements, so nothing has to be compiled.
import htm from "htm";
import { h } from "preact";

export const html = htm.bind(h);
