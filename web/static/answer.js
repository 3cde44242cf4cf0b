// Asking, stopping, asking again: one answer at a time, from the first chunk to its end.
import { computed, signal } from "@preact/signals";
import { streamAnswer, AskFailed } from "./completions.js";
import { Conversation, Message, beginConversation, conversation } from "./conversations.js";
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
async function answerLeaf(talk, model, parent) {
  const message = parent === undefined ? talk.add("assistant") : talk.add("assistant", "", parent);
  const path = talk.path.peek().slice(0, -1);
  const said = [...preamble(), ...path.map(({ role, content }) => ({ role, content: content.peek() }))];
  const abort = new AbortController();
  const record = new RouteRecord();
  running.value = abort;
  try {
    for await (const chunk of streamAnswer(model, said, wishes(), abort.signal)) take(chunk, message, record);
    message.state.value = "done";
  } catch (error) {
    if (abort.signal.aborted) message.state.value = "stopped";
    else fail(message, error);
  } finally {
    message.numbers.value = record.end();
    running.value = null;
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
  if (chunk.swarm?.waiting) message.place.value = chunk.swarm.waiting;
  if (chunk.swarm?.tokens) {
    record.tokens(chunk.swarm.tokens);
    const end = message.content.peek().length;
    message.tokens.push(...chunk.swarm.tokens.map((trace) => ({ end, trace })));
  }
  if (chunk.swarm?.event) record.rerouted(chunk.swarm.event);
}

/** @param {Message} message @param {unknown} error */
function fail(message, error) {
  lookAgain();
  if (!(error instanceof AskFailed)) console.error(error); // a mistake of ours; the reader still gets a sentence
  message.error.value = error instanceof Error ? error.message : String(error);
  message.state.value = "failed";
}
