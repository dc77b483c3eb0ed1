// Elements without markup in strings, which the page's policy would refuse.

/** The element of an id. */
export function byId(id) {
  return document.getElementById(id);
}

/** A new element with properties (className, textContent, ariaLabel, …), data-… from `dataset`, and children. */
export function element(name, { dataset = {}, ...properties } = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  Object.assign(made.dataset, dataset);
  made.append(...children);
  return made;
}
