// The drawer at the side: the conversations this browser keeps, to find, open, name, delete, save and bring in.
import { createRef } from "preact";
import { signal } from "@preact/signals";
import { useState } from "preact/hooks";
import { announce } from "./announcer.js";
import { newChat, stop } from "./answer.js";
import { focusComposer } from "./composer.js";
import { conversation, titleOf } from "./conversations.js";
import { ImportFailed, download, fileName, fromJson, toJson, toMarkdown } from "./exchange.js";
import { html } from "./html.js";
import { clearRoute } from "./route.js";
import { everything, keep, keeps, openChat, remove, rename, saveNow, search, shelf, toChat } from "./shelf.js";
import { ago, counted, text } from "./words.js";

/** @type {import("preact").RefObject<HTMLDialogElement | null>} */
const dialog = createRef();
/** @type {import("preact").RefObject<HTMLInputElement | null>} */
const file = createRef();

const words = signal("");
const found = signal(/** @type {Set<string> | null} */ (null));
/** What happened last, and how to take it back. */
const news = signal(/** @type {{said: string, undo?: () => Promise<void>} | null} */ (null));

export function toggleDrawer() {
  if (dialog.current?.open) return closeDrawer();
  news.value = null;
  look("");
  dialog.current?.showModal();
}

/** Open it with the cursor in the search. */
export function searchChats() {
  if (!dialog.current?.open) toggleDrawer();
  dialog.current?.querySelector("input")?.focus();
}

function closeDrawer() {
  dialog.current?.close();
  focusComposer();
}

/** Stop, and begin an empty conversation. */
export function startOver() {
  newChat();
  clearRoute();
  toChat();
  dialog.current?.close();
  focusComposer();
}

export function DrawerButton() {
  return html`<button type="button" class="icon" aria-label=${text.conversations} title=${text.conversations} onClick=${toggleDrawer}>
    <svg viewBox="0 0 20 20" aria-hidden="true"><path d="M3.5 5.5h13M3.5 10h13M3.5 14.5h8" /></svg>
  </button>`;
}

export function Drawer() {
  const entries = shelf.value.filter(({ id }) => !found.value || found.value.has(id));
  return html`<dialog class="drawer" ref=${dialog} aria-labelledby="drawer-title" onClick=${closeOutside}>
    <div class="drawer-body">
      <header>
        <h2 id="drawer-title">${text.conversations}</h2>
        <button type="button" class="icon" aria-label=${text.close} onClick=${closeDrawer}>
          <svg viewBox="0 0 20 20" aria-hidden="true"><path d="m5.5 5.5 9 9m0-9-9 9" /></svg>
        </button>
      </header>
      <input
        type="search"
        aria-label=${text.searchChats}
        placeholder=${text.searchChats}
        value=${words.value}
        onInput=${(/** @type {any} */ event) => look(event.target.value)}
      />
      <button type="button" class="soft" onClick=${startOver}>+ ${text.newChat}</button>
      ${entries.length
        ? html`<ul class="chats" aria-label=${text.conversations}>
            ${entries.map((entry) => html`<${Chat} key=${entry.id} entry=${entry} />`)}
          </ul>`
        : html`<p class="nothing">${words.value ? text.nothingFound : text.noChats}</p>`}
      <${News} />
      <footer>
        <button type="button" class="quiet" onClick=${saveMarkdown}>${text.saveMarkdown}</button>
        <button type="button" class="quiet" onClick=${saveAll}>${text.saveAll}</button>
        <button type="button" class="quiet" onClick=${() => file.current?.click()}>${text.bringIn}</button>
        <input type="file" hidden ref=${file} accept=".json,application/json" onChange=${bringIn} />
        <p>${keeps.value ? text.keptHere : text.notKept}</p>
      </footer>
    </div>
  </dialog>`;
}

