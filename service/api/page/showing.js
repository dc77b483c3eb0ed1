// Shows an answer: the picture, the table, and everything that depends on the options and not on the server.

import { writeAddress } from "./address.js";
import { describePairs } from "./compare.js";
import { byId, element } from "./dom.js";
import { countLabels } from "./objects.js";
import { PictureView } from "./picture.js";
import { ObjectTable, swatch } from "./table.js";
import { showTaken } from "./taking.js";
import { showTimings } from "./timings.js";
import {
  chosenModel, chosenOperators, freeOperators, isShowing, nameOf, partnerOf, passes, server, showsBoxes, shownOf, state,
} from "./state.js";

// Below three changes a second, which is safe for everybody.
const BLINK_MILLISECONDS = 700;

let blinking = 0;

export const view = new PictureView(byId("picture"), {
  onPoint: (object) => highlight(object ?? state.pinned, { scroll: object !== null }),
  onPick: pin,
});

const table = new ObjectTable(byId("rows"), byId("head"), byId("body"), {
  onPoint: (object) => highlight(object ?? state.pinned),
  onPick: (object) => {
    pin(object);
    if (object) view.zoomTo(object.box);
  },
});

/** Show a picture of which nothing is known yet. */
export function showPicture(picture, bitmap) {
  Object.assign(state, { picture, a: null, b: null, pairs: null, current: null, pinned: null });
  state.options.example = picture.example ?? "";
  document.body.dataset.phase = "shown";
  document.body.classList.remove("answered");
  clearInterval(blinking);
  tell("");
  const [width, height] = picture.size;
  byId("view").hidden = false;
  byId("view").style.setProperty("--aspect", width / height);
  byId("picture").ariaLabel = picture.name;
  view.setPicture(bitmap, width, height);
}

/** Show a new answer, or two. */
export function showAnswer() {
  document.body.classList.add("answered");
  if (state.pairs) table.fillPairs(state.pairs, chosenOperators());
  else table.fill(state.a.objects);
  showTimings(byId("timings"), state.a.answer.timings_ms, state.a.roundTrip);
  showSides();
  render();
  tellCount();
}

/** Say something to everybody, also to those who listen to the page. */
export function tell(words) {
  byId("status").textContent = words;
}

/** Say how many objects are shown. */
export function tellCount() {
  if (!state.a) return;
  const count = shownOf("a").length;
  const all = state.a.objects.length;
  const limit = all === chosenModel().max_detections ? `; the model gives its best ${all} at most` : "";
  tell(`${counted(count)} above ${state.options.score.toFixed(2)}${limit}`);
}

function counted(count) {
  return count === 1 ? "1 object" : `${count} objects`;
}

/** Everything that depends on the options. */
export function render() {
  syncControls();
  writeAddress(state.options);
  if (!state.a) return;
  const rows = table.filter(passes);
  byId("no-rows").hidden = rows > 0;
  byId("objects-title").textContent = `Objects, ${rows} of ${(state.pairs ?? state.a.objects).length}`;
  showLabels();
  if (state.pairs) byId("comparison").textContent = describePairs(state.pairs, passes, chosenOperators());
  drawScene();
  showTaken();
}

function drawScene() {
  const { options, pairs } = state;
  const { opacity, masks, names } = options;
  const differing = isShowing("difference") ? pairs.map(onlyPassing).filter(({ a, b }) => a || b) : null;
  const objects = differing?.map(({ a, b }) => a ?? b) ?? shownOf(isShowing("b") ? "b" : "a");
  const current = partnerOf(state.current);
  const scene = { objects, current, opacity, masks, boxes: showsBoxes(), names, pairs: differing };
  byId("picture").ariaLabel = `${state.picture.name} with ${counted(objects.length)}`;
  view.setScene(scene);
}

function onlyPassing({ a, b }) {
  return { a: a && passes(a) ? a : null, b: b && passes(b) ? b : null };
}

// One object.

/** Highlight an object in the picture and in the table; null for none. */
export function highlight(object, { scroll = false } = {}) {
  if (object === state.current || !state.a) return;
  state.current = object;
  table.highlight(object, { scroll });
  byId("picture").classList.toggle("pointing", object !== null);
  drawScene();
}

/** Keep an object highlighted when the pointer leaves it; once more lets go. */
export function pin(object) {
  state.pinned = object === state.pinned ? null : object;
  highlight(state.pinned ?? object, { scroll: true });
}

/** Go to the nearest object in a direction, and say what it is. */
export function goTo(dx, dy) {
  const object = view.neighbour(dx, dy);
  if (!object) return;
  state.pinned = object;
  highlight(object, { scroll: true });
  tell(`${object.label}, score ${object.score.toFixed(2)}`);
}

// Labels.

