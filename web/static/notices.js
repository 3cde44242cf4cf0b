// What keeps the swarm from answering, in plain words, and what to do about it.
import { CopyButton } from "./copy.js";
import { html } from "./html.js";
import { chosenModel, gatewayThere, lookAgain, swarm } from "./swarm.js";
import { lendCommand, relayGone, text } from "./words.js";

/** Banners under the header: the gateway or the relay is away. */
export function Notices() {
  return html`<div class="notices" role="status">${notice()}</div>`;
}

function notice() {
  if (!gatewayThere.value) {
    return html`<p class="notice">
      ${text.gatewayGone} <button type="button" class="quiet" onClick=${lookAgain}>${text.tryNow}</button>
    </p>`;
  }
  const relay = swarm.value?.relay;
  if (relay && !relay.connected) return html`<p class="notice">${relayGone(relay.url)}</p>`;
  return null;
}

/** How to lend a machine, with the relay's address filled in. */
export function LendAMachine() {
  const relay = swarm.value?.relay;
  if (!relay) return null;
  const model = chosenModel.value;
  const command = lendCommand(relay.url, model?.model, model?.gaps[0]);
  return html`<div class="lend">
    <p>${text.lend}</p>
    <div class="command"><code>${command}</code><${CopyButton} text=${() => command} what="the command" /></div>
  </div>`;
}
