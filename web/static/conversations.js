// What was said. A conversation is a tree of messages, each knowing its parent, so that an answer can be
// asked for again without losing the first one. shelf.js keeps conversations; this file only knows them.
import { computed, signal } from "@preact/signals";
import { text } from "./words.js";

/** @typedef {import("./route.js").Numbers} Numbers */
/** @typedef {"waiting" | "streaming" | "done" | "cut" | "stopped" | "failed"} AnswerState `cut`: at its longest */
/**
 * @typedef {object} MessageRecord a message as it is kept
 * @property {string} id
 * @property {string | null} parent
 * @property {"user" | "assistant"} role
 * @property {string} content
 * @property {AnswerState} state
 * @property {string} error
 * @property {Numbers | null} numbers
 */
/**
 * @typedef {object} ConversationRecord a conversation as it is kept
 * @property {string} id
 * @property {string} title empty until someone gives it one
 * @property {number} updated milliseconds since 1970
 * @property {string | null} leaf
 * @property {MessageRecord[]} messages
 */

const LONGEST_TITLE = 60;

/** A name no other message or conversation has. (randomUUID exists on https and localhost only.) */
export function newId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(10)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** One message. What changes while an answer streams is a signal; the rest never changes. */
export class Message {
  /**
   * @param {"user" | "assistant"} role
   * @param {string} content
   * @param {string | null} parent
   * @param {string} id
   */
  constructor(role, content, parent, id = newId()) {
    this.id = id;
    this.parent = parent;
    this.role = role;
    this.content = signal(content);
    this.state = signal(/** @type {AnswerState} */ (role === "user" ? "done" : "waiting"));
    this.error = signal("");
    /** How often it was gone on with after it had ended. */
    this.rounds = signal(0);
    /** Its place in the line while the swarm is full; 0 when it does not wait there. */
    this.place = signal(0);
    this.numbers = signal(/** @type {Numbers | null} */ (null));
    /** Each token's route, and where its text ends; only while the page stays open. @type {{end: number, trace: import("./completions.js").TokenTrace}[]} */
    this.tokens = [];
  }
}

/** The messages of one conversation, and the path through them that is on screen. */
export class Conversation {
  /** @type {Map<string, Message>} */
  #messages = new Map();
  #leaf = signal(/** @type {string | null} */ (null));

  constructor(id = newId()) {
    this.id = id;
    /** Empty until someone gives it one; it is then called by its first question. */
    this.title = signal("");
  }

  /** From the first message to the newest one. */
  path = computed(() => {
    /** @type {Message[]} */
    const path = [];
    for (let id = this.#leaf.value; id !== null; id = path[0].parent) {
      path.unshift(/** @type {Message} */ (this.#messages.get(id)));
    }
    return path;
  });

  /**
   * Add a message after another one, by default after the newest, and show it.
   * @param {"user" | "assistant"} role
   * @param {string} content
   * @param {string | null} parent
   */
  add(role, content = "", parent = this.#leaf.peek()) {
    const message = new Message(role, content, parent);
    this.#messages.set(message.id, message);
    this.#leaf.value = message.id;
    return message;
  }

  /**
   * The messages that stand in the same place, in the order they came: other answers to the same question,
   * or other wordings of it.
   * @param {Message} message
   */
  siblings(message) {
    return [...this.#messages.values()].filter(({ parent }) => parent === message.parent);
  }

  /** Show a message, and what came after it when it was last continued. @param {Message} message */
  choose(message) {
    let leaf = message;
    for (let next = /** @type {Message | undefined} */ (message); next; next = this.#newestChild(next.id)) leaf = next;
    this.#leaf.value = leaf.id;
  }

  /** @param {string} parent @returns {Message | undefined} */
  #newestChild(parent) {
    return [...this.#messages.values()].findLast((message) => message.parent === parent);
  }

  /** As it is kept; reading this in an effect follows everything that changes. @returns {ConversationRecord} */
  record() {
    const messages = [...this.#messages.values()].map((message) => ({
      id: message.id,
      parent: message.parent,
      role: message.role,
      content: message.content.value,
      state: message.state.value,
      error: message.error.value,
      numbers: message.numbers.value,
    }));
    return { id: this.id, title: this.title.value, updated: Date.now(), leaf: this.#leaf.value, messages };
  }

  /** @param {ConversationRecord} record */
  static from(record) {
    const talk = new Conversation(record.id);
    talk.title.value = record.title;
    for (const kept of record.messages) {
      const message = new Message(kept.role, kept.content, kept.parent, kept.id);
      // Nobody streams into a kept answer any more: it ended when the page was left.
      const over = kept.state !== "waiting" && kept.state !== "streaming";
      message.state.value = over ? kept.state : "stopped";
      message.error.value = kept.error;
      message.numbers.value = kept.numbers;
      talk.#messages.set(message.id, message);
    }
    talk.#leaf.value = record.leaf;
    return talk;
  }
}

/** What to call a conversation. @param {ConversationRecord} record */
export function titleOf(record) {
  const first = record.title || record.messages.find(({ role }) => role === "user")?.content.trim().split("\n")[0];
  if (!first) return text.newChat;
  return first.length > LONGEST_TITLE ? `${first.slice(0, LONGEST_TITLE - 1)}…` : first;
}

/** The conversation on screen. */
export const conversation = signal(new Conversation());

/** Leave the conversation on screen and begin an empty one. */
export function beginConversation() {
  conversation.value = new Conversation();
}
