// How the model is to answer and how the page looks; kept in this browser.
import { signal } from "@preact/signals";

const KEPT = "corolla-settings";
const THEME = "corolla-theme";

/** @typedef {"system" | "light" | "dark"} Theme */
/**
 * What goes into the request; an empty field leaves the choice to the model's makers.
 * @typedef {{system: string, temperature: string, top_p: string, top_k: string, max_tokens: string, seed: string, stop: string}} Settings
 */

/** The numbers a gateway takes. */
export const LIMITS = {
  temperature: { min: 0, max: 2, step: 0.05 },
  top_p: { min: 0.05, max: 1, step: 0.05 },
  top_k: { min: 0, max: 1000, step: 1 },
  max_tokens: { min: 1, max: 1_000_000, step: 1 },
  seed: { min: 0, max: 2_147_483_647, step: 1 },
};

/** @type {Settings} */
const NONE = { system: "", temperature: "", top_p: "", top_k: "", max_tokens: "", seed: "", stop: "" };

/** More stop texts than this a gateway refuses. */
const MOST_STOPS = 4;

export const settings = signal(kept());
export const theme = signal(/** @type {Theme} */ (document.documentElement.dataset.theme ?? "system"));

/** @returns {Settings} */
function kept() {
  try {
    const value = JSON.parse(localStorage.getItem(KEPT) ?? "{}");
    return /** @type {Settings} */ (
      Object.fromEntries(Object.keys(NONE).map((name) => [name, typeof value[name] === "string" ? value[name] : ""]))
    );
  } catch {
    return NONE;
  }
}

/** @param {Partial<Settings>} change */
export function set(change) {
  settings.value = { ...settings.peek(), ...change };
  localStorage.setItem(KEPT, JSON.stringify(settings.peek()));
}

/** As the model's makers wish, with no system prompt. */
export function reset() {
  set(NONE);
}

/** @param {Theme} chosen */
export function setTheme(chosen) {
  theme.value = chosen;
  localStorage.setItem(THEME, chosen);
  if (chosen === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = chosen;
}

/** The fields of a request that the settings ask for; a number that is out of its limits is left out. */
export function wishes() {
  /** @type {Record<string, number | string[]>} */
  const wishes = {};
  for (const [name, { min, max }] of Object.entries(LIMITS)) {
    const typed = settings.peek()[/** @type {keyof Settings} */ (name)];
    const number = Number(typed);
    if (typed.trim() && number >= min && number <= max) wishes[name] = number;
  }
  const stops = settings.peek().stop.split("\n").filter((line) => line.trim());
  if (stops.length) wishes.stop = stops.slice(0, MOST_STOPS);
  return wishes;
}

/** What every conversation begins with. @returns {{role: string, content: string}[]} */
export function preamble() {
  const system = settings.peek().system.trim();
  return system ? [{ role: "system", content: system }] : [];
}
