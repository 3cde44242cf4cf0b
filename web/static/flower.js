// The corolla: one petal for each layer of a model. A layer that nobody serves leaves its petal empty.
import { html } from "./html.js";

/** More petals than this blur into a ring; a petal then stands for several layers. */
const MOST_PETALS = 64;

/**
 * @param {{coverage: number[], label: string}} props coverage: how many peers hold each layer
 */
export function Flower({ coverage, label }) {
  const petals = petalsOf(coverage);
  const shape = petalShape(petals.length);
  return html`<svg class="flower" viewBox="-104 -104 208 208" role="img" aria-label=${label}>
    ${petals.map(
      (held, index) => html`<g transform="rotate(${(360 * (index + 0.5)) / petals.length})">
        <path
          class=${held ? "petal" : "petal empty"}
          style=${{ "--depth": depth(index, petals.length), "--turn": index / petals.length }}
          d=${shape}
        />
      </g>`,
    )}
    <circle class="heart" r="17" />
    ${stamens().map(([x, y]) => html`<circle class="stamen" cx=${x} cy=${y} r="1.7" />`)}
  </svg>`;
}

/** The small flower of the header. */
export function Logo() {
  return html`<svg class="logo" viewBox="-50 -50 100 100" aria-hidden="true">
    ${[0, 1, 2, 3, 4, 5].map(
      (index) =>
        html`<path
          class="petal"
          style=${{ "--depth": depth(index, 6) }}
          transform="rotate(${index * 60})"
          d="M0-9C-17-20-15-43 0-48 15-43 17-20 0-9Z"
        />`,
    )}
    <circle class="heart" r="8" />
  </svg>`;
}

/**
 * How far into the model a layer is, from 0 to 100: what its colour says everywhere on the page.
 * @param {number} index
 * @param {number} count
 */
export function depth(index, count) {
  return count > 1 ? (100 * index) / (count - 1) : 0;
}

/** @param {number[]} coverage */
function petalsOf(coverage) {
  const each = Math.ceil(coverage.length / MOST_PETALS);
  const count = Math.ceil(coverage.length / each);
  return Array.from({ length: count }, (_, index) =>
    coverage.slice(index * each, (index + 1) * each).every((peers) => peers > 0),
  );
}

/** Wide enough that neighbours overlap a little; round when there are few, pointed when there are many. */
function petalShape(/** @type {number} */ count) {
  const half = Math.min(46, 330 / count);
  const shoulder = -98 + 22 * Math.min(1, Math.max(0, (count - 8) / 12));
  return `M0-14C${-half * 1.2}-38 ${-half * 1.15} ${shoulder} 0-100 ${half * 1.15} ${shoulder} ${half * 1.2}-38 0-14Z`;
}

function stamens() {
  return Array.from({ length: 9 }, (_, index) => {
    const angle = (2 * Math.PI * index) / 9;
    return [10.5 * Math.cos(angle), 10.5 * Math.sin(angle)];
  });
}
