// Keeps conversations in this browser: in IndexedDB, written a moment after each change, found again after a
// reload by the id in the page's address. Nothing here leaves the machine.
import { computed, effect, signal, untracked } from "@preact/signals";
import { stop } from "./answer.js";
import { Conversation, beginConversation, conversation, titleOf } from "./conversations.js";
import { view } from "./view.js";

/** @typedef {import("./conversations.js").ConversationRecord} ConversationRecord */

/** An answer that grows is written this often. */
const SAVE_EVERY_MS = 500;
const TABLE = "conversations";
const ADDRESS = "#/chat/";
const LEFT_BEHIND = "corolla-left-behind";

/** What is kept, newest first: enough for a list. */
export const shelf = signal(/** @type {{id: string, title: string, updated: number}[]} */ ([]));

/** False when this browser keeps nothing, as some do in private windows; the page then says so. */
export const keeps = signal(true);

// ---------------------------------------------------------------- the database

/** @type {Promise<IDBDatabase> | null} */
let opened = null;

function database() {
  opened ??= new Promise((resolve, reject) => {
    const request = indexedDB.open("corolla", 1);
    request.onupgradeneeded = () => request.result.createObjectStore(TABLE, { keyPath: "id" });
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
  return opened;
}

/**
 * @template T
 * @param {IDBTransactionMode} mode
 * @param {(table: IDBObjectStore) => IDBRequest<T>} what
 * @returns {Promise<T>}
 */
async function inTable(mode, what) {
  const transaction = (await database()).transaction(TABLE, mode);
  const request = what(transaction.objectStore(TABLE));
  return new Promise((resolve, reject) => {
    transaction.oncomplete = () => resolve(request.result);
    transaction.onabort = () => reject(transaction.error);
  });
}

/** Every conversation, newest first. @returns {Promise<ConversationRecord[]>} */
export async function everything() {
  const all = await inTable("readonly", (table) => table.getAll());
  return all.sort((a, b) => b.updated - a.updated);
}

/** @param {string} id @returns {Promise<ConversationRecord | undefined>} */
function find(id) {
  return inTable("readonly", (table) => table.get(id));
}

/** @param {ConversationRecord} record */
export async function keep(record) {
  try {
    await inTable("readwrite", (table) => table.put(record));
    keeps.value = true;
  } catch (error) {
    keeps.value = false;
    console.error(error);
    return;
  }
  const entry = { id: record.id, title: titleOf(record), updated: record.updated };
  const others = shelf.peek().filter(({ id }) => id !== record.id);
  shelf.value = [entry, ...others].sort((a, b) => b.updated - a.updated);
}

// ---------------------------------------------------------------- what people do

/** Show a kept conversation, and end the answer to the one that is left. @param {string} id */
export async function openChat(id) {
  stop();
  saveNow();
  const record = await find(id);
  if (record) conversation.value = Conversation.from(record);
}

/** @param {string} id @param {string} title */
export async function rename(id, title) {
  if (conversation.peek().id === id) conversation.peek().title.value = title.trim();
  const record = await find(id);
  if (record) await keep({ ...record, title: title.trim() });
}

/** Take a conversation off the shelf. What is returned brings it back. @param {string} id */
export async function remove(id) {
  const record = await find(id);
  await inTable("readwrite", (table) => table.delete(id));
  shelf.value = shelf.peek().filter((entry) => entry.id !== id);
  if (conversation.peek().id === id) {
    forgetChanges();
    beginConversation();
  }
  return async () => {
    if (record) await keep(record);
  };
}

/** The ids of the conversations in which all of the words occur. @param {string} words */
export async function search(words) {
  const wanted = words.toLowerCase().split(/\s+/).filter(Boolean);
  const found = (await everything()).filter((record) => {
    const said = [titleOf(record), ...record.messages.map(({ content }) => content)].join("\n").toLowerCase();
    return wanted.every((word) => said.includes(word));
  });
  return new Set(found.map(({ id }) => id));
}

// ---------------------------------------------------------------- keeping what is on screen

let timer = 0;
/** What was on screen when the last writing was planned. @type {Conversation | null} */
let changed = null;

function forgetChanges() {
  clearTimeout(timer);
  timer = 0;
  changed = null;
}

/** Write what changed, if anything did. */
export function saveNow() {
  const talk = changed;
  forgetChanges();
  if (talk) keep(talk.record());
}

/**
 * The page is being left: a browser may drop what is still on its way to the database, so what changed is put
 * where writing is done at once, and goes to the database with the next visit.
 */
function leaveBehind() {
  if (changed) localStorage.setItem(LEFT_BEHIND, JSON.stringify(changed.record()));
  saveNow();
}

async function takeUpLeftBehind() {
  const left = localStorage.getItem(LEFT_BEHIND);
  if (!left) return;
  await keep(JSON.parse(left));
  localStorage.removeItem(LEFT_BEHIND);
}

/** Bring back what the address names, list what is kept, and keep what happens from now on. */
export async function startShelf() {
  try {
    await takeUpLeftBehind();
    const named = idInAddress();
    if (named) await openChat(named);
    const all = await everything();
    shelf.value = all.map((record) => ({ id: record.id, title: titleOf(record), updated: record.updated }));
  } catch (error) {
    keeps.value = false; // the chat works all the same
    console.error(error);
  }
  addEventListener("pagehide", leaveBehind);
  addEventListener("hashchange", () => {
    const id = idInAddress();
    if (id && id !== conversation.peek().id) openChat(id);
  });
  followScreen();
}

function followScreen() {
  effect(showInAddress);
  /** @type {Conversation | null} */
  let seen = null;
  effect(() => {
    const talk = conversation.value;
    const messages = talk.path.value;
    for (const message of messages) [message.content.value, message.state.value, message.numbers.value];
    const arrived = seen !== talk;
    if (arrived) untracked(saveNow); // the one that was left
    seen = talk;
    // Opening a conversation is no change of it.
    if (!messages.length || (arrived && shelf.peek().some(({ id }) => id === talk.id))) return;
    changed = talk;
    timer ||= setTimeout(saveNow, SAVE_EVERY_MS);
  });
}

function idInAddress() {
  return location.hash.startsWith(ADDRESS) ? location.hash.slice(ADDRESS.length) : "";
}

/** Where the conversation on screen is found again. */
export const chatAddress = computed(() => {
  const talk = conversation.value;
  return talk.path.value.length ? `${ADDRESS}${talk.id}` : "#/";
});

/** Leave the swarm page, if that is on screen. */
export function toChat() {
  if (view.peek() !== "chat") location.hash = chatAddress.peek();
}

function showInAddress() {
  const address = chatAddress.value;
  const empty = address === "#/";
  if (view.value === "chat" && location.hash !== address && !(empty && !location.hash)) {
    history.replaceState(null, "", empty ? location.pathname : address);
  }
}
