// The conversation on screen: messages, what each answer cost, and what to show before the first one.
import { effect, useComputed } from "@preact/signals";
import { useEffect, useRef, useState } from "preact/hooks";
import { announce, sentenceEnd } from "./announcer.js";
import { answering, askInstead, canGoOn, goOn, tryAgain } from "./answer.js";
import { send } from "./composer.js";
import { conversation } from "./conversations.js";
import { CopyButton } from "./copy.js";
import { Flower } from "./flower.js";
import { html } from "./html.js";
import { GrowingMarkdown } from "./markdown.js";
import { LendAMachine } from "./notices.js";
import { followPointer } from "./pointing.js";
import { chosenModel, isCovered, swarm } from "./swarm.js";
import { counted, duration, gapSentence, perSecond, text } from "./words.js";

/** @typedef {import("./conversations.js").Message} Message */

/** Nearer to the end than this, the view follows new words. */
const NEAR_PX = 80;
const SPEAK_EVERY_MS = 1000;
const QUESTIONS = ["What is Corolla?", "How do I lend my machine?", "Can peers read my messages?"];

export function ConversationView() {
  const messages = conversation.value.path.value;
  return html`<div class="conversation">
    <${Following} key=${conversation.value}>
      ${messages.length === 0
        ? html`<${Welcome} />`
        : html`<div class="messages" role="log" aria-live="off" aria-label="Conversation">
            ${messages.map((message) =>
              message.role === "user"
                ? html`<${Question} key=${message.id} message=${message} />`
                : html`<${Answer} key=${message.id} message=${message} />`,
            )}
          </div>`}
    <//>
  </div>`;
}

/**
 * Scrolls with the newest words unless the reader went up.
 * @param {{children?: any}} props
 */
function Following({ children }) {
  const box = useRef(/** @type {HTMLElement | null} */ (null));
  const [away, setAway] = useState(false);
  useEffect(() => {
    const view = /** @type {HTMLElement} */ (box.current);
    let following = true;
    const look = () => {
      following = view.scrollHeight - view.scrollTop - view.clientHeight < NEAR_PX;
      setAway(!following);
    };
    const grown = new ResizeObserver(() => {
      if (view.querySelector(".welcome")) return; // that is read from its beginning
      if (following) view.scrollTop = view.scrollHeight;
      else look();
    });
    grown.observe(/** @type {Element} */ (view.firstElementChild));
    grown.observe(view);
    view.addEventListener("scroll", look, { passive: true });
    return () => grown.disconnect();
  }, []);
  const toEnd = () => box.current?.scrollTo({ top: box.current.scrollHeight });
  return html`<div class="scroll" ref=${box} tabindex="0" role="region" aria-label="Messages">
      <div class="column">${children}</div>
    </div>
    ${away && html`<button type="button" class="soft to-latest" onClick=${toEnd}>↓ ${text.toLatest}</button>`}`;
}

// ---------------------------------------------------------------- messages

/** @param {{message: Message}} props */
function Question({ message }) {
  const [editing, setEditing] = useState(false);
  if (editing) return html`<${Rewording} message=${message} done=${() => setEditing(false)} />`;
  return html`<div class="asked">
    <article class="question" aria-label="You">${message.content.value}</article>
    <footer>
      <${Branches} message=${message} />
      <button type="button" class="quiet" aria-label="${text.edit} your message" onClick=${() => setEditing(true)}>
        ${text.edit}
      </button>
    </footer>
  </div>`;
}

