// The options in the address of the page, after #, so that a view can be bookmarked and sent to somebody.

const DEFAULTS = {
  model: "",      // the server's default
  example: "",    // one of the pictures that come with the page
  score: null,    // where the filter stands; null: at the model's own
  roi_op: "",     // the model's own
  compare: "",    // no second operator
  show: "",       // of two operators: a, b, blink or difference
  masks: true,
  boxes: null,    // only if there are no masks
  names: null,    // where they do not hide the picture
  opacity: 0.4,
};

/** The options that the address names, the others at their defaults; what cannot be understood counts as absent. */
export function readAddress() {
  const given = new URLSearchParams(location.hash.slice(1));
  const named = Object.keys(DEFAULTS).filter((name) => given.has(name));
  return { ...DEFAULTS, ...Object.fromEntries(named.map((name) => [name, parse(name, given.get(name))])) };
}

/** Put the options into the address, only those that differ from their defaults. */
export function writeAddress(options) {
  const given = new URLSearchParams();
  for (const [name, value] of Object.entries(DEFAULTS)) {
    const chosen = options[name];
    if (chosen !== value) given.set(name, typeof chosen === "boolean" ? Number(chosen) : chosen);
  }
  const hash = given.toString();
  history.replaceState(null, "", hash ? `#${hash}` : location.pathname + location.search);
}

function parse(name, text) {
  if (["masks", "boxes", "names"].includes(name)) return text !== "0";
  if (name !== "score" && name !== "opacity") return text;
  const number = Number(text);
  return text !== "" && number >= 0 && number <= 1 ? number : DEFAULTS[name];
}
