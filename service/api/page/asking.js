// Brings a picture to the server, once for each RoI operator, and deals with whatever comes back instead of an answer.

import { detect, listModels, Problem, readPicture, setKey } from "./api.js";
import { pairObjects } from "./compare.js";
import { byId } from "./dom.js";
import { hideNotice, showNotice, showWaiting } from "./notice.js";
import { objectsOf } from "./objects.js";
import { explain } from "./problems.js";
import { showAnswer, showModel, showPicture } from "./showing.js";
import { copyOf, decode, fetchExample, reduced } from "./sources.js";
import { chooseModel, chosenModel, nameOf, state, server } from "./state.js";

// Asked for once; the slider for the score begins here.
const LEAST_SCORE = 0.05;
// A model that keeps nearly everything by itself, as torchvision's do, would cover the picture.
const USUAL_SCORE = 0.5;
// For copies of pictures that are too large. Networks see them smaller still.
const COPY_PIXELS = 2048;
const LEAST_COPY_PIXELS = 256;

let running = null;  // of the requests under way, to stop them
let brought = null;  // the last picture that somebody brought, shown or not

/** Load the models, and open the example that the address names. */
export function begin() {
  const { example, model } = state.options;
  if (example) return openExample(example, { prefersItsModel: model === "" });
  return perform((wait) => loadModels(wait));
}

/** Show a picture, {blob, name}, and ask what is in it. */
export function open(picture) {
  return perform((wait) => look(picture, wait));
}

/** Open one of our pictures, with the model that was trained for its like if that is loaded. */
export function openExample(name, { prefersItsModel = true } = {}) {
  const button = document.querySelector(`[data-example="${CSS.escape(name)}"]`);
  if (!button) return perform((wait) => loadModels(wait));
  return perform(async (wait) => {
    const picture = await fetchExample(name);
    const wanted = prefersItsModel ? button.dataset.model : undefined;
    await loadModels(wait, wanted);
    const fitting = state.models.find((one) => one.name === wanted);
    if (fitting && fitting !== chosenModel()) chooseModel(fitting);
    await look(picture, wait);
  });
}

/** Ask again about the same picture, with other options. */
export function askAgain() {
  return perform(async (wait) => {
    await loadModels(wait);
    if (state.picture) await ask(state.picture, wait);
  });
}

/** What to send: the model, the score and, if it is not the model's own, the operator. */
export function requestOptions(operator, score) {
  const model = chosenModel();
  const options = [["model", nameOf(model)], ["score_thresh", String(score)]];
  return operator && operator !== model.roi_op ? [...options, ["roi_op", operator]] : options;
}

/** Do something that asks the server, in place of what is under way; show its errors, and offer to do it again. */
async function perform(task) {
  stop();
  const own = (running = new AbortController());
  const wait = { signal: own.signal, onWait: (problem, left) => showWaiting(explain(problem).title, left, stop) };
  byId("progress").hidden = false;
  try {
    await task(wait);
    if (running === own) hideNotice();
  } catch (error) {
    if (running !== own) return;
    showProblem(error, () => perform(task));
    if (!(error instanceof Problem)) throw error;
  } finally {
    if (running === own) byId("progress").hidden = true;
  }
}

function stop() {
  running?.abort(new DOMException("", "AbortError"));
  running = null;
  hideNotice();
  byId("progress").hidden = true;
}

/** wanted: the name of the model to choose unless one is chosen already; without it, the server's default. */
async function loadModels(wait, wanted) {
  if (state.models.length === 0) state.models = await listModels(wait);
  const { models, options } = state;
  const byDefault = models.find((one) => one.name === wanted) ?? models.find((one) => one.default);
  if (!chosenModel()) options.model = nameOf(byDefault);
  showModel();
}

