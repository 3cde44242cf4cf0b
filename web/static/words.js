// Everything the page says in words, in one place. The views decide when; this file decides how.

/**
 * The layers [start, end), as all of Corolla writes them.
 * @param {number} start
 * @param {number} end
 */
export function layers(start, end) {
  return `layers ${start}–${end}`;
}

/** @param {number[][]} gaps */
export function gapList(gaps) {
  return `layers ${gaps.map(([start, end]) => `${start}–${end}`).join(" and ")}`;
}

/** @param {number} count @param {string} one @param {string} many */
export function counted(count, one, many) {
  return `${count} ${count === 1 ? one : many}`;
}

/**
 * A duration with about two digits that matter.
 * @param {number} ms
 */
export function duration(ms) {
  if (ms >= 1000) return `${(ms / 1000).toFixed(ms < 10_000 ? 1 : 0)} s`;
  return `${ms.toFixed(ms < 10 ? 1 : 0)} ms`;
}

/** @param {number} rate */
export function perSecond(rate) {
  return rate < 10 ? rate.toFixed(1) : rate.toFixed(0);
}

const DAY_MS = 86_400_000;

/** When something was, as people say it. @param {number} then @param {number} now */
export function ago(then, now = Date.now()) {
  const ms = Math.max(0, now - then);
  if (ms < 60_000) return "just now";
  if (ms < 3_600_000) return `${Math.round(ms / 60_000)} min ago`;
  if (ms < DAY_MS) return `${Math.round(ms / 3_600_000)} h ago`;
  return new Date(then).toLocaleDateString(undefined, { day: "numeric", month: "short", year: "numeric" });
}

/**
 * What to type to serve a model's missing layers. The name comes from a stranger and the command is there to
 * be pasted into a shell, so only a plain Hugging Face id is written into it.
 * @param {string} relayUrl
 * @param {string} [model]
 * @param {number[]} [gap]
 */
export function lendCommand(relayUrl, model = "", gap) {
  const from = /^\w[\w.-]*\/\w[\w.-]*$/.test(model) ? ` --model ${model}` : "";
  const part = gap ? ` --layers ${gap[0]}:${gap[1]}` : "";
  return `python -m peer --relay ${relayUrl}${from}${part}`;
}

/** A count with few digits. @param {number} value */
export function rounded(value) {
  return value < 10_000 ? value.toLocaleString("en") : `${Math.round(value / 1000).toLocaleString("en")}k`;
}