/** @param {{message: Message, done: () => void}} props */
function Rewording({ message, done }) {
  const field = useRef(/** @type {HTMLTextAreaElement | null} */ (null));
  useEffect(() => field.current?.focus(), []);
  const send = (/** @type {Event} */ event) => {
    event.preventDefault();
    if (answering.peek()) return;
    askInstead(message, field.current?.value ?? "");
    done();
  };
  const keyDown = (/** @type {KeyboardEvent} */ event) => {
    if (event.isComposing || event.keyCode === 229) return;
    if (event.key === "Escape") done();
    if (event.key === "Enter" && !event.shiftKey) send(event);
  };
  return html`<form class="rewording" onSubmit=${send}>
    <textarea aria-label=${text.editQuestion} ref=${field} rows="3" onKeyDown=${keyDown}>${message.content.peek()}</textarea>
    <button type="button" class="quiet" onClick=${done}>${text.cancel}</button>
    <button type="submit" class="soft" aria-disabled=${answering.value}>${text.send}</button>
  </form>`;
}

/** Which of several answers, or wordings, this is, and the way to the others. @param {{message: Message}} props */
function Branches({ message }) {
  const talk = conversation.value;
  const all = talk.siblings(message);
  if (all.length < 2) return null;
  const at = all.indexOf(message);
  const turn = (/** @type {number} */ to, /** @type {string} */ sign, /** @type {string} */ name) =>
    html`<button type="button" class="quiet" aria-label=${name} aria-disabled=${!all[to]} onClick=${() => all[to] && talk.choose(all[to])}>
      ${sign}
    </button>`;
  return html`<span class="branches">${turn(at - 1, "‹", "Earlier version")}${at + 1}/${all.length}${turn(at + 1, "›", "Later version")}</span>`;
}

/** @param {{message: Message}} props */
function Answer({ message }) {
  const state = message.state.value;
  const live = isLive(state);
  return html`<article class="answer ${state}" aria-label="Answer" aria-busy=${live}>
    ${state === "waiting" &&
    html`<p class="reading"><span class="budding" aria-hidden="true"><i /><i /><i /></span>${message.place.value ? text.inLine(message.place.value) : text.reading}</p>`}
    <${AnswerText} key=${message.rounds.value} message=${message} />
    <${Ending} message=${message} />
  </article>`;
}

/** The text itself is drawn outside Preact, which would compare all of it with every word. @param {{message: Message}} props */
function AnswerText({ message }) {
  const home = useRef(/** @type {HTMLElement | null} */ (null));
  useEffect(() => {
    const markdown = new GrowingMarkdown(/** @type {HTMLElement} */ (home.current));
    const endDrawing = effect(() => {
      const state = message.state.value;
      markdown.show(message.content.value, !isLive(state));
    });
    const endReading = readAloud(message);
    const endPointing = followPointer(message, /** @type {HTMLElement} */ (home.current));
    return () => {
      endPointing();
      endDrawing();
      endReading();
      markdown.close();
    };
  }, [message]);
  return html`<div class="text" ref=${home} data-message=${message.id} />`;
}

/** @param {import("./conversations.js").AnswerState} state */
function isLive(state) {
  return state === "waiting" || state === "streaming";
}

/** Announce finished sentences once a second, and the rest at the end. @param {Message} message */
function readAloud(message) {
  let said = message.content.peek().length;
  if (!isLive(message.state.peek())) return () => {};
  const speak = (/** @type {number} */ end) => {
    if (end > said) announce(plain(message.content.peek().slice(said, end)));
    said = end;
  };
  const timer = setInterval(() => speak(sentenceEnd(message.content.peek(), said)), SPEAK_EVERY_MS);
  const endWatch = effect(() => {
    const state = message.state.value;
    if (isLive(state)) return;
    clearInterval(timer);
    speak(message.content.peek().length);
    if (state === "stopped") announce(text.stopped);
    if (state === "failed") announce(`${failure(message)}: ${message.error.peek()}`);
  });
  return () => {
    clearInterval(timer);
    endWatch();
  };
}