/** What cannot be shown leaves the picture before it where it is, with its objects. */
async function look(picture, wait) {
  brought = picture;
  if (picture.blob.size === 0) throw new Problem({ status: 0, code: "empty_file" });
  requireSendable(picture.blob.size, Number(server.maxBodyBytes), "bytes");
  const bitmap = await decode(picture.blob);
  if (bitmap) {
    picture.size = [bitmap.width, bitmap.height];
    const shown = await reduced(bitmap);
    wait.signal.throwIfAborted();
    showPicture(picture, shown);
    requireSendable(picture.size[0] * picture.size[1], Number(server.maxImagePixels), "pixels");
  }
  await loadModels(wait);
  await ask(picture, wait);
}

function requireSendable(amount, most, unit) {
  if (amount <= most) return;
  const detail = `It has ${amount.toLocaleString("en")} ${unit}; this server takes ${most.toLocaleString("en")}.`;
  throw new Problem({ status: 413, code: "too_large", detail });
}

async function ask(picture, wait) {
  const { options } = state;
  const model = chosenModel();
  const first = await askWith(picture, options.roi_op, wait);
  await makePictureFit(picture, first.answer.image, wait);
  options.score ??= model.score_thresh > LEAST_SCORE ? model.score_thresh : USUAL_SCORE;
  const hidden = new Set([...state.hidden].filter((label) => model.labels.includes(label)));
  Object.assign(state, { a: first, b: null, pairs: null, current: null, pinned: null, hidden });
  showAnswer();
  if (!options.compare) return;
  const second = await askWith(picture, options.compare, wait);
  Object.assign(state, { b: second, pairs: pairObjects(first.objects, second.objects), current: null, pinned: null });
  showAnswer();
}

async function askWith({ blob }, operator, wait) {
  const { answer, roundTrip } = await detect(blob, requestOptions(operator, LEAST_SCORE), wait);
  wait.signal.throwIfAborted();
  return { answer, roundTrip, objects: objectsOf(answer, chosenModel()) };
}

/** A browser that cannot show the picture, or reads its orientation otherwise, gets it from the server. */
async function makePictureFit(picture, { width, height }, wait) {
  if (picture.size?.[0] === width && picture.size[1] === height) return;
  const bitmap = await decode(await readPicture(picture.blob, nameOf(chosenModel()), wait));
  const shown = await reduced(bitmap);
  wait.signal.throwIfAborted();
  picture.size = [width, height];
  showPicture(picture, shown);
}

// Problems.

function showProblem(error, again) {
  const mistake = { code: "page_error", title: "The page made a mistake", detail: String(error) };
  const problem = error instanceof Problem ? error : new Problem(mistake);
  const words = explain(problem);
  const actions = {
    again: [["Try again", again]],
    key: [["Enter a key", () => askForKey(words, again)]],
    smaller: [["Send a smaller copy", () => sendCopy(COPY_PIXELS, "image/jpeg")]],
    convert: [["Convert it here and send that", () => sendCopy(Infinity, "image/png")]],
  };
  showNotice({ ...words, actions: [...(actions[words.action] ?? []), ["Close", hideNotice]] });
  if (problem.code === "missing_key") askForKey(words, again);
}

async function sendCopy(longestSide, type) {
  const copy = await copyOf(brought, longestSide, type);
  if (copy && longestSide > LEAST_COPY_PIXELS && !fits(copy)) {
    await sendCopy(Math.min(longestSide, COPY_PIXELS) / 2, type);
    return;
  }
  if (copy) {
    await open(copy);
    return;
  }
  const title = "This browser cannot read the picture either";
  showNotice({ title, text: "Save it as JPEG or PNG with another program.", actions: [["Close", hideNotice]] });
}

function fits({ blob, size: [width, height] }) {
  return blob.size <= Number(server.maxBodyBytes) && width * height <= Number(server.maxImagePixels);
}

function askForKey({ title, text }, again) {
  const [dialog, field] = [byId("key-dialog"), byId("key")];
  byId("key-title").textContent = title;
  byId("key-why").textContent = text;
  field.value = "";
  byId("key-form").onsubmit = () => {
    setKey(field.value.trim());
    again();
  };
  if (!dialog.open) dialog.showModal();
}
