// The page at /: finds the objects in a picture, and shows them. This module connects the controls.

import { readAddress } from "./address.js";
import { askAgain, begin, open, openExample } from "./asking.js";
import { byId } from "./dom.js";
import { hideNotice, showNotice } from "./notice.js";
import { goTo, pin, render, showModel, tell, tellCount, view } from "./showing.js";
import { watchSources } from "./sources.js";
import { chooseModel, nameOf, state } from "./state.js";
import { copyTaken, downloadTaken, showTaken } from "./taking.js";

const ZOOM = 1.5;

/** On the picture. */
const KEYS = {
  ArrowLeft: () => goTo(-1, 0),
  ArrowRight: () => goTo(1, 0),
  ArrowUp: () => goTo(0, -1),
  ArrowDown: () => goTo(0, 1),
  Enter: () => state.current && view.zoomTo(state.current.box),
  Escape: () => pin(null),
  "+": () => view.zoom(ZOOM),
  "=": () => view.zoom(ZOOM),
  "-": () => view.zoom(1 / ZOOM),
  0: () => view.zoomOut(),
};

function connect() {
  onInput("score", ({ value }) => (state.options.score = Number(value)));
  onInput("opacity", ({ value }) => (state.options.opacity = Number(value)));
  for (const name of ["masks", "boxes", "names"]) onInput(name, ({ checked }) => (state.options[name] = checked));
  on("score", "change", tellCount);  // not at every step of the slider
  on("model", "change", ({ value }) => {
    chooseModel(state.models.find((one) => nameOf(one) === value));
    showModel();
    askAgain();
  });
  for (const [id, name] of [["roi-op", "roi_op"], ["compare", "compare"]]) {
    on(id, "change", ({ value }) => {
      state.options[name] = value;
      showModel();
      askAgain();
    });
  }
  on("forms", "change", showTaken);
  on("copy", "click", async () => {
    await copyTaken();
    tell("Copied");
  });
  on("download", "click", downloadTaken);
  on("zoom-in", "click", () => view.zoom(ZOOM));
  on("zoom-out", "click", () => view.zoom(1 / ZOOM));
  on("zoom-all", "click", () => view.zoomOut());
  on("key-cancel", "click", () => byId("key-dialog").close());
  byId("picture").addEventListener("keydown", steer);
  for (const button of document.querySelectorAll("[data-example]")) {
    button.addEventListener("click", () => openExample(button.dataset.example));
  }
  watchSources({
    onPicture: open,
    onProblem: (title, text) => showNotice({ title, text, actions: [["Close", hideNotice]] }),
  });
  window.addEventListener("hashchange", follow);
}

function on(id, event, act) {
  byId(id).addEventListener(event, () => act(byId(id)));
}

function onInput(id, act) {
  on(id, "input", (control) => {
    act(control);
    render();
  });
}

function steer(event) {
  if (!state.a || !(event.key in KEYS) || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  KEYS[event.key]();
}

/** Somebody changed the address by hand. */
function follow() {
  const { example } = state.options;
  state.options = readAddress();
  if (state.options.example === example && state.picture) askAgain();
  else begin();
}

connect();
begin();
