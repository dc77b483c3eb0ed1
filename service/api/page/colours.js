// The colours of objects: the same, in the same order, as those that /v1/annotate draws with. All are bright enough for
// black letters.

const PALETTE = [
  [60, 200, 80],
  [70, 165, 255],
  [255, 150, 40],
  [240, 70, 230],
  [255, 225, 25],
  [0, 220, 220],
  [255, 80, 90],
  [190, 240, 70],
  [175, 130, 255],
  [0, 170, 140],
  [255, 165, 200],
  [205, 155, 70],
  [155, 215, 255],
  [255, 205, 150],
  [150, 255, 190],
];

/** The colour of a label or an object, as CSS. */
export function colourOf(index, opacity = 1) {
  const [red, green, blue] = PALETTE[index % PALETTE.length];
  return `rgb(${red} ${green} ${blue} / ${opacity})`;
}
