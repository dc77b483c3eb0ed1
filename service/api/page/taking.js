// What people take with them: the request for other programs, and the answer as they see it.

import { addressOf } from "./api.js";
import { byId } from "./dom.js";
import { cocoOf, copyText, curlOf, download, jsonOf, pythonOf } from "./snippets.js";
import { chosenModel, nameOf, server, shownOf, state } from "./state.js";

const MOST_SHOWN = 4000;  // characters

/** Show the text in the chosen form. */
export function showTaken() {
  if (!state.a) return;
  const { text } = taken();
  byId("snippet").textContent = text.length > MOST_SHOWN ? `${text.slice(0, MOST_SHOWN)}…` : text;
}

/** Put it on the clipboard, all of it. */
export function copyTaken() {
  return copyText(taken().text, byId("snippet"));
}

/** Save it as a file. */
export function downloadTaken() {
  const { text, fileName } = taken();
  download(text, fileName);
}

function taken() {
  const form = document.querySelector("[name=form]:checked").value;
  const objects = shownOf("a");
  const arguments_ = [requestUrl(objects), state.picture.name, server.needsKey === "true"];
  if (form === "curl") return { text: curlOf(...arguments_), fileName: "detect.sh" };
  if (form === "python") return { text: pythonOf(...arguments_), fileName: "detect.py" };
  if (form === "json") return { text: jsonOf(state.a.answer, objects), fileName: "detections.json" };
  return { text: cocoOf(objects), fileName: "coco-results.json" };
}

/** Of a request whose answer is what is shown, filters included. */
function requestUrl(objects) {
  const { options, hidden } = state;
  const model = chosenModel();
  const asked = [["model", nameOf(model)], ["score_thresh", String(options.score)]];
  if (options.roi_op) asked.push(["roi_op", options.roi_op]);
  if (hidden.size) asked.push(...[...new Set(objects.map((one) => one.label))].map((label) => ["labels", label]));
  return addressOf("v1/detect", asked);
}
