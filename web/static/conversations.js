// What was said. A conversation is a tree of messages, each knowing its parent, so that an answer can be
// asked for again without losing the first one. It lives in memory; storing it would touch only this file.
import { computed, signal } from "@preact/signals";

/** @typedef {import("./route.js").Numbers} Numbers */
/** @typedef {"waiting" | "streaming" | "done" | "stopped" | "failed"} AnswerState */

let counter = 0;

/** One message. What changes while an answer streams is a signal; the rest never changes. */
export class Message {
  /**
   * @param {"user" | "assistant"} role
   * @param {string} content
   * @param {string | null} parent
   */
  constructor(role, content, parent) {
    this.id = `m${++counter}`;
    this.parent = parent;
    this.role = role;
    this.content = signal(content);
    this.state = signal(/** @type {AnswerState} */ (role === "user" ? "done" : "waiting"));
    this.error = signal("");
    /** Its place in the line while the swarm is full; 0 when it does not wait there. */
    this.place = signal(0);
    this.numbers = signal(/** @type {Numbers | null} */ (null));
  }
}

/** The messages of one conversation, and the path through them that is on screen. */
export class Conversation {
  #messages = new Map();
  #leaf = signal(/** @type {string | null} */ (null));

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
}

/** The conversation on screen. */
export const conversation = signal(new Conversation());

/** Leave the conversation on screen and begin an empty one. */
export function beginConversation() {
  conversation.value = new Conversation();
}
