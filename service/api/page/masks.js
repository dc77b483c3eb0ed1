// Masks as COCO's compressed run lengths: decoded to spans of pixels, and traced to outlines.
//
// A span is a pair of positions [start, end) in a mask that is stored column by column: position = x * height + y.

/** Decode run lengths to spans, as a flat array of starts and ends. */
export function spansOf(counts) {
  const spans = [];
  const runs = [0, 0, 0];  // the last three; a run is stored as the difference from the one before the last
  let position = 0;
  let isObject = false;
  for (let at = 0, index = 0; at < counts.length; index++) {
    let value = 0;
    let shift = 0;
    let byte;
    do {
      byte = counts.charCodeAt(at++) - 48;
      value |= (byte & 31) << shift;
      shift += 5;
    } while (byte & 32);
    if (byte & 16) value |= -1 << shift;
    if (index > 2) value += runs[(index - 2) % 3];
    runs[index % 3] = value;
    if (isObject && value > 0) spans.push(position, position + value);
    position += value;
    isObject = !isObject;
  }
  return Uint32Array.from(spans);
}

/** The number of pixels. */
export function areaOf(spans) {
  let area = 0;
  for (let i = 0; i < spans.length; i += 2) area += spans[i + 1] - spans[i];
  return area;
}

/** Call visit(x, y1, y2) for each run of pixels within a column. */
export function forEachRun(spans, height, visit) {
  for (let i = 0; i < spans.length; i += 2) {
    for (let start = spans[i]; start < spans[i + 1];) {
      const x = Math.floor(start / height);
      const end = Math.min(spans[i + 1], (x + 1) * height);
      visit(x, start - x * height, end - x * height);
      start = end;
    }
  }
}

// Four directions: right, down, left, up. Walking along an object's edge, the object lies to the right.
const AHEAD = [[1, 0], [0, 1], [-1, 0], [0, -1]];
// From a pixel's upper left corner to the middle of the edge along which one walks in that direction.
const MIDDLE = [[0.5, 0], [1, 0.5], [0.5, 1], [0, 0.5]];

// Of a larger mask only every second or third pixel is looked at, so that a picture full of large masks stays quick.
const MOST_TRACED_PIXELS = 1_000_000;

/**
 * Trace the outlines of a mask: closed loops of points [x, y] in pixels of the picture, holes included. They go through
 * the middles of the pixels' edges, which makes slopes of steps.
 */
export function traceOutlines(spans, height) {
  const bounds = boundsOf(spans, height);
  if (!bounds) return [];
  const [left, top, right, bottom] = bounds;
  const step = Math.ceil(Math.sqrt(((right - left) * (bottom - top)) / MOST_TRACED_PIXELS));
  // With a margin of one pixel, so that neighbours always exist.
  const width = Math.ceil((right - left) / step) + 2;
  const inside = new Uint8Array(width * (Math.ceil((bottom - top) / step) + 2));
  forEachRun(spans, height, (x, y1, y2) => {
    if ((x - left) % step) return;
    const column = (x - left) / step + 1;
    const [first, end] = [y1, y2].map((y) => Math.ceil((y - top) / step) + 1);
    for (let row = first; row < end; row++) inside[row * width + column] = 1;
  });
  const isTraced = new Uint8Array(inside.length);
  const loops = [];
  for (let at = width; at < inside.length; at++) {
    if (inside[at] && !inside[at - width] && !isTraced[at]) loops.push(traceLoop(at));
  }
  return loops;

  function traceLoop(start) {
    const points = [];
    let at = start;
    let direction = 0;
    let cameStraight = false;
    do {
      if (direction === 0) isTraced[at] = 1;
      const [dx, dy] = AHEAD[direction];
      const ahead = at + dy * width + dx;
      const aheadLeft = ahead - dx * width + dy;
      const goesStraight = inside[ahead] && !inside[aheadLeft];
      if (!(cameStraight && goesStraight)) {
        const [mx, my] = MIDDLE[direction];
        points.push([left + step * ((at % width) - 1 + mx), top + step * (Math.floor(at / width) - 1 + my)]);
      }
      cameStraight = goesStraight;
      if (!inside[ahead]) {
        direction = (direction + 1) % 4;
      } else if (goesStraight) {
        at = ahead;
      } else {
        at = aheadLeft;
        direction = (direction + 3) % 4;
      }
    } while (at !== start || direction !== 0);
    return points;
  }
}

function boundsOf(spans, height) {
  let [left, top, right, bottom] = [Infinity, Infinity, -1, -1];
  forEachRun(spans, height, (x, y1, y2) => {
    left = Math.min(left, x);
    right = Math.max(right, x + 1);
    top = Math.min(top, y1);
    bottom = Math.max(bottom, y2);
  });
  return right < 0 ? null : [left, top, right, bottom];
}
