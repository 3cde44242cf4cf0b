// An address as a QR code, drawn as one path. Fetches its library when the first code is shown.
import { useEffect, useState } from "preact/hooks";
import { html } from "./html.js";

/** Light modules around the code, as the standard asks. */
const QUIET = 4;

/** @param {{content: string, label: string}} props */
export function QrCode({ content, label }) {
  const [drawn, setDrawn] = useState(/** @type {{size: number, d: string} | null} */ (null));
  useEffect(() => {
    draw(content).then(setDrawn, (error) => console.error(error)); // the link beside it says the same
  }, [content]);
  if (!drawn) return null;
  const all = drawn.size + 2 * QUIET;
  return html`<svg class="qr" viewBox="${-QUIET} ${-QUIET} ${all} ${all}" role="img" aria-label=${label} shape-rendering="crispEdges">
    <path d=${drawn.d} />
  </svg>`;
}

/** @param {string} content */
async function draw(content) {
  const { default: qrcode } = await import("qrcode-generator");
  const code = qrcode(0, "M"); // 0: as small as the content allows
  code.addData(content);
  code.make();
  const size = code.getModuleCount();
  let d = "";
  for (let row = 0; row < size; row++) {
    for (let column = 0; column < size; column++) if (code.isDark(row, column)) d += `M${column} ${row}h1v1h-1z`;
  }
  return { size, d };
}