/** Without the signs of markdown, which would be read out one by one. @param {string} source */
function plain(source) {
  return source.replace(/[*_`#>|~]+/g, "").trim();
}

/** @param {{message: Message}} props */
function Ending({ message }) {
  const state = message.state.value;
  const numbers = useComputed(() => summary(message)).value;
  if (isLive(state)) return null;
  const last = conversation.value.path.value.at(-1) === message;
  const broken = state === "failed" || state === "stopped";
  return html`
    ${state === "failed" &&
    html`<p class="failure"><strong>${failure(message)}:</strong> ${message.error.value}</p>`}
    <footer>
      ${state === "stopped" && html`<span>${text.stopped}</span>`}
      ${state === "cut" && html`<span>${text.cut}</span>`}
      ${numbers && html`<span>${numbers}</span>`}
      <${ContextMeter} message=${message} />
      <${Branches} message=${message} />
      <${CopyButton} text=${() => message.content.peek()} what="the answer" />
      ${last &&
      canGoOn(message) &&
      html`<button type="button" class="quiet again" onClick=${() => goOn(message)}>${text.goOn}</button>`}
      ${(broken || last) &&
      html`<button type="button" class="quiet ${broken && !canGoOn(message) ? "again" : ""}" onClick=${() => tryAgain(message)}>${text.tryAgain}</button>`}
    </footer>
  `;
}

/** How much of what the model can look back on is used, after the newest answer. @param {{message: Message}} props */
function ContextMeter({ message }) {
  const used = message.numbers.value?.context_tokens;
  const all = chosenModel.value?.context_length;
  if (!used || !all || conversation.value.path.value.at(-1) !== message) return null;
  const said = `${used.toLocaleString("en")} of ${all.toLocaleString("en")} tokens`;
  return html`<span class="context" title=${text.contextUsed}>
    <meter min="0" max=${all} high=${all * 0.85} value=${used} aria-label=${text.contextUsed}>${said}</meter>${said}
  </span>`;
}

/** @param {Message} message */
function failure(message) {
  return message.content.peek() ? text.failed : text.refused;
}

/** @param {Message} message */
function summary(message) {
  const numbers = message.numbers.value;
  if (!numbers?.tokens) return "";
  const parts = [counted(numbers.tokens, "token", "tokens")];
  if (numbers.tokens_per_s) parts.push(`${perSecond(numbers.tokens_per_s)} tokens/s`);
  if (numbers.first_token_ms !== null) parts.push(`first after ${duration(numbers.first_token_ms)}`);
  return parts.join(" · ");
}

// ---------------------------------------------------------------- before the first message

function Welcome() {
  const model = chosenModel.value;
  if (!swarm.value) return html`<div class="welcome"><p class="lead">${text.connecting}…</p></div>`;
  if (!model) return html`<${Nobody} />`;
  const covered = isCovered(model);
  const peers = counted(model.peers.length, "peer", "peers");
  const held = `${peers} ${model.peers.length === 1 ? "holds" : "hold"} the ${model.layer_count} layers of ${model.label}`;
  return html`<div class="welcome">
    <${Flower} coverage=${model.coverage} label="A flower with one petal for each layer that a peer serves" />
    <h2>${covered ? "A model in many hands" : "Some petals are missing"}</h2>
    <p class="lead">${covered ? `${held}.` : gapSentence(model.label, model.gaps)}</p>
    ${covered ? html`<${Starters} />` : html`<${LendAMachine} />`}
    <${WhoCanRead} />
  </div>`;
}

function Nobody() {
  return html`<div class="welcome">
    <${Flower} coverage=${[0, 0, 0, 0, 0, 0]} label="A flower without petals" />
    <h2>${text.nobody}</h2>
    <${LendAMachine} />
  </div>`;
}

function Starters() {
  return html`<ul class="starters">
    ${QUESTIONS.map(
      (question) =>
        html`<li><button type="button" class="soft" onClick=${() => send(question)}>${question}</button></li>`,
    )}
  </ul>`;
}

function WhoCanRead() {
  return html`<aside class="readable" aria-label="Who can read this">
    <strong>${text.readableTitle}</strong> ${text.readable}
  </aside>`;
}
