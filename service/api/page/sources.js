// Where pictures come from: a file, a drop, the clipboard, the camera, or an example. Also copies of them that a server
// may like better.

import { fetchFile } from "./api.js";
import { byId } from "./dom.js";

const MOST_SHOWN_PIXELS = 16_000_000;

/** Call onPicture({blob, name, example}) for every picture that a person brings; onProblem(words) if that fails. */
export function watchSources({ onPicture, onProblem }) {
  const file = byId("file");
  byId("choose").addEventListener("click", () => file.click());
  file.addEventListener("change", () => {
    if (file.files[0]) onPicture(named(file.files[0]));
    file.value = "";  // so that the same file can be chosen again
  });
  watchDrops(onPicture, onProblem);
  document.addEventListener("paste", (event) => {
    const pasted = [...event.clipboardData.files][0];
    if (pasted) onPicture(named(pasted));
  });
  watchCamera(onPicture, onProblem);
}

function watchDrops(onPicture, onProblem) {
  let depth = 0;  // enter and leave come for every element under the pointer
  const mark = (change) => {
    depth = Math.max(0, depth + change);
    document.body.classList.toggle("dropping", depth > 0);
  };
  document.addEventListener("dragenter", () => mark(1));
  document.addEventListener("dragleave", () => mark(-1));
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    mark(-Infinity);
    const [dropped] = event.dataTransfer.files;
    if (dropped) onPicture(named(dropped));
    else onProblem("That was not a file", "Drop a picture from a folder; addresses of other sites are never fetched.");
  });
}

function watchCamera(onPicture, onProblem) {
  const [dialog, video, shoot] = ["camera-dialog", "video", "shoot"].map(byId);
  // Browsers lend their camera only to pages of this computer or with HTTPS.
  byId("camera").hidden = !navigator.mediaDevices?.getUserMedia;
  byId("camera").addEventListener("click", async () => {
    shoot.disabled = true;  // a camera may take seconds to give its first picture
    try {
      video.srcObject = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
      dialog.showModal();
    } catch {
      onProblem("There is no picture from a camera", "None is connected, or the browser was not allowed to use it.");
    }
  });
  video.addEventListener("loadeddata", () => {
    shoot.disabled = false;
    shoot.focus();
  });
  shoot.addEventListener("click", async () => {
    const blob = await encode(video, video.videoWidth, video.videoHeight, "image/jpeg");
    dialog.close();
    onPicture({ blob, name: "camera.jpg" });
  });
  byId("camera-cancel").addEventListener("click", () => dialog.close());
  dialog.addEventListener("close", () => {
    for (const track of video.srcObject?.getTracks() ?? []) track.stop();
    video.srcObject = null;
  });
}

function named(file) {
  return { blob: file, name: file.name || "picture.png" };
}

/** One of the pictures that come with the page. */
export async function fetchExample(name) {
  return { blob: await fetchFile(`page/${name}`), name, example: name };
}

/** The picture as the browser reads it, upright; null if it cannot. */
export async function decode(blob) {
  try {
    return await createImageBitmap(blob);
  } catch {
    return null;
  }
}

/** The same with fewer pixels if there are very many, which would make every redraw slow. */
export async function reduced(bitmap) {
  const scale = Math.sqrt(MOST_SHOWN_PIXELS / (bitmap.width * bitmap.height));
  if (scale >= 1) return bitmap;
  const smaller = await createImageBitmap(bitmap, {
    resizeWidth: Math.max(1, Math.round(scale * bitmap.width)),
    resizeHeight: Math.max(1, Math.round(scale * bitmap.height)),
    resizeQuality: "high",
  });
  bitmap.close();
  return smaller;
}

/** A copy whose longer side has at most so many pixels, as JPEG or PNG. */
export async function copyOf({ blob, name }, longestSide, type) {
  const bitmap = await decode(blob);
  if (!bitmap) return null;
  const scale = Math.min(1, longestSide / Math.max(bitmap.width, bitmap.height));
  const size = [bitmap.width, bitmap.height].map((side) => Math.max(1, Math.round(scale * side)));
  const copy = await encode(bitmap, ...size, type);
  bitmap.close();
  return { blob: copy, size, name: `${name.replace(/\.[^.]*$/, "")}.${type === "image/png" ? "png" : "jpg"}` };
}

function encode(source, width, height, type) {
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  const context = canvas.getContext("2d");
  context.fillStyle = "white";
  context.fillRect(0, 0, width, height);
  context.drawImage(source, 0, 0, width, height);
  return new Promise((resolve) => canvas.toBlob(resolve, type, 0.92));
}
