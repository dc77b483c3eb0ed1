// The time of a request as one bar, divided by stages.

import { element } from "./dom.js";

const STAGES = [
  ["decode", "reading the picture"],
  ["queue", "waiting for the device"],
  ["inference", "the network"],
  ["encode", "writing the answer"],
];

/** Show the stages of an answer, and what the network connection and the browser added to them. */
export function showTimings(place, timings, roundTrip) {
  const known = STAGES.map(([name, meaning]) => ({ name, meaning, ms: timings[name] ?? 0 }));
  const rest = Math.max(0, roundTrip - known.reduce((sum, { ms }) => sum + ms, 0));
  const stages = [...known, { name: "transfer", meaning: "the way there and back", ms: rest }];
  const words = stages.map(({ name, ms }) => `${name} ${millis(ms)}`).join(", ");
  const bar = element("div", { className: "bar", role: "img", ariaLabel: `Time by stage: ${words}` });
  const legend = element("ul", {}, element("li", { className: "total" }, `${millis(roundTrip)} in all`));
  for (const { name, meaning, ms } of stages) {
    const part = element("span", { className: name, title: `${name}, ${meaning}: ${millis(ms)}` });
    part.style.flexGrow = ms;
    bar.append(part);
    legend.append(element("li", { className: name, title: meaning }, `${name} `, element("b", {}, millis(ms))));
  }
  place.replaceChildren(bar, legend);
}

function millis(ms) {
  return ms < 9.95 ? `${ms.toFixed(1)} ms` : ms < 1000 ? `${ms.toFixed(0)} ms` : `${(ms / 1000).toFixed(1)} s`;
}
