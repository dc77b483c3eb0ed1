// Requests to the server, and its errors as `Problem`. Waits and tries again when the server asks for that.

const KEY = "roiserve-key";
const MOST_TRIES = 8;
// Every address is relative to the page's, so that the page works under whatever path a proxy publishes it.
const ROOT = new URL(".", document.baseURI);

/** What went wrong, as the server's problem document says it; status 0 if there was no answer. */
export class Problem extends Error {
  constructor({ status, code, title = "", detail = "", stage, request_id }) {
    super(detail || title);
    Object.assign(this, { status, code, title, detail, stage, requestId: request_id });
  }
}

let memory = null;  // where a browser forbids sessionStorage

/** Keep a key until the tab is closed; null forgets it. */
export function setKey(key) {
  memory = key;
  try {
    if (key === null) sessionStorage.removeItem(KEY);
    else sessionStorage.setItem(KEY, key);
  } catch {
    // Kept in memory then.
  }
}

function getKey() {
  try {
    return sessionStorage.getItem(KEY) ?? memory;
  } catch {
    return memory;
  }
}

/** The full address of a path of this server, with options. */
export function addressOf(path, options = []) {
  const url = new URL(path, ROOT);
  url.search = new URLSearchParams(options).toString();
  return url.href;
}

/** The loaded models. */
export async function listModels(wait) {
  return (await jsonOf(await ask("v1/models", [], {}, wait))).models;
}

/** Find the objects in an encoded picture. Returns the answer and the milliseconds from sending to having it. */
export async function detect(blob, options, wait) {
  let sentAt = 0;
  const response = await ask("v1/detect", options, post(blob), wait, () => {
    sentAt = performance.now();
  });
  const answer = await jsonOf(response);
  return { answer, roundTrip: performance.now() - sentAt };
}

/** A picture as the server reads it, with nothing drawn into it: no score is above 1. */
export async function readPicture(blob, model, wait) {
  const options = [["model", model], ["score_thresh", "1"], ["format", "png"]];
  return (await ask("v1/annotate", options, post(blob), wait)).blob();
}

/** The server goes by the bytes, but refuses bodies that call themselves something else than pictures. */
function post(blob) {
  const type = blob.type.startsWith("image/") ? blob.type : "application/octet-stream";
  return { method: "POST", body: blob, headers: { "Content-Type": type } };
}

/** A file of the page. */
export async function fetchFile(path) {
  const response = await send(addressOf(path), { headers: {} });
  if (!response.ok) throw await problemOf(response);
  return response.blob();
}

async function ask(path, options, init, { signal, onWait }, onSend = () => {}) {
  for (let tries = 1; ; tries++) {
    const key = getKey();
    const headers = { ...init.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
    onSend();
    const response = await send(addressOf(path, options), { ...init, headers, signal });
    if (response.ok) return response;
    const problem = await problemOf(response);
    const seconds = Number(response.headers.get("Retry-After"));
    const isTemporary = response.status === 429 || (response.status === 503 && problem.code === "not_ready");
    if (!isTemporary || !(seconds > 0) || tries >= MOST_TRIES) throw problem;
    await pause(seconds, problem, signal, onWait);
  }
}

async function send(url, init) {
  try {
    return await fetch(url, init);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    // A header cannot hold every character that somebody may type.
    const isSendable = !/[^\x20-\x7e]/.test(init.headers.Authorization ?? "");
    throw new Problem(isSendable ? { status: 0, code: "no_answer" } : { status: 403, code: "key_not_allowed" });
  }
}

/** The document of an answer, which may be something else's, such as a network's login page, or break off. */
async function jsonOf(response) {
  try {
    return await response.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    const isComplete = error instanceof SyntaxError;
    throw new Problem(isComplete ? { status: response.status, code: "not_ours" } : { status: 0, code: "no_answer" });
  }
}

async function problemOf(response) {
  const requestId = response.headers.get("X-Request-ID") ?? undefined;
  try {
    return new Problem({ request_id: requestId, ...(await response.json()), status: response.status });
  } catch {
    return new Problem({ status: response.status, code: "not_ours", request_id: requestId });
  }
}

/** Count down; reject as soon as the signal says stop. */
function pause(seconds, problem, signal, onWait) {
  return new Promise((resolve, reject) => {
    let left = Math.ceil(seconds);
    const stop = () => {
      clearInterval(timer);
      reject(signal.reason);
    };
    const timer = setInterval(() => {
      left -= 1;
      if (left > 0) return onWait(problem, left);
      clearInterval(timer);
      signal.removeEventListener("abort", stop);
      onWait(problem, 0);
      return resolve();
    }, 1000);
    signal.addEventListener("abort", stop, { once: true });
    onWait(problem, left);
  });
}