function showLabels() {
  const counts = countLabels(state.a.objects, state.options.score);
  const { has_masks: hasMasks, labels } = chosenModel();
  const isByObject = hasMasks && labels.length === 1;
  const place = byId("labels");
  place.hidden = counts.length < 2;
  // Buttons that stay keep the focus.
  const old = new Map([...place.children].map((button) => [button.dataset.label, button]));
  const buttons = counts.map(({ label, id, count }) => {
    const button = old.get(label) ?? labelButton(label, isByObject ? null : id - 1);
    button.lastChild.textContent = ` ${count}`;
    button.ariaPressed = String(!state.hidden.has(label));
    return button;
  });
  if (buttons.length !== place.children.length || buttons.some((one, i) => one !== place.children[i])) {
    place.replaceChildren(...buttons);
  }
}

function labelButton(label, colour) {
  const button = element("button", { type: "button", dataset: { label } }, label, element("span", {}));
  if (colour !== null) button.prepend(swatch(colour));
  button.addEventListener("click", () => {
    if (!state.hidden.delete(label)) state.hidden.add(label);
    render();
    tellCount();
  });
  return button;
}

// The model and its operators.

/** Fill the controls that depend on the model. */
export function showModel() {
  const model = chosenModel();
  byId("model").replaceChildren(...state.models.map((one) => new Option(nameOf(one))));
  byId("model").disabled = false;
  const labels = model.labels.length === 1 ? "1 label" : `${model.labels.length} labels`;
  const facts = [model.architecture, model.backbone, labels, `${model.engine} ${model.precision}`, model.device];
  byId("model-facts").textContent = facts.join(" · ").replaceAll("_", " ");
  byId("own-score").replaceChildren(new Option("", String(model.score_thresh)));
  showOperators(model);
  render();
}

function showOperators(model) {
  const { options } = state;
  const free = freeOperators(model);
  if (!free.includes(options.roi_op) || options.roi_op === model.roi_op) options.roi_op = "";
  const used = options.roi_op || model.roi_op;
  if (!free.includes(options.compare) || options.compare === used) options.compare = "";
  const others = free.filter((name) => name !== model.roi_op);
  const partners = free.filter((name) => name !== used);
  byId("roi-op").replaceChildren(new Option(model.roi_op, ""), ...others.map((name) => new Option(name)));
  byId("compare").replaceChildren(new Option("nothing", ""), ...partners.map((name) => new Option(name)));
  for (const id of ["roi-op", "compare"]) byId(id).disabled = free.length === 0;
  byId("roi-note").textContent = operatorNote(model, free);
}

function operatorNote(model, free) {
  if (free.length && state.options.compare) {
    return "Both get the same proposals: the network up to the RPN knows nothing of the operator.";
  }
  if (free.length) return "";
  if (server.allowsRoiOp === "true") return `The heads of ${nameOf(model)} fit no other operator.`;
  return "To compare two, start the server with ROISERVE_ALLOW_ROI_OP_OVERRIDE=true.";
}

function syncControls() {
  const { options } = state;
  byId("model").value = options.model;
  byId("score").value = options.score ?? 0.5;
  byId("score-value").textContent = (options.score ?? 0.5).toFixed(2);
  byId("opacity").value = options.opacity;
  byId("opacity-value").textContent = `${Math.round(100 * options.opacity)} %`;
  byId("roi-op").value = options.roi_op;
  byId("compare").value = options.compare;
  byId("masks").checked = options.masks;
  byId("boxes").checked = showsBoxes();
  byId("names").checked = options.names ?? true;
  byId("masks").parentElement.hidden = !chosenModel()?.has_masks;
}

// Two operators at one place.

function showSides() {
  clearInterval(blinking);
  byId("sides").hidden = byId("comparison").hidden = state.b === null;
  if (!state.b) return;
  const isCalm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  const [nameA, nameB] = chosenOperators();
  const sides = [["a", nameA], ["b", nameB], ...(isCalm ? [] : [["blink", "Blink"]]), ["difference", "Difference"]];
  const isKnown = sides.some(([value]) => value === state.options.show);
  const chosen = isKnown ? state.options.show : "a";
  const choices = sides.map(([value, words]) => {
    const radio = element("input", { type: "radio", name: "side", value, checked: value === chosen });
    radio.addEventListener("change", () => showSide(value));
    return element("label", { className: `side-${value}` }, radio, element("span", {}, words));
  });
  byId("sides").replaceChildren(byId("sides").querySelector("legend"), ...choices);
  showSide(chosen);
}

function showSide(value) {
  clearInterval(blinking);
  state.options.show = value === "a" ? "" : value;
  if (value === "blink") blinking = setInterval(blink, BLINK_MILLISECONDS);
  byId("sides").dataset.side = value === "blink" ? state.blinkedSide : value;
  render();
}

function blink() {
  state.blinkedSide = state.blinkedSide === "a" ? "b" : "a";
  byId("sides").dataset.side = state.blinkedSide;
  drawScene();
}
