// Two answers to one picture, compared: which objects both found, how far these differ, and which only one found.

const LEAST_OVERLAP = 0.5;

/**
 * Pair the objects of two answers: each of the first, best first, with the free one of the same label that overlaps it
 * most, if the IoU of their boxes is at least 0.5. Objects without a partner form pairs with null.
 */
export function pairObjects(first, second) {
  const free = new Set(second);
  const pairs = first.map((a) => {
    let best = null;
    let overlap = LEAST_OVERLAP;
    for (const b of free) {
      const iou = b.label === a.label ? iouOf(a.box, b.box) : 0;
      if (iou >= overlap) [best, overlap] = [b, iou];
    }
    free.delete(best);
    return pair(a, best, best ? overlap : 0);
  });
  return [...pairs, ...[...free].map((b) => pair(null, b, 0))];
}

function pair(a, b, iou) {
  const shift = a && b ? Math.max(...a.box.map((value, i) => Math.abs(value - b.box[i]))) : null;
  return { a, b, iou, shift };
}

/** Intersection over union of two boxes. */
export function iouOf(a, b) {
  const width = Math.min(a[2], b[2]) - Math.max(a[0], b[0]);
  const height = Math.min(a[3], b[3]) - Math.max(a[1], b[1]);
  if (width <= 0 || height <= 0) return 0;
  const shared = width * height;
  return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared);
}

/** The comparison in a sentence or two. pairs: those shown; isIn: whether an object passes the filters. */
export function describePairs(pairs, isIn, [nameA, nameB]) {
  const inA = ({ a }) => a && isIn(a);
  const inB = ({ b }) => b && isIn(b);
  const both = pairs.filter((one) => inA(one) && inB(one));
  const onlyA = pairs.filter((one) => inA(one) && !inB(one)).length;
  const onlyB = pairs.filter((one) => inB(one) && !inA(one)).length;
  const counts = `${both.length} in both, ${onlyA} only with ${nameA}, ${onlyB} only with ${nameB}.`;
  if (!both.length) return counts;
  const shifts = both.map((one) => one.shift).sort((x, y) => x - y);
  const scores = both.map(({ a, b }) => Math.abs(a.score - b.score)).sort((x, y) => x - y);
  const middle = Math.floor(both.length / 2);
  return (
    `${counts} Edges of boxes differ by ${pixels(shifts[middle])} px at the median, ${pixels(shifts.at(-1))} px at ` +
    `most; scores by ${scores[middle].toFixed(3)}, ${scores.at(-1).toFixed(3)} at most.`
  );
}

function pixels(value) {
  return value < 10 ? value.toFixed(2) : value.toFixed(0);
}
