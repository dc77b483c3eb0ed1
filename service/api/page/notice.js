// The card over the picture that says what went wrong, or what is being waited for, and what can be done.

import { byId, element } from "./dom.js";

/** Say something. actions: [words, function] pairs; the first is the one to take. isAlert: whether it is a problem. */
export function showNotice({ title, text = "", detail = "", reference = "", actions = [], isAlert = true }) {
  const card = byId("notice");
  card.role = isAlert ? "alert" : "status";
  card.classList.toggle("problem", isAlert);
  const buttons = actions.map(([words, act], i) => {
    const button = element("button", { type: "button", className: i ? "" : "primary" }, words);
    button.addEventListener("click", act);
    return button;
  });
  card.replaceChildren(
    element("h2", {}, title),
    ...[text, detail].filter(Boolean).map((words) => element("p", {}, words)),
    ...(reference ? [element("p", { className: "reference" }, reference)] : []),
    element("div", { className: "ways" }, ...buttons),
  );
  card.hidden = false;
}

/** Say that the server asked to wait. The seconds are not read aloud, since they change. */
export function showWaiting(title, secondsLeft, onCancel) {
  const text = secondsLeft ? `Trying again in ${secondsLeft} s` : "Trying again";
  const shown = byId("notice").querySelector("[data-countdown]");
  if (shown && !byId("notice").hidden) {
    shown.textContent = text;
    return;
  }
  showNotice({ title, actions: [["Stop trying", onCancel]], isAlert: false });
  const countdown = element("p", { ariaHidden: "true", dataset: { countdown: "" } }, text);
  byId("notice").querySelector("h2").after(countdown);
}

/** Take it away. */
export function hideNotice() {
  byId("notice").hidden = true;
  byId("notice").replaceChildren();
}
