// The page: a header, the conversation and, beside it, the route. Wires the parts; each has a file of its own.
import { render } from "preact";
import { announced } from "./announcer.js";
import { answering, stop } from "./answer.js";
import { Composer, focusComposer } from "./composer.js";
import { ConversationView } from "./conversation_view.js";
import { Settings, SettingsButton, Shortcuts, showSettings, showShortcuts } from "./dialogs.js";
import { Drawer, DrawerButton, searchChats, startOver, toggleDrawer } from "./drawer.js";
import { Logo } from "./flower.js";
import { html } from "./html.js";
import { KeyDialog } from "./key.js";
import { Notices } from "./notices.js";
import { RoutePanel } from "./route_view.js";
import { chatAddress, startShelf } from "./shelf.js";
import { choices, chooseModel, chosenModel, gatewayThere, isCovered, swarm, watchSwarm } from "./swarm.js";
import { SwarmPage } from "./swarm_page.js";
import { SWARM_ADDRESS, view } from "./view.js";
import { counted, gapList, text } from "./words.js";

const home = /** @type {HTMLElement} */ (document.getElementById("page"));

function Page() {
  const chat = view.value === "chat";
  home.className = chat ? "" : "swarm-view";
  return html`
    <${Header} />
    <${Notices} />
    <main aria-label=${chat ? text.chat : text.swarm}>
      ${chat ? html`<${ConversationView} /><${Composer} />` : html`<${SwarmPage} />`}
    </main>
    ${chat && html`<${RoutePanel} />`}
    <${Drawer} />
    <${Settings} />
    <${Shortcuts} />
    <${KeyDialog} />
    <${Announcer} />
  `;
}

function Header() {
  return html`<header class="top">
    <${DrawerButton} />
    <div class="brand"><${Logo} /><h1>Corolla</h1></div>
    <${ModelPicker} />
    <${Views} />
    <${SettingsButton} />
    <button type="button" class="soft new-chat" aria-label=${text.newChat} onClick=${startOver}>
      <span aria-hidden="true">+</span> <span class="long">${text.newChat}</span>
    </button>
  </header>`;
}

function ModelPicker() {
  const model = chosenModel.value;
  if (!model) return html`<span class="model" />`;
  if (choices.value.length === 1) return html`<span class="model" title=${model.label}>${model.label}</span>`;
  return html`<label class="model">
    <span class="unseen">Model</span>
    <select value=${model.id} onChange=${(/** @type {any} */ event) => chooseModel(event.target.value)}>
      ${choices.value.map(
        (choice) =>
          html`<option value=${choice.id} selected=${choice.id === model.id}>
            ${choice.label}${isCovered(choice) ? ` – ${text.everyLayer}` : ` – no one serves ${gapList(choice.gaps)}`}
          </option>`,
      )}
    </select>
  </label>`;
}

function SwarmState() {
  const view = swarm.value;
  const well = gatewayThere.value && view?.relay.connected;
  const peers = chosenModel.value?.peers.length ?? 0;
  let said = counted(peers, "peer", "peers");
  if (!gatewayThere.value) said = "gateway gone";
  else if (!view) said = "connecting";
  else if (!view.relay.connected) said = "relay gone";
  return html`<span class="swarm-state ${well ? "well" : "unwell"}">${said}</span>`;
}

function Views() {
  const here = (/** @type {boolean} */ shown) => (shown ? "page" : undefined);
  return html`<nav class="views" aria-label=${text.views}>
    <a href=${chatAddress.value} aria-current=${here(view.value === "chat")}>${text.chat}</a>
    <a href=${SWARM_ADDRESS} aria-current=${here(view.value === "swarm")}>
      <span class="long">${text.swarm}</span> <${SwarmState} />
    </a>
  </nav>`;
}

function Announcer() {
  return html`<div class="unseen" aria-live="polite" data-testid="announcer">${announced.value}</div>`;
}

addEventListener("keydown", (event) => {
  if (event.isComposing) return;
  // In a dialog it closes that.
  if (event.key === "Escape" && answering.peek() && !document.querySelector("dialog[open]")) {
    event.preventDefault();
    stop();
    focusComposer();
  }
  const act = shortcuts[shortcutOf(event)];
  // A character in a text field is only a character.
  const typed = event.key.length === 1 && !event.ctrlKey && !event.metaKey;
  if (!act || (typed && event.target instanceof Element && event.target.matches("input, textarea, select"))) return;
  event.preventDefault();
  act();
});

/** @type {Record<string, () => void>} */
const shortcuts = {
  "mod+shift+o": startOver,
  "mod+k": searchChats,
  "mod+b": toggleDrawer,
  "mod+,": showSettings,
  "mod+/": showShortcuts,
  "shift+?": showShortcuts,
  "?": showShortcuts,
};

/** @param {KeyboardEvent} event */
function shortcutOf(event) {
  const mod = event.ctrlKey || event.metaKey ? "mod+" : "";
  return `${mod}${event.shiftKey ? "shift+" : ""}${event.key.toLowerCase()}`;
}

// Or the broken connection would be taken for the gateway's fault, and kept as that.
addEventListener("beforeunload", stop);

render(html`<${Page} />`, home);
watchSwarm();
startShelf();
