// The objects of an answer, with what the page needs to draw, list and filter them; and which of them are shown.

import { areaOf, spansOf, traceOutlines } from "./masks.js";

/**
 * One object per detection, by falling score.
 *
 * Colours go by label. If a model with masks has only one label, each object has its own, so that touching ones can be
 * told apart.
 */
export function objectsOf(answer, model) {
  const isByObject = model.has_masks && model.labels.length === 1;
  return answer.detections.map((detection, index) => {
    const spans = detection.mask ? spansOf(detection.mask.counts) : null;
    const [x1, y1, x2, y2] = detection.box;
    return {
      index,
      detection,
      box: detection.box,
      label: detection.label,
      score: detection.score,
      colour: isByObject ? index : detection.label_id - 1,
      spans,
      area: spans ? areaOf(spans) : (x2 - x1) * (y2 - y1),
      shape: spans ? maskPath(spans, answer.image.height) : boxPath(detection.box),
    };
  });
}

/** Those that score more and whose label is not hidden: what the server answers if it is asked with this score. */
export function shownObjects(objects, score, hiddenLabels) {
  return objects.filter((one) => isShown(one, score, hiddenLabels));
}

/** Whether one object passes the filters. */
export function isShown(object, score, hiddenLabels) {
  return object.score > score && !hiddenLabels.has(object.label);
}

/** The labels that occur, by id, and how many of each score more than this. */
export function countLabels(objects, score) {
  const counts = new Map();
  for (const { label, score: own, detection } of objects) {
    const entry = counts.get(label) ?? { label, id: detection.label_id, count: 0 };
    entry.count += own > score ? 1 : 0;
    counts.set(label, entry);
  }
  return [...counts.values()].sort((a, b) => a.id - b.id);
}

function maskPath(spans, height) {
  const path = new Path2D();
  for (const loop of traceOutlines(spans, height)) {
    path.moveTo(...loop[0]);
    for (const point of loop.slice(1)) path.lineTo(...point);
    path.closePath();
  }
  return path;
}

function boxPath([x1, y1, x2, y2]) {
  const path = new Path2D();
  path.rect(x1, y1, x2 - x1, y2 - y1);
  return path;
}
