// Which object lies under a point: a buffer with the number of the topmost object at each pixel. A look-up is one read,
// however many objects there are.

import { forEachRun } from "./masks.js";

const MOST_CELLS = 4_000_000;

export class HitMap {
  /** objects: by falling score; masks on top by score, boxes on top by size. */
  constructor(objects, width, height) {
    this.objects = objects;
    this.width = width;
    this.height = height;
    // Of a large picture, every second or third pixel in each direction.
    this.step = Math.max(1, Math.ceil(Math.sqrt((width * height) / MOST_CELLS)));
    this.rows = Math.ceil(height / this.step);
    this.numbers = new Uint16Array(Math.ceil(width / this.step) * this.rows);
    const hasMasks = objects.some((one) => one.spans);
    const order = objects.map((_, index) => index).reverse();
    if (!hasMasks) order.sort((a, b) => objects[b].area - objects[a].area);
    for (const index of order) this.#mark(objects[index], index + 1);
  }

  #mark(object, number) {
    if (object.spans) {
      forEachRun(object.spans, this.height, (x, y1, y2) => this.#fill(x, y1, y2, number));
      return;
    }
    const [x1, y1, x2, y2] = object.box.map(Math.round);
    for (let x = x1; x < Math.max(x2, x1 + 1); x++) this.#fill(x, y1, Math.max(y2, y1 + 1), number);
  }

  #fill(x, y1, y2, number) {
    if (x % this.step || x >= this.width) return;
    const column = (x / this.step) * this.rows;
    const last = Math.min(this.rows, Math.ceil(y2 / this.step));
    this.numbers.fill(number, column + Math.min(last, Math.ceil(y1 / this.step)), column + last);
  }

  /** The object at a point in pixels of the picture, or null. */
  at(x, y) {
    if (x < 0 || y < 0 || x >= this.width || y >= this.height) return null;
    const number = this.numbers[Math.floor(x / this.step) * this.rows + Math.floor(y / this.step)];
    return number ? this.objects[number - 1] : null;
  }
}