/** @param {{entry: {id: string, title: string, updated: number}}} props */
function Chat({ entry }) {
  const [naming, setNaming] = useState(false);
  const here = conversation.value.id === entry.id;
  if (naming) return html`<${Naming} entry=${entry} done=${() => setNaming(false)} />`;
  return html`<li class="chat ${here ? "here" : ""}">
    <button type="button" class="open-chat" aria-current=${here ? "page" : undefined} onClick=${() => show(entry.id)}>
      <bdi>${entry.title}</bdi><small>${ago(entry.updated)}</small>
    </button>
    <button type="button" class="icon" aria-label="${text.rename} ${entry.title}" title=${text.rename} onClick=${() => setNaming(true)}>
      <svg viewBox="0 0 20 20" aria-hidden="true"><path d="m4 16 .8-3.4L13 4.4l2.6 2.6-8.2 8.2z" /></svg>
    </button>
    <button type="button" class="icon" aria-label="${text.remove} ${entry.title}" title=${text.remove} onClick=${() => take(entry)}>
      <svg viewBox="0 0 20 20" aria-hidden="true"><path d="M4.5 6h11M8 6V4.2h4V6m-6 0 .6 10h6.8L14 6" /></svg>
    </button>
  </li>`;
}

/** @param {{entry: {id: string, title: string}, done: () => void}} props */
function Naming({ entry, done }) {
  const finish = async (/** @type {any} */ event) => {
    event.preventDefault();
    await rename(entry.id, event.target.elements.title.value);
    done();
  };
  const leave = (/** @type {KeyboardEvent} */ event) => {
    if (event.key !== "Escape") return;
    event.preventDefault(); // or the drawer would close
    event.stopPropagation();
    done();
  };
  return html`<li class="chat">
    <form onSubmit=${finish} onKeyDown=${leave}>
      <input name="title" aria-label=${text.nameOfChat} value=${entry.title} ref=${(/** @type {any} */ field) => field?.select()} />
      <button type="submit" class="quiet">${text.save}</button>
    </form>
  </li>`;
}

function News() {
  const { said = "", undo = null } = news.value ?? {};
  const back = async () => {
    await undo?.();
    news.value = null;
  };
  return html`<div class="drawer-news" role="status">
    ${said && html`<p>${said} ${undo && html`<button type="button" class="quiet" onClick=${back}>${text.undo}</button>`}</p>`}
  </div>`;
}

// ---------------------------------------------------------------- acting

/** @param {MouseEvent} event */
function closeOutside(event) {
  if (event.target === dialog.current) closeDrawer();
}

/** @param {string} typed */
async function look(typed) {
  words.value = typed;
  saveNow();
  const ids = typed.trim() ? await search(typed) : null;
  if (words.value === typed) found.value = ids; // or a newer search is on its way
}

/** @param {string} id */
async function show(id) {
  if (id !== conversation.peek().id) {
    clearRoute();
    await openChat(id);
  }
  toChat();
  closeDrawer();
}

/** @param {{id: string, title: string}} entry */
async function take(entry) {
  if (entry.id === conversation.peek().id) stop();
  const undo = await remove(entry.id);
  news.value = { said: `${text.removed} “${entry.title}”.`, undo };
}

function saveMarkdown() {
  const record = conversation.peek().record();
  download(`${fileName(titleOf(record))}.md`, "text/markdown", toMarkdown(record));
}

async function saveAll() {
  saveNow();
  download("corolla-conversations.json", "application/json", toJson(await everything()));
}

/** @param {any} event */
async function bringIn(event) {
  const [chosen] = event.target.files;
  event.target.value = ""; // choosing the same file again is a change again
  if (!chosen) return;
  try {
    const records = fromJson(await chosen.text());
    for (const record of records) await keep(record);
    news.value = { said: `${text.broughtIn} ${counted(records.length, "conversation", "conversations")}.` };
  } catch (error) {
    if (!(error instanceof ImportFailed)) throw error;
    news.value = { said: error.message };
  }
  announce(news.value.said);
}
