// What the page knows at the moment, and questions that several modules ask about it.

import { readAddress } from "./address.js";
import { isShown, shownObjects } from "./objects.js";

/** What the server says about itself in the page: needsKey, allowsRoiOp, maxBodyBytes, maxImagePixels; as text. */
export const server = document.body.dataset;

export const state = {
  options: readAddress(),
  models: [],
  picture: null,      // {blob, name, example}
  a: null,            // {answer, objects, roundTrip} with the first operator
  b: null,            // with the second, if two are compared
  pairs: null,        // their objects, paired
  hidden: new Set(),  // labels
  current: null,      // the highlighted object, of a or b
  pinned: null,       // the one that stays so when the pointer leaves
  blinkedSide: "a",   // which of two is shown while blinking
};

/** Its name; with the version if another has the same name. */
export function nameOf(model) {
  const isAlone = state.models.filter((one) => one.name === model.name).length === 1;
  return isAlone ? model.name : `${model.name}@${model.version}`;
}

/** The chosen model; undefined until the models are known. */
export function chosenModel() {
  return state.models.find((one) => nameOf(one) === state.options.model);
}

/** Choose a model, and forget what belonged to another one. */
export function chooseModel(model) {
  Object.assign(state.options, { model: nameOf(model), score: null, roi_op: "", compare: "", show: "" });
}

/** The RoI operators that the page may ask this model for, its own included; empty if it has no choice. */
export function freeOperators(model) {
  return server.allowsRoiOp === "true" && model.roi_ops.length > 1 ? model.roi_ops : [];
}

/** The operator that is used, and the one that it is compared with, or "". */
export function chosenOperators() {
  return [state.options.roi_op || chosenModel().roi_op, state.options.compare];
}

/** Whether a, b or the difference is on the screen. */
export function isShowing(side) {
  const { show } = state.options;
  return (state.b === null ? "a" : show === "blink" ? state.blinkedSide : show || "a") === side;
}

/** Whether an object passes the filters. */
export function passes(object) {
  return isShown(object, state.options.score, state.hidden);
}

/** The objects of one side that pass the filters. */
export function shownOf(side) {
  return shownObjects(state[side].objects, state.options.score, state.hidden);
}

/** The same object in the answer that is on the screen, of two that are compared. */
export function partnerOf(object) {
  if (!object || !state.pairs || isShowing("difference")) return object;
  const pair = state.pairs.find(({ a, b }) => a === object || b === object);
  return isShowing("b") ? pair?.b : pair?.a;
}

/** Whether boxes are drawn: by default only if there are no masks, which show the same and more. */
export function showsBoxes() {
  return state.options.boxes ?? !chosenModel()?.has_masks;
}
