// Colours for code. A language's grammar is fetched when it is first met; an unknown language stays plain.
import DOMPurify from "dompurify";

/** Names that models write, and the file of each grammar in vendor/highlight/. */
const GRAMMARS = {
  bash: "bash sh zsh",
  c: "c h",
  cpp: "cpp c++ cc hpp",
  csharp: "csharp cs c#",
  css: "css",
  diff: "diff patch",
  dockerfile: "dockerfile docker",
  go: "go golang",
  ini: "ini toml",
  java: "java",
  javascript: "javascript js jsx mjs",
  json: "json jsonc",
  kotlin: "kotlin kt",
  lua: "lua",
  makefile: "makefile make",
  markdown: "markdown md",
  php: "php",
  python: "python py python3",
  r: "r",
  ruby: "ruby rb",
  rust: "rust rs",
  shell: "shell console",
  sql: "sql",
  swift: "swift",
  typescript: "typescript ts tsx",
  xml: "xml html svg",
  yaml: "yaml yml",
};

const FILES = new Map(
  Object.entries(GRAMMARS).flatMap(([file, names]) => names.split(" ").map((name) => [name, file])),
);

/** Longer code stays plain: colouring it would hold up the page. */
const MOST_CHARACTERS = 50_000;

/**
 * Colour a block of code in place, some time soon.
 * @param {HTMLElement} code
 * @param {string} language
 */
export async function highlight(code, language) {
  const file = FILES.get(language.toLowerCase());
  const source = code.textContent ?? "";
  if (!file || source.length > MOST_CHARACTERS) return;
  const [{ default: core }, { default: grammar }] = await Promise.all([
    // @ts-ignore - the import map of index.html says where this is
    import("highlight.js/core.js"),
    import(`highlight.js/${file}.js`),
  ]);
  if (!core.getLanguage(file)) core.registerLanguage(file, grammar);
  const markup = core.highlight(source, { language: file, ignoreIllegals: true }).value;
  const coloured = DOMPurify.sanitize(markup, {
    ALLOWED_TAGS: ["span"],
    ALLOWED_ATTR: ["class"],
    RETURN_DOM_FRAGMENT: true,
  });
  code.replaceChildren(/** @type {Node} */ (/** @type {unknown} */ (coloured)));
}
