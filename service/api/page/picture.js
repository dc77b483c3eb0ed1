// The picture with its objects, on one canvas: drawing, zooming, and finding the object under the pointer.

import { colourOf } from "./colours.js";
import { HitMap } from "./hits.js";

const MOST_ZOOM = 40;      // screen pixels for one of the picture
const SHARP_FROM = 5;      // from here on, pixels are shown as squares
const CAPTION_SHARE = 0.08; // captions that cover more of the picture would hide it
const TAP_PIXELS = 4;      // a pointer that moves less was not dragged
const ONLY_A = "rgb(70 165 255 / 0.85)";
const ONLY_B = "rgb(255 150 40 / 0.85)";

export class PictureView {
  #bitmap = null;
  #size = [1, 1];                       // width, height of the picture
  #scene = null;
  #hits = null;
  #view = { scale: 1, x: 0, y: 0 };     // screen = picture * scale + (x, y), in CSS pixels
  #isWhole = true;
  #pointers = new Map();
  #moved = 0;
  #frame = 0;

  /** onPoint(object or null): the pointer is over another object; onPick(object or null): it was clicked. */
  constructor(canvas, { onPoint, onPick }) {
    this.canvas = canvas;
    this.onPoint = onPoint;
    this.onPick = onPick;
    new ResizeObserver(() => this.#resize()).observe(canvas.parentElement);
    canvas.addEventListener("pointerdown", (event) => this.#press(event));
    canvas.addEventListener("pointermove", (event) => this.#move(event));
    canvas.addEventListener("pointerup", (event) => this.#release(event));
    canvas.addEventListener("pointercancel", (event) => this.#pointers.delete(event.pointerId));
    canvas.addEventListener("pointerleave", () => this.onPoint(null));
    canvas.addEventListener("wheel", (event) => this.#wheel(event), { passive: false });
    canvas.addEventListener("dblclick", (event) => this.zoom(2, this.#place(event)));
  }

  /** Show a picture: an ImageBitmap, and the size in pixels in which boxes are given. */
  setPicture(bitmap, width, height) {
    this.#bitmap?.close?.();
    this.#bitmap = bitmap;
    this.#size = [width, height];
    this.#scene = null;
    this.#hits = null;
    this.#isWhole = true;
    this.#resize();
  }

  /**
   * What to draw over the picture.
   *
   * scene: {objects, current, opacity, masks, boxes, names}; names is null for captions unless they hide the picture.
   * For a difference also `pairs` of shown objects {a, b}, either of which may be null.
   */
  setScene(scene) {
    const before = this.#scene?.objects ?? [];
    const areSame = before.length === scene.objects.length && before.every((one, i) => one === scene.objects[i]);
    if (!areSame) this.#hits = null;
    this.#scene = scene;
    this.#redraw();
  }

  /** Change the scale by a factor, around a place in CSS pixels of the canvas; the middle if none is given. */
  zoom(factor, [x, y] = [this.canvas.clientWidth / 2, this.canvas.clientHeight / 2]) {
    const whole = this.#wholeScale();
    const scale = Math.max(whole, Math.min(Math.max(MOST_ZOOM, whole), this.#view.scale * factor));
    const ratio = scale / this.#view.scale;
    this.#isWhole = scale === whole;
    this.#view = { scale, x: x - (x - this.#view.x) * ratio, y: y - (y - this.#view.y) * ratio };
    this.#keepInside();
  }

  /** Show the whole picture. */
  zoomOut() {
    this.#isWhole = true;
    this.#keepInside();
  }

  /** Show one object with what surrounds it. */
  zoomTo([x1, y1, x2, y2]) {
    const { clientWidth: width, clientHeight: height } = this.canvas;
    const fitting = 0.4 * Math.min(width / Math.max(1, x2 - x1), height / Math.max(1, y2 - y1));
    const scale = Math.max(this.#wholeScale(), Math.min(fitting, MOST_ZOOM));
    this.#isWhole = false;
    this.#view = { scale, x: width / 2 - (scale * (x1 + x2)) / 2, y: height / 2 - (scale * (y1 + y2)) / 2 };
    this.#keepInside();
  }

  /** The shown object that is nearest to the current one in a direction, dx and dy being -1, 0 or 1. */
  neighbour(dx, dy) {
    const { objects, current } = this.#scene;
    if (!current) return objects[0] ?? null;
    const [x, y] = middle(current.box);
    let nearest = null;
    let least = Infinity;
    for (const one of objects) {
      const [ahead, aside] = along(middle(one.box), [x, y], [dx, dy]);
      const distance = ahead + 2 * aside;
      if (one !== current && ahead > 0 && distance < least) [nearest, least] = [one, distance];
    }
    return nearest;
  }

  #resize() {
    const { clientWidth: width, clientHeight: height } = this.canvas;
    if (!this.#bitmap || !width || !height) return;
    const ratio = devicePixelRatio;
    this.canvas.width = Math.round(width * ratio);
    this.canvas.height = Math.round(height * ratio);
    this.#keepInside();
    this.#draw();  // now, since a canvas that changes its size is blank
  }

  #wholeScale() {
    return Math.min(this.canvas.clientWidth / this.#size[0], this.canvas.clientHeight / this.#size[1]);
  }

  #keepInside() {
    const { clientWidth: width, clientHeight: height } = this.canvas;
    if (this.#isWhole) this.#view.scale = this.#wholeScale();
    const { scale, x, y } = this.#view;
    this.#view.x = within(x, width, this.#size[0] * scale);
    this.#view.y = within(y, height, this.#size[1] * scale);
    // Otherwise a finger on the picture could not scroll the page.
    this.canvas.style.touchAction = this.#isWhole ? "pan-y" : "none";
    this.#redraw();
  }

  #redraw() {
    this.#frame ||= requestAnimationFrame(() => this.#draw());
  }

  #draw() {
    cancelAnimationFrame(this.#frame);
    this.#frame = 0;
    if (!this.#bitmap) return;
    const context = this.canvas.getContext("2d");
    const ratio = this.canvas.width / this.canvas.clientWidth;
    const { scale, x, y } = this.#view;
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, this.canvas.width, this.canvas.height);
    context.setTransform(scale * ratio, 0, 0, scale * ratio, x * ratio, y * ratio);
    context.imageSmoothingEnabled = scale < SHARP_FROM;
    context.imageSmoothingQuality = "high";
    context.fillStyle = "white";  // under transparent pixels, as the server reads them
    context.fillRect(0, 0, ...this.#size);
    context.drawImage(this.#bitmap, 0, 0, ...this.#size);
    if (!this.#scene) return;
    context.lineJoin = "round";
    const unit = 1 / scale;  // one CSS pixel
    if (this.#scene.pairs) this.#drawDifference(context, unit);
    else this.#drawObjects(context, unit);
  }

  #drawObjects(context, unit) {
    const { objects, current, opacity, masks, boxes, names } = this.#scene;
    for (const object of [...objects].reverse()) {
      if (object.spans && masks) drawMask(context, object, opacity, unit);
      if (boxes) drawBox(context, object, unit);
    }
    if (names ?? true) this.#drawCaptions(context, objects, unit, { always: names === true });
    if (current) this.#drawCurrent(context, current, unit);
  }

  #drawCurrent(context, current, unit) {
    const { objects, opacity, masks } = this.#scene;
    if (!objects.includes(current)) return;
    if (current.spans && masks) {
      context.fillStyle = colourOf(current.colour, Math.min(1, opacity + 0.25));
      context.fill(current.shape);
    }
    const outline = current.spans && masks ? current.shape : boxOf(current);
    for (const [style, width] of [["rgb(0 0 0 / 0.75)", 6], ["white", 3]]) {
      context.strokeStyle = style;
      context.lineWidth = width * unit;
      context.stroke(outline);
    }
    drawCaption(context, current, captionOf(context, current, unit, this.#size), unit);
  }

  #drawCaptions(context, objects, unit, { always }) {
    const captions = objects.map((one) => captionOf(context, one, unit, this.#size));
    const area = captions.reduce((sum, { width, height }) => sum + width * height, 0);
    if (!always && area > CAPTION_SHARE * this.#size[0] * this.#size[1]) return;
    const taken = [];
    captions.forEach((caption, i) => {
      if (taken.some((other) => overlap(caption, other))) return;
      taken.push(caption);
      drawCaption(context, objects[i], caption, unit);
    });
  }

  #drawDifference(context, unit) {
    const { pairs, current } = this.#scene;
    const [width, height] = this.#size;
    context.fillStyle = "rgb(0 0 0 / 0.55)";
    context.fillRect(0, 0, width, height);
    for (const { a, b } of pairs) {
      fillOutside(context, a?.shape, b?.shape, ONLY_A, this.#size);
      fillOutside(context, b?.shape, a?.shape, ONLY_B, this.#size);
      const isCurrent = current && (a === current || b === current);
      for (const [side, style] of [[a, ONLY_A], [b, ONLY_B]]) {
        if (!side) continue;
        context.strokeStyle = isCurrent ? "white" : style;
        context.lineWidth = (isCurrent ? 2 : 1) * unit;
        context.stroke(side.shape);
      }
    }
  }

  #press(event) {
    this.#pointers.set(event.pointerId, this.#place(event));
    this.#moved = 0;
    if (!this.#isWhole) this.canvas.setPointerCapture(event.pointerId);
  }

  #move(event) {
    const place = this.#place(event);
    const before = this.#pointers.get(event.pointerId);
    if (!before) {
      this.onPoint(this.#objectAt(place));
      return;
    }
    const others = [...this.#pointers].filter(([id]) => id !== event.pointerId).map(([, other]) => other);
    this.#pointers.set(event.pointerId, place);
    this.#moved += distanceOf(before, place);
    if (others.length) this.zoom(distanceOf(place, others[0]) / Math.max(1, distanceOf(before, others[0])), others[0]);
    else if (!this.#isWhole && this.#moved > TAP_PIXELS) {
      this.#view.x += place[0] - before[0];
      this.#view.y += place[1] - before[1];
      this.#keepInside();
    }
  }

  #release(event) {
    if (this.#pointers.delete(event.pointerId) && this.#moved <= TAP_PIXELS) {
      this.onPick(this.#objectAt(this.#place(event)));
    }
  }

  #wheel(event) {
    // Where the page itself scrolls, the wheel is for that, unless Ctrl (or two fingers on a touch pad) says zoom.
    const page = document.scrollingElement;
    if (!event.ctrlKey && page.scrollHeight > page.clientHeight + 1) return;
    event.preventDefault();
    this.zoom(Math.exp(-event.deltaY / (event.ctrlKey ? 100 : 400)), this.#place(event));
  }

  #place(event) {
    const { left, top } = this.canvas.getBoundingClientRect();
    return [event.clientX - left, event.clientY - top];
  }

  #objectAt([x, y]) {
    if (!this.#scene) return null;
    this.#hits ??= new HitMap(this.#scene.objects, ...this.#size);
    const { scale, x: left, y: top } = this.#view;
    return this.#hits.at((x - left) / scale, (y - top) / scale);
  }
}

function drawMask(context, object, opacity, unit) {
  context.fillStyle = colourOf(object.colour, opacity);
  context.fill(object.shape);
  context.strokeStyle = colourOf(object.colour, Math.min(1, 2 * opacity));
  context.lineWidth = 1.5 * unit;
  context.stroke(object.shape);
}

function drawBox(context, object, unit) {
  const box = boxOf(object);
  for (const [style, width] of [["rgb(0 0 0 / 0.35)", 4], [colourOf(object.colour), 2]]) {
    context.strokeStyle = style;
    context.lineWidth = width * unit;
    context.stroke(box);
  }
}

function boxOf({ box: [x1, y1, x2, y2] }) {
  const path = new Path2D();
  path.rect(x1, y1, x2 - x1, y2 - y1);
  return path;
}

/** The place of a caption above its box, or inside it at the picture's upper edge. */
function captionOf(context, object, unit, [pictureWidth]) {
  const text = `${object.label} ${object.score.toFixed(2)}`;
  context.font = `600 ${11 * unit}px system-ui, sans-serif`;
  const width = context.measureText(text).width + 10 * unit;
  const height = 17 * unit;
  const [x1, y1] = object.box;
  const x = Math.max(0, Math.min(x1 - unit, pictureWidth - width));
  return { text, x, y: y1 >= height ? y1 - height - unit : y1, width, height };
}

function drawCaption(context, object, { text, x, y, width, height }, unit) {
  context.fillStyle = colourOf(object.colour);
  context.beginPath();
  context.roundRect(x, y, width, height, 3 * unit);
  context.fill();
  context.fillStyle = "black";
  context.font = `600 ${11 * unit}px system-ui, sans-serif`;
  context.textBaseline = "middle";
  context.fillText(text, x + 5 * unit, y + height / 2);
}

function overlap(a, b) {
  return a.x < b.x + b.width && b.x < a.x + a.width && a.y < b.y + b.height && b.y < a.y + a.height;
}

/** Fill what of one shape lies outside another. */
function fillOutside(context, shape, other, style, [width, height]) {
  if (!shape) return;
  context.save();
  if (other) {
    const outside = new Path2D(other);
    outside.rect(-width, -height, 3 * width, 3 * height);
    context.clip(outside, "evenodd");
  }
  context.fillStyle = style;
  context.fill(shape);
  context.restore();
}

/** Where a picture of this length starts, so that it covers the canvas, or stands in its middle if it is smaller. */
function within(start, canvasLength, length) {
  if (length <= canvasLength) return (canvasLength - length) / 2;
  return Math.min(0, Math.max(canvasLength - length, start));
}

function middle([x1, y1, x2, y2]) {
  return [(x1 + x2) / 2, (y1 + y2) / 2];
}

/** How far a point lies from another along a direction and across it. */
function along([x, y], [fromX, fromY], [dx, dy]) {
  const [ahead, aside] = dx ? [(x - fromX) * dx, y - fromY] : [(y - fromY) * dy, x - fromX];
  return [ahead, Math.abs(aside)];
}

function distanceOf([x1, y1], [x2, y2]) {
  return Math.hypot(x2 - x1, y2 - y1);
}
