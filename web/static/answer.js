// Asking, stopping, asking again: one answer at a time, from the first chunk to its end.
import { computed, signal } from "@preact/signals";
import { streamAnswer, AskFailed, KeyNeeded } from "./completions.js";
import { Conversation, Message, beginConversation, conversation } from "./conversations.js";
import { apiKey, askForKey } from "./key.js";
import { RouteRecord } from "./route.js";
import { preamble, wishes } from "./settings.js";
import { chosenModel, lookAgain } from "./swarm.js";

const running = signal(/** @type {AbortController | null} */ (null));

/** True from the moment a question is sent until its answer has ended in any way. */
export const answering = computed(() => running.value !== null);

/** @param {string} question */
export function ask(question) {
  const model = chosenModel.peek();
  if (answering.peek() || !model || !question.trim()) return;
  conversation.peek().add("user", question.trim());
  return answerLeaf(conversation.peek(), model.id);
}

/**
 * A new answer to the same question. The old one stays in the tree.
 * @param {Message} message
 */
export function tryAgain(message) {
  const model = chosenModel.peek();
  if (answering.peek() || !model) return;
  return answerLeaf(conversation.peek(), model.id, message.parent);
}

/**
 * The same question in other words. The old one stays in the tree.
 * @param {Message} message
 * @param {string} question
 */
export function askInstead(message, question) {
  const model = chosenModel.peek();
  if (answering.peek() || !model || !question.trim()) return;
  conversation.peek().add("user", question.trim(), message.parent);
  return answerLeaf(conversation.peek(), model.id);
}

/**
 * Go on with an answer that was cut short, in its own place.
 * @param {Message} message
 */
export function goOn(message) {
  const model = chosenModel.peek();
  if (answering.peek() || !model || !canGoOn(message)) return;
  // Most chat templates drop spaces at the end, and the model writes its own.
  message.content.value = message.content.peek().trimEnd();
  message.error.value = "";
  message.place.value = 0;
  message.state.value = "waiting";
  message.rounds.value += 1;
  return hear(conversation.peek(), model.id, message, { continue_final_message: true });
}

/** Whether an answer ended before its end. @param {Message} message */
export function canGoOn(message) {
  return ["cut", "stopped", "failed"].includes(message.state.value) && message.content.value.trim() !== "";
}

/** End the answer that is under way; what it said so far stays. */
export function stop() {
  running.peek()?.abort();
}

/** Stop, and begin an empty conversation. */
export function newChat() {
  stop();
  beginConversation();
}

/**
 * @param {Conversation} talk
 * @param {string} model
 * @param {string | null} [parent] the question, by default the newest message
 */
function answerLeaf(talk, model, parent) {
  return hear(talk, model, parent === undefined ? talk.add("assistant") : talk.add("assistant", "", parent));
}

/**
 * Fill the newest message with what comes.
 * @param {Conversation} talk
 * @param {string} model
 * @param {Message} message
 * @param {Record<string, boolean>} more fields of the request
 */
async function hear(talk, model, message, more = {}) {
  const path = talk.path.peek().filter(({ content }) => content.peek());
  const said = [...preamble(), ...path.map(({ role, content }) => ({ role, content: content.peek() }))];
  const before = message.numbers.peek();
  const abort = new AbortController();
  const record = new RouteRecord();
  running.value = abort;
  try {
    let reason = null;
    for await (const chunk of withKey(model, said, { ...wishes(), ...more }, abort.signal)) {
      take(chunk, message, record);
      reason = chunk.choices[0]?.finish_reason ?? reason;
    }
    message.state.value = reason === "length" ? "cut" : "done";
  } catch (error) {
    if (abort.signal.aborted) message.state.value = "stopped";
    else fail(message, error);
  } finally {
    message.numbers.value = together(before, record.end());
    running.value = null;
  }
}

/**
 * Stream an answer, asking the reader for a key as often as the gateway wants another one.
 * @param {string} model
 * @param {{role: string, content: string}[]} said
 * @param {Record<string, unknown>} fields
 * @param {AbortSignal} signal
 */
async function* withKey(model, said, fields, signal) {
  for (;;) {
    const key = apiKey.peek();
    try {
      return yield* streamAnswer(model, said, fields, signal, key);
    } catch (error) {
      if (!(error instanceof KeyNeeded) || !(await askForKey(key !== ""))) throw error;
    }
  }
}

/**
 * @param {import("./completions.js").Chunk} chunk
 * @param {Message} message
 * @param {RouteRecord} record
 */
function take(chunk, message, record) {
  const content = chunk.choices[0]?.delta.content ?? "";
  if (content) {
    message.state.value = "streaming";
    message.content.value += content;
  }
  if (chunk.swarm?.waiting !== undefined) message.place.value = chunk.swarm.waiting;
  if (chunk.swarm?.tokens) {
    record.tokens(chunk.swarm.tokens);
    const end = message.content.peek().length;
    message.tokens.push(...chunk.swarm.tokens.map((trace) => ({ end, trace })));
  }
  if (chunk.swarm?.event) record.rerouted(chunk.swarm.event);
}

/**
 * What an answer cost that was made in two parts: the newer part's times, and the tokens of both.
 * @param {import("./route.js").Numbers | null} before
 * @param {import("./route.js").Numbers | null} now
 */
function together(before, now) {
  return before && now ? { ...now, tokens: before.tokens + now.tokens } : now;
}

/** @param {Message} message @param {unknown} error */
function fail(message, error) {
  lookAgain();
  if (!(error instanceof AskFailed)) console.error(error); // a mistake of ours; the reader still gets a sentence
  message.error.value = error instanceof Error ? error.message : String(error);
  message.state.value = "failed";
}
