// Who is there: the gateway's view of the swarm, kept fresh, and the model that was chosen.
import { computed, signal } from "@preact/signals";

const FIRST_RETRY_MS = 1000;
const LONGEST_RETRY_MS = 15_000;

/**
 * @typedef {object} Peer
 * @property {string} peer
 * @property {string} name
 * @property {string} model
 * @property {string} artefact
 * @property {number} start
 * @property {number} end
 * @property {"joining" | "serving" | "draining" | "left"} state
 * @property {string} dtype
 * @property {string} device
 * @property {number} kv_tokens_free
 * @property {number | null} [ms_per_layer] one token through one layer
 * @property {number | null} [throughput] tokens through one layer in a second, many chats at once
 * @property {"direct" | "relayed" | "local" | null} path
 * @property {number | null} rtt_ms
 * @property {string | null} [path_words] how the gateway reaches it, and why not better
 * @property {boolean} [path_rests] a direct path opens again with the next message
 */
/**
 * @typedef {object} Model
 * @property {string} model
 * @property {string} artefact
 * @property {number} layer_count
 * @property {number} context_length
 * @property {number[]} coverage
 * @property {number[][]} gaps
 */
/** @typedef {{url: string, connected: boolean}} Relay */
/** @typedef {{relay: Relay, relays: Relay[], models: Model[], peers: Peer[]}} Swarm */
/** @typedef {Model & {id: string, label: string, peers: Peer[]}} Choice */

/** The newest view; null until the first one came. */
export const swarm = signal(/** @type {Swarm | null} */ (null));

/** False while the gateway does not answer. */
export const gatewayThere = signal(true);

const chosenId = signal("");

/** The models to choose from, with the peers that serve each. */
export const choices = computed(() => (swarm.value ? choicesOf(swarm.value) : []));

/** The chosen model, or else the first one that answers. */
export const chosenModel = computed(() => {
  const all = choices.value;
  return all.find(({ id }) => id === chosenId.value) ?? all.find(isCovered) ?? all[0] ?? null;
});

/** @param {string} id */
export function chooseModel(id) {
  chosenId.value = id;
}

/** @param {Model} model */
export function isCovered(model) {
  return model.gaps.length === 0;
}

/**
 * One choice per artefact. Its id is the model's name, as other clients write it, unless two share the name.
 * @param {Swarm} view
 * @returns {Choice[]}
 */
function choicesOf(view) {
  return view.models.map((model) => {
    const alone = view.models.filter((other) => other.model === model.model).length === 1;
    return {
      ...model,
      id: alone ? model.model : model.artefact,
      label: alone ? model.model : `${model.model} (${model.artefact.slice(0, 6)})`,
      peers: view.peers.filter((peer) => peer.artefact === model.artefact),
    };
  });
}

// ---------------------------------------------------------------- keeping it fresh

/** @type {EventSource | null} */
let source = null;
let retryMs = FIRST_RETRY_MS;
let timer = 0;

/** Open the stream of views, now. Until it works it is tried again, ever more slowly. */
export function watchSwarm() {
  clearTimeout(timer);
  source?.close();
  source = new EventSource("/api/swarm/events");
  source.onmessage = (event) => {
    swarm.value = JSON.parse(event.data);
    gatewayThere.value = true;
    retryMs = FIRST_RETRY_MS;
  };
  source.onerror = () => {
    source?.close();
    source = null;
    gatewayThere.value = false;
    timer = setTimeout(watchSwarm, retryMs);
    retryMs = Math.min(retryMs * 2, LONGEST_RETRY_MS);
  };
}

/** Something failed: find out at once whether the gateway is still there. */
export function lookAgain() {
  retryMs = FIRST_RETRY_MS;
  watchSwarm();
}
