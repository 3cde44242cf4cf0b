// Text files that go with a question: picked, dropped or pasted into the composer, and sent as part of the message.
import { signal } from "@preact/signals";
import { announce } from "./announcer.js";
import { text } from "./words.js";

/** One file may be so large. A model looks back on a few thousand words; more would only be refused later. */
const MOST_BYTES = 64 * 1024;

/** @typedef {{name: string, content: string}} Attachment */

/** What goes with the next question. */
export const attached = signal(/** @type {Attachment[]} */ ([]));

/** Why files were left out, in words; empty when none were. */
export const leftOut = signal("");

/** Take the files that are text and not too large, and say why others were left out. @param {Iterable<File>} files */
export async function attach(files) {
  const read = await Promise.all([...files].map(readText));
  attached.value = [...attached.peek(), ...read.filter((each) => typeof each !== "string")];
  leftOut.value = read.filter((each) => typeof each === "string").join(" ");
  if (leftOut.peek()) announce(leftOut.peek());
}

/** @param {Attachment} file */
export function detach(file) {
  attached.value = attached.peek().filter((other) => other !== file);
  leftOut.value = "";
}

/** The question with its files, and nothing attached any more. @param {string} question */
export function withAttached(question) {
  const files = attached.peek();
  attached.value = [];
  leftOut.value = "";
  return [question.trim(), ...files.map(fenced)].filter(Boolean).join("\n\n");
}

/** A file as text, or a sentence that says why not. @param {File} file @returns {Promise<Attachment | string>} */
async function readText(file) {
  if (file.size > MOST_BYTES) return text.fileTooLarge(file.name, MOST_BYTES);
  try {
    const content = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
    if (!content.includes("\0")) return { name: file.name, content };
  } catch (error) {
    if (!(error instanceof TypeError)) return text.fileUnread(file.name); // it went away meanwhile
  }
  return text.fileNotText(file.name);
}

/** @param {Attachment} file */
function fenced({ name, content }) {
  // A fence longer than any in the text, or the text could end it.
  const longest = Math.max(2, ...[...content.matchAll(/`+/g)].map(([ticks]) => ticks.length));
  const fence = "`".repeat(longest + 1);
  return `${name}:\n${fence}\n${content.replace(/\n$/, "")}\n${fence}`;
}
