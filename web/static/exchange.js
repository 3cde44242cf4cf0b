// Conversations as files: JSON that this page reads again, and markdown for people. Files come from anywhere,
// so reading one checks every field.
import { newId, titleOf } from "./conversations.js";
import { text } from "./words.js";

/** @typedef {import("./conversations.js").ConversationRecord} ConversationRecord */
/** @typedef {import("./conversations.js").MessageRecord} MessageRecord */

const FORMAT = "corolla-conversations";
const VERSION = 1;

/** The file is not one of ours; the message says why, to people. */
export class ImportFailed extends Error {}

/** @param {ConversationRecord[]} conversations */
export function toJson(conversations) {
  return JSON.stringify({ format: FORMAT, version: VERSION, conversations }, null, 2);
}

/** The path on screen, as a text that reads well anywhere. @param {ConversationRecord} record */
export function toMarkdown(record) {
  const said = pathOf(record).map(({ role, content }) => `**${role === "user" ? text.youTitle : "Corolla"}**\n\n${content}`);
  return [`# ${titleOf(record)}`, ...said].join("\n\n") + "\n";
}

/** @param {ConversationRecord} record */
function pathOf(record) {
  const byId = new Map(record.messages.map((message) => [message.id, message]));
  /** @type {MessageRecord[]} */
  const path = [];
  for (let at = byId.get(record.leaf ?? ""); at; at = byId.get(at.parent ?? "")) path.unshift(at);
  return path;
}

/**
 * The conversations in a file, each under a new id, so that nothing kept is ever overwritten.
 * @param {string} source
 * @returns {ConversationRecord[]}
 */
export function fromJson(source) {
  let file;
  try {
    file = JSON.parse(source);
  } catch {
    throw new ImportFailed(text.notJson);
  }
  if (file?.format !== FORMAT || !Array.isArray(file.conversations)) throw new ImportFailed(text.notOurs);
  if (file.version !== VERSION) throw new ImportFailed(text.newerFile);
  return file.conversations.map(conversationFrom);
}

/** @param {any} value @returns {ConversationRecord} */
function conversationFrom(value) {
  if (!Array.isArray(value?.messages) || !value.messages.length) throw new ImportFailed(text.damaged);
  /** @type {Map<string, string>} */
  const ids = new Map();
  const messages = value.messages.map((/** @type {any} */ message) => messageFrom(message, ids));
  return {
    id: newId(),
    title: typeof value.title === "string" ? value.title : "",
    updated: Number.isFinite(value.updated) ? value.updated : Date.now(),
    leaf: ids.get(value.leaf) ?? messages[messages.length - 1].id,
    messages,
  };
}

/**
 * A parent has to come before its children, which also rules out circles.
 * @param {any} value
 * @param {Map<string, string>} ids new ones by those in the file
 * @returns {MessageRecord}
 */
function messageFrom(value, ids) {
  const parent = value?.parent === null ? null : ids.get(value?.parent);
  const sound = ["user", "assistant"].includes(value?.role) && typeof value.content === "string";
  if (!sound || parent === undefined || typeof value.id !== "string") throw new ImportFailed(text.damaged);
  const id = newId();
  ids.set(value.id, id);
  const state = ["done", "cut", "stopped", "failed"].includes(value.state) ? value.state : "stopped";
  const error = typeof value.error === "string" ? value.error : "";
  return { id, parent, role: value.role, content: value.content, state, error, numbers: null };
}

/** Let the browser save a text as a file. @param {string} name @param {string} kind @param {string} content */
export function download(name, kind, content) {
  const address = URL.createObjectURL(new Blob([content], { type: kind }));
  const link = document.createElement("a");
  link.href = address;
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(address), 1000); // the browser reads it after this turn
}

/** A title as a name that every file system takes. @param {string} title */
export function fileName(title) {
  return title.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-+|-+$/g, "").slice(0, 50) || "conversation";
}
