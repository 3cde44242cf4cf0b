// Asks the gateway for an answer and hands its chunks on. Knows HTTP and event streams; keeps nothing.
import { text } from "./words.js";

/**
 * @typedef {object} Hop
 * @property {string} peer
 * @property {string} name
 * @property {number} start
 * @property {number} end
 * @property {number} waited_ms
 * @property {number} computed_ms
 * @property {number} [link_ms]
 * @property {"direct" | "relayed" | "local"} path
 */
/** @typedef {{position: number, ms: number, hops: Hop[]}} TokenTrace */
/**
 * @typedef {object} Reroute
 * @property {"rerouted"} kind
 * @property {string} message
 * @property {string} lost
 * @property {string} [lost_name]
 * @property {{peer: string, name?: string, start: number, end: number}[]} route
 */
/**
 * @typedef {object} Chunk
 * @property {{delta: {content?: string}, finish_reason: string | null}[]} choices
 * @property {{tokens?: TokenTrace[], event?: Reroute, waiting?: number}} [swarm]
 */

/** The answer failed; the message says why, to people. */
export class AskFailed extends Error {}

/** The gateway wants a key, or another one. */
export class KeyNeeded extends AskFailed {}

/**
 * Stream an answer. Throws AskFailed; aborting the signal throws the signal's reason.
 * @param {string} model
 * @param {{role: string, content: string}[]} messages
 * @param {Record<string, unknown>} wishes how to sample, and other fields
 * @param {AbortSignal} signal
 * @param {string} key for gateways that ask for one
 * @returns {AsyncGenerator<Chunk>}
 */
export async function* streamAnswer(model, messages, wishes, signal, key = "") {
  const response = await reach(
    () =>
      fetch("/v1/chat/completions", {
        method: "POST",
        headers: { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) },
        body: JSON.stringify({ model, messages, ...wishes, stream: true, swarm: { route: true } }),
        signal,
      }),
    signal,
  );
  if (response.status === 401) throw new KeyNeeded(await refusal(response));
  if (!response.ok || !response.body) throw new AskFailed(await refusal(response));
  for await (const data of readEvents(response.body, signal)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new AskFailed(sentence(chunk.error.message));
    yield chunk;
  }
  // A whole answer ends with [DONE]; without it we cannot know that nothing is missing.
  throw new AskFailed(text.brokeOff);
}

/**
 * The data of each event in a stream of bytes.
 * @param {ReadableStream<Uint8Array>} body
 * @param {AbortSignal} signal
 */
async function* readEvents(body, signal) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let buffer = "";
  try {
    for (;;) {
      const { done, value } = await reach(() => reader.read(), signal);
      if (done) return;
      buffer += decoder.decode(value, { stream: true });
      const events = buffer.split(/\r?\n\r?\n/);
      buffer = events.pop() ?? "";
      for (const event of events) {
        const data = event.split(/\r?\n/).filter((line) => line.startsWith("data:"));
        if (data.length) yield data.map((line) => line.slice(5).trimStart()).join("\n");
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // the connection may be gone already
  }
}

/**
 * Run a network call; a broken connection becomes a sentence, an abort stays an abort.
 * @template T
 * @param {() => Promise<T>} call
 * @param {AbortSignal} signal
 * @returns {Promise<T>}
 */
async function reach(call, signal) {
  try {
    return await call();
  } catch (error) {
    signal.throwIfAborted();
    throw new AskFailed(text.gatewayLost);
  }
}

/** @param {Response} response */
async function refusal(response) {
  try {
    return sentence((await response.json()).error.message);
  } catch {
    return `the gateway answered with status ${response.status}.`;
  }
}

/** @param {string} message */
function sentence(message) {
  return /[.!?…]$/.test(message) ? message : `${message}.`;
}
