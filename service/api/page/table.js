// The objects as a table: one stop for Tab, arrow keys from row to row, the same highlight as in the picture.

import { colourOf } from "./colours.js";
import { element } from "./dom.js";

const STEPS = { ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10, Home: -Infinity, End: Infinity };

export class ObjectTable {
  #rows = [];      // {row, objects: those that it stands for}
  #shown = [];

  /** onPoint(object or null): pointer or focus is on another row; onPick(object): a row was clicked, or Enter. */
  constructor(container, head, body, { onPoint, onPick }) {
    Object.assign(this, { container, head, body });
    const objectOf = (event) => this.#shown.find(({ row }) => row === event.target.closest("tr"))?.objects[0] ?? null;
    body.addEventListener("pointerover", (event) => onPoint(objectOf(event)));
    body.addEventListener("pointerleave", () => onPoint(null));
    body.addEventListener("focusin", (event) => onPoint(objectOf(event)));
    body.addEventListener("focusout", () => onPoint(null));
    body.addEventListener("click", (event) => onPick(objectOf(event)));
    body.addEventListener("keydown", (event) => {
      if (event.key === "Enter") onPick(objectOf(event));
      else if (event.key in STEPS) this.#step(event);
    });
  }

  /** Fill it with the objects of one answer. */
  fill(objects) {
    const measure = objects.some((one) => one.spans) ? "Area, px" : "Size, px";
    this.#setHead(["Label", "Score", measure]);
    this.#setRows(objects.map((one) => [[one], [nameCell(one), scoreCell(one), numberCell(measureOf(one))]]));
  }

  /** Fill it with pairs of objects that two operators found. */
  fillPairs(pairs, names) {
    this.#setHead(["Label", ...names, "Shift, px"]);
    this.#setRows(
      pairs.map(({ a, b, shift }) => [
        [a, b].filter(Boolean),
        [nameCell(a ?? b), ...[a, b].map((one) => numberCell(one ? one.score.toFixed(3) : "–")),
          numberCell(shift === null ? "–" : shift.toFixed(2))],
      ]),
    );
  }

  /** Show the rows of which some object passes. */
  filter(passes) {
    this.#shown = [];
    for (const entry of this.#rows) {
      entry.row.hidden = !entry.objects.some(passes);
      if (!entry.row.hidden) this.#shown.push(entry);
    }
    this.#makeOneStop(this.#shown.find(({ row }) => row.tabIndex === 0) ?? this.#shown[0]);
    return this.#shown.length;
  }

  /** Highlight the row of an object; scroll the table, never the page, until it can be seen. */
  highlight(object, { scroll = false } = {}) {
    for (const { row, objects } of this.#rows) {
      const isCurrent = object !== null && objects.includes(object);
      if (row.ariaSelected !== String(isCurrent)) row.ariaSelected = String(isCurrent);
      if (isCurrent && scroll) this.#scrollTo(row);
    }
  }

  #setHead(titles) {
    const cells = titles.map((title, i) => element("th", { scope: "col", className: i ? "number" : "" }, title));
    this.head.replaceChildren(element("tr", {}, ...cells));
  }

  #setRows(entries) {
    this.#rows = entries.map(([objects, cells]) => {
      const row = element("tr", { tabIndex: -1, ariaSelected: "false" }, ...cells);
      return { row, objects };
    });
    this.body.replaceChildren(...this.#rows.map(({ row }) => row));
    this.container.scrollTop = 0;
  }

  #step(event) {
    const at = this.#shown.findIndex(({ row }) => row === event.target);
    const next = Math.max(0, Math.min(this.#shown.length - 1, at + STEPS[event.key]));
    event.preventDefault();
    this.#makeOneStop(this.#shown[next]);
    this.#shown[next].row.focus();
  }

  #makeOneStop(entry) {
    for (const { row } of this.#rows) if (row.tabIndex === 0) row.tabIndex = -1;
    if (entry) entry.row.tabIndex = 0;
  }

  #scrollTo(row) {
    const { scrollTop, clientHeight } = this.container;
    const margin = this.head.offsetHeight;
    if (row.offsetTop - margin < scrollTop) this.container.scrollTop = row.offsetTop - margin;
    else if (row.offsetTop + row.offsetHeight > scrollTop + clientHeight) {
      this.container.scrollTop = row.offsetTop + row.offsetHeight - clientHeight;
    }
  }
}

function nameCell(object) {
  return element("td", {}, swatch(object.colour), object.label);
}

/** A square in an object's colour. */
export function swatch(colour) {
  const square = element("span", { className: "swatch" });
  square.style.background = colourOf(colour);
  return square;
}

function scoreCell({ score }) {
  const bar = element("span", { className: "score" });
  bar.style.setProperty("--score", score);
  return element("td", { className: "number" }, bar, score.toFixed(3));
}

function numberCell(text) {
  return element("td", { className: "number" }, text);
}

function measureOf({ spans, area, box: [x1, y1, x2, y2] }) {
  return spans ? area.toLocaleString("en") : `${Math.round(x2 - x1)} × ${Math.round(y2 - y1)}`;
}
