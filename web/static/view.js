// Which of the two views is on screen: the chat or the swarm. The page's address says so, so that a link or a
// QR code can lead to either.
import { signal } from "@preact/signals";

export const SWARM_ADDRESS = "#/swarm";

/** @typedef {"chat" | "swarm"} View */

export const view = signal(inAddress());

addEventListener("hashchange", () => (view.value = inAddress()));

/** @returns {View} */
function inAddress() {
  return location.hash === SWARM_ADDRESS ? "swarm" : "chat";
}
