// The second view: who holds which layers of a model, what the swarm lacks, and how to lend a machine.
import { signal } from "@preact/signals";
import { LastHour } from "./charts.js";
import { CopyButton } from "./copy.js";
import { depth } from "./flower.js";
import { html } from "./html.js";
import { need, stretches, weakest } from "./needs.js";
import { QrCode } from "./qr.js";
import { chosenModel, swarm } from "./swarm.js";
import { SWARM_ADDRESS } from "./view.js";
import { counted, layers, lendCommand, text } from "./words.js";

/** @typedef {import("./swarm.js").Choice} Choice */
/** @typedef {import("./swarm.js").Peer} Peer */

/** How Python is called there. Only Linux is tried. */
const SYSTEMS = { Linux: "python", macOS: "python3", Windows: "py" };
/** @typedef {keyof typeof SYSTEMS} System */

const system = signal(/** @type {System} */ (likelySystem()));

export function SwarmPage() {
  const model = chosenModel.value;
  return html`<div class="swarm-page scroll" tabindex="0" role="region" aria-label=${text.swarm}>
    <div class="swarm-column">
      ${model ? html`<${Model} model=${model} />` : html`<h2>${swarm.value ? text.nobody : `${text.connecting}…`}</h2>`}
      ${swarm.value && html`<${Lend} model=${model} />`}
    </div>
  </div>`;
}

/** @param {{model: Choice}} props */
function Model({ model }) {
  return html`
    <header class="swarm-head">
      <h2>${model.label}</h2>
      <p class="lead">${counted(model.layer_count, "layer", "layers")}, ${counted(model.peers.length, "peer", "peers")}</p>
    </header>
    <p class="need"><strong>${text.needed}</strong> ${need(model).said}</p>
    <section aria-labelledby="coverage-title">
      <h3 id="coverage-title">${text.peersPerLayer}</h3>
      <${Coverage} model=${model} />
    </section>
    <section aria-labelledby="peers-title">
      <h3 id="peers-title">${text.peers}</h3>
      <${PeerTable} peers=${model.peers} />
      <${Reachability} peers=${model.peers} />
    </section>
    <section aria-labelledby="hour-title">
      <h3 id="hour-title">${text.lastHour}</h3>
      <${LastHour} artefact=${model.artefact} />
    </section>
  `;
}

/** A column for each layer, as high as peers hold it; the weakest are marked and named. @param {{model: Choice}} props */
function Coverage({ model }) {
  const { coverage, layer_count } = model;
  const least = weakest(coverage);
  const most = Math.max(...coverage, 1);
  const said = stretches(coverage).map(({ start, end, peers }) => `${layers(start, end)}: ${counted(peers, "peer", "peers")}`);
  return html`<figure class="columns">
    <div class="heights" role="img" aria-label=${said.join("; ")}>
      ${coverage.map((peers, layer) => {
        const weak = peers === least.peers;
        const look = { "--depth": depth(layer, layer_count), "--share": `${(100 * peers) / most}%` };
        return html`<span class=${peers === 0 ? "none" : weak ? "weak" : ""} title="layer ${layer}: ${counted(peers, "peer", "peers")}">
          <b>${layer_count <= 40 ? peers : ""}</b><i style=${look} />
        </span>`;
      })}
    </div>
    <figcaption><span>0</span><span>${text.weakest}: ${layers(least.start, least.end)}, ${counted(least.peers, "peer", "peers")}</span><span>${layer_count}</span></figcaption>
  </figure>`;
}

/** @param {{peers: Peer[]}} props */
function PeerTable({ peers }) {
  const sorted = [...peers].sort((a, b) => a.start - b.start || a.end - b.end || a.name.localeCompare(b.name));
  const columns = text.columns;
  return html`<div class="peer-table">
    <table>
      <thead>
        <tr>${Object.values(columns).map((name) => html`<th scope="col">${name}</th>`)}</tr>
      </thead>
      <tbody>
        ${sorted.map(
          (peer) => html`<tr key=${peer.peer} data-peer=${peer.name}>
            <th scope="row"><bdi>${peer.name}</bdi></th>
            <td data-column=${columns.span}>${layers(peer.start, peer.end)}</td>
            <td data-column=${columns.device}>${peer.device}</td>
            <td data-column=${columns.dtype}>${peer.dtype}</td>
            <td data-column=${columns.speed}>${speed(peer)}</td>
            <td data-column=${columns.room}>${peer.kv_tokens_free.toLocaleString("en")} tokens</td>
            <td data-column=${columns.path} class="path">${peer.path_words ?? peer.path ?? text.notDialled}</td>
            <td data-column=${columns.state}><span class="state ${peer.state}">${peer.state}</span></td>
          </tr>`,
        )}
      </tbody>
    </table>
  </div>`;
}

/** Those that only a relay reaches, and why. @param {{peers: Peer[]}} props */
function Reachability({ peers }) {
  const dialled = peers.filter(({ path }) => path);
  const relayed = dialled.filter(({ path, path_rests }) => path === "relayed" && !path_rests);
  if (!dialled.length) return null;
  if (!relayed.length) return html`<p class="reach">${text.allDirect}</p>`;
  return html`<details class="reach">
    <summary>${text.someRelayed(relayed.length, dialled.length)}</summary>
    <ul>
      ${relayed.map(({ peer, name, path_words }) => html`<li key=${peer}><bdi>${name}</bdi>: ${path_words ?? text.noReason}</li>`)}
    </ul>
    <p>${text.relayedHint}</p>
  </details>`;
}

/** What it would reach alone, through the layers it holds. @param {Peer} peer */
function speed({ throughput, ms_per_layer, start, end }) {
  if (throughput) return `${Math.round(throughput / (end - start)).toLocaleString("en")} tokens/s`;
  if (ms_per_layer) return `${(1000 / (ms_per_layer * (end - start))).toFixed(1)} tokens/s`;
  return text.unmeasured;
}

// ---------------------------------------------------------------- lending

/** @param {{model: Choice | null}} props */
function Lend({ model }) {
  const relay = /** @type {import("./swarm.js").Swarm} */ (swarm.value).relay;
  const given = lendCommand(relay.url, model?.model, model ? need(model).gap : undefined);
  const command = given.replace(/^python/, SYSTEMS[system.value]);
  const link = `${location.origin}/${SWARM_ADDRESS}`;
  return html`<section class="lending" aria-labelledby="lend-title">
    <h3 id="lend-title">${text.lendYours}</h3>
    <p>${text.lendSteps}</p>
    <fieldset class="themes">
      <legend class="unseen">${text.system}</legend>
      ${/** @type {System[]} */ (Object.keys(SYSTEMS)).map(
        (name) => html`<label>
          <input type="radio" name="system" checked=${system.value === name} onChange=${() => (system.value = name)} />
          <span>${name}</span>
        </label>`,
      )}
    </fieldset>
    <div class="command"><code>${command}</code><${CopyButton} text=${() => command} what="the command" /></div>
    <div class="pass-on">
      <${QrCode} content=${link} label="QR code of ${link}" />
      <div>
        <p>${text.passOn}</p>
        <div class="command"><code>${link}</code><${CopyButton} text=${() => link} what="the link" /></div>
        ${isLocal(location.hostname) && html`<p class="nothing">${text.onlyHere}</p>`}
      </div>
    </div>
  </section>`;
}

/** @param {string} host */
function isLocal(host) {
  return host === "localhost" || host === "[::1]" || host.startsWith("127.");
}

function likelySystem() {
  if (/Mac/.test(navigator.userAgent)) return "macOS";
  return /Windows/.test(navigator.userAgent) ? "Windows" : "Linux";
}