export const text = {
  you: "you",
  youTitle: "You",
  close: "Close",
  save: "Save",
  undo: "Undo",

  conversations: "Conversations",
  searchChats: "Search what was said",
  nothingFound: "Nothing here has these words.",
  noChats: "What you talk about will be listed here.",
  rename: "Rename",
  nameOfChat: "Name of the conversation",
  remove: "Delete",
  removed: "Deleted",
  saveMarkdown: "Save this one as markdown",
  saveAll: "Save all as JSON",
  bringIn: "Bring in a JSON file",
  broughtIn: "Brought in",
  keptHere: "Kept in this browser only.",
  notKept: "This browser keeps nothing; save what you need as a file.",
  notJson: "That file is not JSON; choose one that this page saved.",
  notOurs: "That file holds no conversations of this page; choose one that it saved.",
  newerFile: "A newer page saved that file; renew this one first.",
  damaged: "That file is damaged: a message has no place in its conversation. Nothing was brought in.",

  newChat: "New chat",
  composer: "Message to the swarm",
  placeholder: "Ask the swarm something",
  attach: "Attach text files",
  attached: "Files that go with it",
  /** @param {string} name */
  detach: (name) => `Leave out ${name}`,
  /** @param {string} name @param {number} most */
  fileTooLarge: (name, most) => `${name} is too large: a file may have ${most / 1024} KiB.`,
  /** @param {string} name */
  fileNotText: (name) => `${name} is not text; only text files can go with a message.`,
  /** @param {string} name */
  fileUnread: (name) => `${name} could not be read; choose it again.`,
  hint: "Enter sends, Shift+Enter makes a new line",
  hintAnswering: "Esc stops the answer",
  send: "Send",
  stop: "Stop",
  tryAgain: "Try again",
  goOn: "Continue",
  tryNow: "Try now",
  copy: "Copy",
  copied: "Copied",
  copyFailed: "Could not copy",
  toLatest: "To the latest words",

  settings: "Settings",
  systemPrompt: "System prompt",
  systemPlaceholder: "How the model should behave, said before every conversation",
  temperature: "Temperature",
  aboutTemperature: "0 always takes the likeliest word; higher is freer.",
  topP: "Top-p",
  aboutTopP: "Only the likeliest words that make up this share.",
  topK: "Top-k",
  aboutTopK: "Only so many of the likeliest words; 0 for all.",
  maxTokens: "Most tokens",
  aboutMaxTokens: "An answer ends here at the latest.",
  seed: "Seed",
  aboutSeed: "The same seed and question give the same answer.",
  stopTexts: "Stop texts",
  aboutStopTexts: "An answer ends before any of these; one a line, four at most.",
  makersChoice: "the makers’ wish",
  theme: "Theme",
  themes: { system: "As the system", light: "Light", dark: "Dark" },
  reset: "Back to the makers’ wishes",
  shortcuts: "Shortcuts",
  keySend: "Send",
  keyNewLine: "New line",
  keyStop: "Stop the answer",
  keyShortcuts: "This list",
  keyShortcutsOutside: "This list, outside of text fields",
  edit: "Edit",
  cancel: "Cancel",
  editQuestion: "Your message, changed",
  contextUsed: "Of what the model can look back on",

  readableTitle: "Strangers’ machines do the thinking.",
  readable:
    "Your words pass through the peers on the route. Whoever holds the first layers can read them, and whoever " +
    "holds the last ones can read the answer. Write nothing here that a stranger should not see.",
  readableShort: "Peers on the route can read this chat.",

  reading: "The peers are reading your message",
  /** @param {number} place */
  inLine: (place) => (place === 1 ? "The swarm is full; you are next" : `The swarm is full; ${place - 1} more before you`),
  stopped: "Stopped",
  cut: "Reached its longest",

  keyTitle: "This gateway asks for a key",
  keyWrong: "The gateway does not know that key. Ask its keeper for the right one.",
  key: "Key of this gateway",
  aboutKey: "Its keeper gives it to you. It is kept in this browser only.",
  keyUse: "Use this key",
  keyForget: "Forget the key",

  lastHour: "The last hour",
  noHistory: "The lines begin half a minute after the gateway did.",
  charts: {
    peers: "Peers",
    sessions: "Chats under way",
    tokens_per_s: "Tokens a second, all chats",
    kv_tokens_free: "Room for tokens of chats",
  },
  /** @param {string} title @param {number} now @param {number} least @param {number} most @param {number} minutes */
  chartSaid: (title, now, least, most, minutes) =>
    `${title}: ${rounded(now)} now; between ${rounded(least)} and ${rounded(most)} in the last ${counted(minutes, "minute", "minutes")}`,
  /** @param {number} minutes */
  minutesAgo: (minutes) => `${minutes} min ago`,
  /** @param {number} most */
  mostWas: (most) => `most: ${rounded(most)}`,
  allDirect: "This gateway reaches each of them directly.",
  /** @param {number} relayed @param {number} all */
  someRelayed: (relayed, all) => `${relayed} of ${all} are reached through a relay, which is slower: see why`,
  noReason: "no reason is known yet",
  relayedHint: "Whoever runs such a machine can find out more with: python -m peer doctor",
  failed: "The answer broke off",
  refused: "No answer",
  brokeOff: "the gateway ended the answer before it was complete.",
  gatewayGone: "The gateway does not answer. It may be starting again; the page keeps trying.",
  gatewayLost: "the connection to the gateway broke.",
  connecting: "Looking for the swarm",
  nobody: "No one lends a machine yet.",
  lend: "Lend a machine:",
  notYet: "This waits until every layer has a peer.",

  chat: "Chat",
  swarm: "Swarm",
  views: "Views",
  needed: "Needed most:",
  weakest: "weakest",
  peers: "Peers",
  columns: {
    name: "name",
    span: "layers",
    device: "device",
    dtype: "precision",
    speed: "throughput",
    room: "room for chats",
    path: "how it is reached",
    state: "state",
  },
  unmeasured: "not measured yet",
  notDialled: "not connected yet",
  lendYours: "Lend your machine",
  lendSteps: "Install Corolla, then run this. No port has to be open, and Ctrl-C ends it after the answers under way.",
  system: "Operating system",
  passOn: "Pass it on: this link leads here.",
  onlyHere: "This address works on this machine only. Start the gateway with --host to let others reach it.",

  everyLayer: "every layer served",
  reached: "How the peers of this route are reached",

  route: "The route",
  showRoute: "Show the route",
  hideRoute: "Hide the route",
  noRoute: "Ask something, and the way of each token through the peers is drawn here as it happens.",
  stepper: "Route of each token",
  shareOfTime: "Its share of the hops’ time, lately",
  nobodyHere: "no one yet",
  gone: "gone",
  peersPerLayer: "peers per layer",
};

/** @param {string} url */
export function relayGone(url) {
  return `The gateway cannot reach the relay at ${url}, and keeps trying. Peers it already knows may still answer.`;
}

/** @param {string} model @param {number[][]} gaps */
export function gapSentence(model, gaps) {
  return `No one serves ${gapList(gaps)} of ${model} yet.`;
}
