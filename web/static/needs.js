// What a swarm needs most, from its coverage. Plain functions of values; swarm_page.js shows them.
import { counted, gapList, layers } from "./words.js";

/** @typedef {import("./swarm.js").Choice} Choice */
/** @typedef {{start: number, end: number, peers: number}} Stretch a run of layers that as many peers hold */

/** Runs of layers held by equally many peers, in order. @param {number[]} coverage @returns {Stretch[]} */
export function stretches(coverage) {
  /** @type {Stretch[]} */
  const runs = [];
  coverage.forEach((peers, layer) => {
    const last = runs[runs.length - 1];
    if (last?.peers === peers) last.end = layer + 1;
    else runs.push({ start: layer, end: layer + 1, peers });
  });
  return runs;
}

/** The layers fewest peers hold: the longest such run. @param {number[]} coverage */
export function weakest(coverage) {
  const weaker = (/** @type {Stretch} */ a, /** @type {Stretch} */ b) =>
    a.peers - b.peers || b.end - b.start - (a.end - a.start) || a.start - b.start;
  return stretches(coverage).sort(weaker)[0];
}

/**
 * What would help most, in a sentence, and the layers to lend for it.
 * @param {Choice} model
 * @returns {{said: string, gap: number[] | undefined}}
 */
export function need(model) {
  if (model.gaps.length) {
    return { said: `It cannot answer yet: no one serves ${gapList(model.gaps)}. Lend these first.`, gap: model.gaps[0] };
  }
  const { start, end, peers } = weakest(model.coverage);
  if (peers === 1) {
    if (start === 0 && end === model.layer_count) {
      return { said: "It answers, but each layer has only one peer: when any of them leaves, answers stop.", gap: undefined };
    }
    const have = end - start === 1 ? "has" : "have";
    return {
      said: `It answers, but ${layers(start, end)} ${have} only one peer: when that machine leaves, answers stop. A second one makes it safe.`,
      gap: [start, end],
    };
  }
  const slow = slowest(model);
  const safe = `Every layer has at least ${counted(peers, "peer", "peers")}.`;
  if (!slow) return { said: `${safe} One more machine makes it faster.`, gap: undefined };
  return {
    said: `${safe} ${slow.name} (${layers(slow.start, slow.end)}) is the slowest; a faster machine there helps most.`,
    gap: [slow.start, slow.end],
  };
}

/** @param {Choice} model */
function slowest(model) {
  const timed = model.peers.filter((peer) => peer.ms_per_layer);
  if (timed.length < 2) return null;
  return timed.reduce((slow, peer) => ((peer.ms_per_layer ?? 0) > (slow.ms_per_layer ?? 0) ? peer : slow));
}
